"""BLIP as a Program: a pre-norm ViT, and post-norm BERT stacks with cross-attention in one of three
orders."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from ..program import (
    CrossAttention,
    Head,
    Layer,
    Linear,
    Mlp,
    Norm,
    PatchEmbedding,
    Program,
    SelfAttention,
    Stack,
    TokenEmbedding,
)

Blip: TypeAlias = BlipForQuestionAnswering | BlipForConditionalGeneration | BlipForImageTextRetrieval
MODELS: tuple[type[Blip], ...] = (
    BlipForQuestionAnswering,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
)


def lower(model: Blip) -> Program:
    """Read the weights of `model` into a Program; nothing is copied but what is repacked.

    Raises ValueError where the model's configuration asks for something that a Program cannot express.
    """
    config = model.config
    for part, sub in (("vision", config.vision_config), ("text", config.text_config)):
        if sub.hidden_act != "gelu":
            raise ValueError(
                f"the {part} config's hidden_act is {sub.hidden_act!r}: only 'gelu' can be traced"
            )
    if not config.text_config.is_decoder:
        raise ValueError("the text config's is_decoder is false: text stacks without cross-attention")
    with torch.no_grad():
        texts, task, head = _texts(model)
        return Program(
            image=_vision(model),
            texts=texts,
            head=head,
            task=task,
            start_token=getattr(model, "decoder_start_token_id", config.text_config.bos_token_id),
        )


def _texts(model: Blip) -> tuple[tuple[Stack, ...], Literal["answer", "continue", "match"], Head]:
    match model:
        case BlipForConditionalGeneration():
            decoder = _text(model.text_decoder.bert, "text_decoder", attends_to="vision", causal=True)
            return (decoder,), "continue", _head(model.text_decoder.cls.predictions)
        case BlipForImageTextRetrieval():
            encoder = _text(model.text_encoder, "text_encoder", attends_to="vision", causal=False)
            return (encoder,), "match", Head(None, None, _linear(model.itm_head))
    config = model.config
    if config.vision_config.hidden_size != config.text_config.hidden_size:
        raise ValueError(
            f"the vision and text stacks are {config.vision_config.hidden_size} and "
            f"{config.text_config.hidden_size} wide: the answer decoder cannot attend to the question"
        )
    encoder = _text(model.text_encoder, "text_encoder", attends_to="vision", causal=False)
    decoder = _text(model.text_decoder.bert, "text_decoder", attends_to="text_encoder", causal=True)
    return (encoder, decoder), "answer", _head(model.text_decoder.cls.predictions)


def _vision(model: Blip) -> Stack:
    vision, config = model.vision_model, model.config.vision_config
    layers = []
    for block in vision.encoder.layers:
        size = block.self_attn.embed_dim
        qkv, out = block.self_attn.qkv, block.self_attn.projection
        layers.append(
            Layer(
                (
                    SelfAttention(
                        qkv=_without_value_bias(qkv.weight, qkv.bias, size),
                        out=_carrying_value_bias(out, qkv.bias[2 * size :]),
                        norm=_norm(block.layer_norm1),
                        heads=block.self_attn.num_heads,
                        causal=False,
                    ),
                    Mlp(_linear(block.mlp.fc1), _linear(block.mlp.fc2), _norm(block.layer_norm2)),
                )
            )
        )
    patches = vision.embeddings.patch_embedding
    return Stack(
        name="vision",
        embedding=PatchEmbedding(
            projection=Linear(patches.weight.detach().flatten(1), patches.bias.detach()),
            class_token=vision.embeddings.class_embedding.detach().flatten(),
            positions=vision.embeddings.position_embedding.detach()[0],
            patch_size=config.patch_size,
            image_size=config.image_size,
        ),
        layers=tuple(layers),
        norm_first=True,
        final_norm=_norm(vision.post_layernorm),
    )


def _text(model: Any, name: str, attends_to: str, causal: bool) -> Stack:
    layers = []
    for block in model.encoder.layer:
        self_attn, cross_attn = block.attention.self, block.crossattention.self
        size = self_attn.all_head_size
        biases = (self_attn.query.bias, self_attn.key.bias, self_attn.value.bias)
        weights = (self_attn.query.weight, self_attn.key.weight, self_attn.value.weight)
        layers.append(
            Layer(
                (
                    SelfAttention(
                        qkv=_without_value_bias(torch.cat(weights), torch.cat(biases), size),
                        out=_carrying_value_bias(block.attention.output.dense, self_attn.value.bias),
                        norm=_norm(block.attention.output.LayerNorm),
                        heads=self_attn.num_attention_heads,
                        causal=causal,
                    ),
                    CrossAttention(
                        query=_linear(cross_attn.query),
                        key=cross_attn.key.weight.detach(),
                        value=cross_attn.value.weight.detach(),
                        out=_carrying_value_bias(block.crossattention.output.dense, cross_attn.value.bias),
                        norm=_norm(block.crossattention.output.LayerNorm),
                        heads=cross_attn.num_attention_heads,
                    ),
                    Mlp(
                        _linear(block.intermediate.dense),
                        _linear(block.output.dense),
                        _norm(block.output.LayerNorm),
                    ),
                )
            )
        )
    embeddings = model.embeddings
    return Stack(
        name=name,
        embedding=TokenEmbedding(
            words=embeddings.word_embeddings.weight.detach(),
            positions=embeddings.position_embeddings.weight.detach(),
            norm=_norm(embeddings.LayerNorm),
        ),
        layers=tuple(layers),
        norm_first=False,
        attends_to=attends_to,
    )


def _head(predictions: Any) -> Head:
    return Head(
        dense=_linear(predictions.transform.dense),
        norm=_norm(predictions.transform.LayerNorm),
        decoder=_linear(predictions.decoder),
    )


def _linear(module: nn.Linear) -> Linear:
    return Linear(module.weight.detach(), module.bias.detach())


def _norm(module: nn.LayerNorm) -> Norm:
    return Norm(module.weight.detach(), module.bias.detach(), module.eps)


def _without_value_bias(weight: Tensor, bias: Tensor, size: int) -> Linear:
    """Packed query, key and value projections; the value's bias moves to the output projection."""
    return Linear(weight.detach(), torch.cat((bias[: 2 * size], torch.zeros_like(bias[2 * size :]))).detach())


def _carrying_value_bias(out: nn.Linear, value_bias: Tensor) -> Linear:
    """The output projection with W_o b_v added to its bias: attention weights sum to one, so the value bias
    reaches every row of the context unchanged. Summed in float64 and rounded once."""
    bias = out.bias.double() + out.weight.double() @ value_bias.double()
    return Linear(out.weight.detach(), bias.to(out.bias.dtype).detach())
