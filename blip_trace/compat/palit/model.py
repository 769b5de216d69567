"""The notebooks' model, and what goes into it and comes out: Hugging Face's modules under other names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering, BlipProcessor
from transformers.utils import ModelOutput

from ...lowering.load import load_model
from ...tracer import Tracer
from ..models import UnsupportedError, tracer_of
from .settings import refuse_unused

_LAYERS = re.compile(r"(vision_model\.encoder\.layers|text_(encoder|decoder\.bert)\.encoder\.layer)\.\d+")


class ModelandProcessor:
    """A BLIP that answers questions and its processor: `model`, `processor`, the names of all its layers
    (`layer_names`) and how many layers a text stack has (`num_layers`, from the configuration).

    Either may be given or is loaded by `model_name`, a folder or a name on the hub, in torch_dtype (float32
    unless given), onto the CPU. low_cpu_mem_usage: models are always loaded so.

    Raises ValueError where neither is given, TypeError for another model, and as `load_model` does.
    """

    def __init__(
        self,
        model_name: str | None = None,
        model: Any = None,
        processor: Any = None,
        low_cpu_mem_usage: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        if model is None or processor is None:
            if model_name is None:
                raise ValueError("give a model and its processor, or the model_name to load them by")
            if model is None:
                model, own = load_model(model_name, torch_dtype or torch.float32)
                processor = processor or own
            else:
                processor = BlipProcessor.from_pretrained(model_name, backend="pil")
        check_answers(model)
        self.processor = processor
        self.model = model
        self.layer_names = [name for name, _ in model.named_modules() if _LAYERS.fullmatch(name)]
        self.num_layers: int = model.config.text_config.num_hidden_layers

    def __repr__(self) -> str:
        return (
            f"ModelandProcessor(model: {type(self.model).__name__} [{self.num_layers} layers], "
            f"processor: {type(self.processor).__name__})"
        )


@dataclass
class BlipVQAOutput(ModelOutput):  # type: ignore[misc]
    """What `customblip_temp` returns for B rows: decoder_logits [B, 1, V], the image_embeds [B, N, D] that it
    was given, encoder_last_hidden_state [B, L, C], and the states after the embeddings and after each layer
    of both text stacks. Fields by name, by key, or by number among those that are set."""

    decoder_logits: Tensor | None = None
    image_embeds: Tensor | None = None
    vision_last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None


class customblip_temp(torch.nn.Module):
    """The parts of a BLIP that answers questions, as `model_vis`, `model_text_enc` and `model_text_dec`: the
    model's own modules, no copies. Raises TypeError for another model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        check_answers(model)
        object.__setattr__(self, "source", model)  # as a module of this one all of it would be there twice
        self.source: Any
        self.model_vis = model.vision_model
        self.model_text_enc = model.text_encoder
        self.model_text_dec = model.text_decoder
        self.decoder_pad_token_id = model.decoder_pad_token_id
        self.decoder_start_token_id = model.decoder_start_token_id
        self.eos_token_id = model.config.text_config.sep_token_id
        self.pad_token_id = model.config.text_config.pad_token_id

    def image_embed(
        self,
        list_pixel_values: Sequence[Tensor],
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> Tensor:
        """Image embeddings [n, N, D] in float32 on the CPU, of n pixel values [1, 3, H, W].

        Raises UnsupportedError for output_attentions, which the notebooks take and do not return, and
        ValueError for an empty list.
        """
        refuse_unused(output_attentions=output_attentions)
        if not len(list_pixel_values):
            raise ValueError("no pixel_values given to encode")
        states = [self.model_vis(pixel_values=pixels)[0][0] for pixels in list_pixel_values]
        return torch.stack(states).float().cpu()

    def forward(
        self,
        input_ids: Tensor,
        image_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BlipVQAOutput:
        """One decoder step from its start token, for a question [1, L] about image embeddings [B, N, D].

        Raises ValueError without image_embeds; UnsupportedError for output_attentions and for a mask that
        hides something, since transformers' BLIP does not mask its cross-attention.
        """
        refuse_unused(output_attentions=output_attentions)
        if image_embeds is None:
            raise ValueError("image_embeds are missing: make_inputs gives them")
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise UnsupportedError(
                "a padded question", "transformers' cross-attention ignores its mask; give it without padding"
            )
        where = self.model_text_enc.embeddings.word_embeddings.weight
        images = image_embeds.to(where.device, where.dtype)
        question = self.model_text_enc(
            input_ids=input_ids.to(where.device).expand(len(images), -1),
            encoder_hidden_states=images,
            output_hidden_states=True,
            return_dict=True,
        )
        start = torch.full((len(images), 1), self.decoder_start_token_id, device=where.device)
        answer = self.model_text_dec(
            input_ids=start,
            encoder_hidden_states=question.last_hidden_state,
            output_hidden_states=True,
            use_cache=False,
            return_dict=True,
        )
        return BlipVQAOutput(
            decoder_logits=answer.logits,
            image_embeds=images,
            encoder_last_hidden_state=question.last_hidden_state,
            encoder_hidden_states=question.hidden_states,
            decoder_hidden_states=answer.hidden_states,
        )


def check_answers(model: object) -> None:
    """Raises TypeError for anything but a BLIP that answers questions."""
    if not isinstance(model, BlipForQuestionAnswering):
        raise TypeError(f"the notebooks trace a BlipForQuestionAnswering, not {type(model).__name__}")


def tracer_for(mt: Any, new_model: Any) -> Tracer:
    """The tracer of new_model's weights, with mt's processor. Raises TypeError or ValueError where they are
    not what this module makes."""
    if not isinstance(mt, ModelandProcessor):
        raise TypeError(f"mt must be a ModelandProcessor of this module, not {type(mt).__name__}")
    if not isinstance(new_model, customblip_temp):
        raise TypeError(f"new_model must be a customblip_temp of this module, not {type(new_model).__name__}")
    model = new_model.source
    parts = (new_model.model_vis, new_model.model_text_enc, new_model.model_text_dec)
    whole = (model.vision_model, model.text_encoder, model.text_decoder)
    if any(part is not own for part, own in zip(parts, whole, strict=True)):
        raise ValueError("a part of new_model was exchanged: make a customblip_temp of a model that has it")
    return tracer_of(model, mt.processor)


def make_inputs(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Image embeddings [2, N, D] on the CPU, clean in both rows, and input_ids [1, L] on `device`, or the
    model's. The image is encoded once; nothing is drawn."""
    where = new_model.model_text_enc.embeddings.word_embeddings.weight
    input_ids = mt.processor(text=question, return_tensors="pt").input_ids
    pixels = mt.processor(images=image, return_tensors="pt").pixel_values.to(where.device, where.dtype)
    with torch.no_grad():
        image_embeds = new_model.image_embed([pixels])
    return image_embeds.repeat(2, 1, 1), input_ids.to(device or where.device)


def predict_from_input(new_model: customblip_temp, tup: tuple[Tensor, Tensor]) -> BlipVQAOutput:
    """What the model makes of `make_inputs`' pair, without gradients."""
    image_embeds, input_ids = tup
    with torch.no_grad():
        output: BlipVQAOutput = new_model(input_ids=input_ids, image_embeds=image_embeds)
    return output


def result_gen(output: BlipVQAOutput, return_p: bool = False) -> tuple[Tensor, Tensor]:
    """The most probable token [B] of each row's last position, and its probability [B]; whatever return_p
    says, as in the notebooks."""
    p, preds = output["decoder_logits"][:, -1].float().softmax(dim=1).max(dim=1)
    return preds, p


def decoding(mt: ModelandProcessor, pred_prob: tuple[Tensor, Tensor]) -> str:
    """The first row's token of `result_gen`'s pair, as text."""
    text: str = mt.processor.decode(pred_prob[0][0], skip_special_tokens=True)
    return text
