"""`HookedBlip`: the surface that TransformerLens touches, and the table of its hooks."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BlipForQuestionAnswering, BlipProcessor

from blip_trace import hooks
from blip_trace.compat.models import tracer_of
from blip_trace.sites import HEAD_KINDS, KINDS, Site

real = pytest.importorskip("transformer_lens.patching")

from transformer_lens.model_protocol import TransformerLensModel  # noqa: E402
from transformer_lens_helpers import (  # noqa: E402
    QUESTION,
    blip,
    decoder,
    green,
    pair,
    pictures,
    tracer,
)

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HOOKS, HookedBlip  # noqa: E402
from blip_trace.compat.transformer_lens.hooks import layers_of  # noqa: E402


def stacks() -> dict[str, tuple[HookedBlip, Tensor]]:
    """A model of each stack, and tokens for it."""
    question, said, text = blip(), decoder((QUESTION, QUESTION), 1, "top left").clean, blip(name="match")
    return {
        "question encoder": (question, question.to_tokens(QUESTION)),
        "answer decoder": (said, said.to_tokens("top left")),
        "caption": (caption := blip(name="caption"), caption.to_tokens("a green square")),
        "text": (text, text.to_tokens("a green square")),
    }


@pytest.mark.parametrize("stack", ["question encoder", "answer decoder", "caption", "text"])
def test_the_table_of_hooks_and_sites(stack: str) -> None:
    """Each hook's activation is the state of its site, as the Hugging Face model's modules put it out."""
    model, tokens = stacks()[stack]
    cfg, count = model.cfg, tokens.shape[1]
    placed = {name: place for name, place in HOOKS.items() if place.kind is not None}
    assert {place.kind for place in placed.values()} == set(KINDS)
    sites = {
        Site(model.stack, layer, kind, token, head)
        for kind in KINDS
        for layer in range(cfg.n_layers)
        for token in range(count)
        for head in (range(cfg.n_heads) if kind in HEAD_KINDS else (None,))
    }
    _, cache = model.run_with_cache(tokens)
    with hooks.recording(model.original_model, sites) as states:
        model(tokens)
    seen = set()
    for name, place in placed.items():
        for layer in range(cfg.n_layers):
            found = cache[f"blocks.{layer}.{name}"]
            if layer + place.shift < 0:
                continue
            for token in range(count):
                for head in range(cfg.n_heads) if place.form == "heads" else (None,):
                    site = Site(model.stack, layer + place.shift, str(place.kind), token, head)
                    part = states[site][0]
                    if head is None:
                        assert found[0, token].equal(part), name
                    else:
                        assert found[0, token, head].equal(part.unflatten(0, (cfg.n_heads, -1))[head]), name
                    seen.add(site)
    assert seen == sites


def test_hooks_that_are_no_sites() -> None:
    model, tokens = stacks()["question encoder"]
    layers, cfg = layers_of(model.original_model, model.stack), model.cfg
    embedded, weights = {}, {}
    handles = [
        model.original_model.text_encoder.embeddings.register_forward_hook(lambda *a: embedded.update(x=a[2]))
    ]
    for layer, block in enumerate(layers):
        for name in ("attention", "crossattention"):
            keep = partial(lambda key, _, __, out: weights.update({key: out[1]}), (layer, name))
            handles.append(getattr(block, name).self.register_forward_hook(keep))
    _, cache = model.run_with_cache(tokens)
    for handle in handles:
        handle.remove()
    assert cache["blocks.0.hook_resid_pre"].equal(embedded["x"])
    image = model.rows(tokens)[0].images[None]
    for layer, block in enumerate(layers):
        stream, middle = (cache[name, layer] for name in ("resid_pre", "resid_mid"))
        for prefix, name, query, keys in (
            ("attn.hook_", "attention", stream, stream),
            ("hook_cross_attn_", "crossattention", middle, image),
        ):
            own = getattr(block, name).self
            for letter, module, given in (
                ("q", own.query, query),
                ("k", own.key, keys),
                ("v", own.value, keys),
            ):
                expected = module(given).unflatten(-1, (cfg.n_heads, cfg.d_head))
                assert cache[f"blocks.{layer}.{prefix}{letter}"].equal(expected)
            assert cache[f"blocks.{layer}.{prefix}pattern"].equal(weights[layer, name])


def test_the_surface_that_the_library_touches() -> None:
    model, tokens = stacks()["question encoder"]
    assert isinstance(model, TransformerLensModel)
    config = model.original_model.config.text_config
    assert (model.cfg.n_layers, model.cfg.n_heads) == (4, 4)
    assert model.cfg.n_key_value_heads is None
    assert model.cfg.d_model == config.hidden_size == model.cfg.d_head * model.cfg.n_heads
    assert str(model.cfg.device) == "cpu"
    assert tokens.tolist() == [tracer().inputs.question_ids(QUESTION).tolist()]
    assert model.to_str_tokens(QUESTION) == model.to_str_tokens(tokens) == model.to_str_tokens(tokens[0])
    assert model.to_str_tokens(QUESTION)[1:3] == ["what", "color"]
    logits, cache = model.run_with_cache(tokens)
    assert logits.shape == (1, 1, model.cfg.d_vocab)
    assert int(logits[0, -1].argmax()) == model.to_single_token("green")
    for same in (model(tokens), model(QUESTION), model.run_with_hooks([QUESTION], fwd_hooks=[])):
        assert same.equal(logits)
    assert not logits.requires_grad
    assert set(cache) == set(model.hook_names)
    assert cache["resid_post", -1].equal(cache["blocks.3.hook_resid_post"])
    assert cache["z", 2].shape == (1, tokens.shape[1], 4, 32)
    assert cache["pattern", 2].shape == (1, 4, tokens.shape[1], tokens.shape[1])
    some = model.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_z"))[1]
    assert set(some) == {f"blocks.{layer}.attn.hook_z" for layer in range(4)}
    names = ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre"]
    assert set(model.run_with_cache(tokens, names_filter=names)[1]) == set(names)
    assert list(model.run_with_cache(tokens, names_filter=names[0])[1]) == names[:1]


def test_logits_are_those_of_the_model() -> None:
    """Behind a question, and of a decoder at each of its tokens."""
    pixels = tracer().inputs.pixels(pictures()[0])
    model: Any = tracer().model
    ids, given = tracer().inputs.question_ids(QUESTION)[None], torch.tensor([[5, 20, 21]])
    with torch.no_grad():
        seen = model.vision_model(pixels).last_hidden_state
        read = model.text_encoder(input_ids=ids, encoder_hidden_states=seen).last_hidden_state
        expected = model.text_decoder(input_ids=given, encoder_hidden_states=read).logits
    said = blip(stack="text_decoder", question=QUESTION)
    assert (said(given) - expected).abs().max() <= 1e-5
    assert (blip(answer="bottom center")(ids) - expected[:, :2]).abs().max() <= 1e-5
    for name, text in (("caption", "a green"), ("match", "a green square")):
        own = tracer(name)
        found = blip(name=name)
        ids = found.to_tokens(text)
        inputs = {"pixel_values": pixels, "input_ids": ids}
        with torch.no_grad():
            out = own.model(**inputs)
        exact = out.logits if name == "caption" else out.itm_score[:, None]
        assert (found(ids) - exact).abs().max() <= 1e-5


def test_hook_functions() -> None:
    """They may return, change in place, or only look; by name or by filter; and see where they are."""
    model, tokens = stacks()["question encoder"]
    before, seen = model(tokens), []

    def zero(activation: Tensor, hook: Any) -> None:
        seen.append((hook.name, hook.layer()))
        activation[:, 3] = 0

    def zeroed(activation: Tensor, hook: Any) -> Tensor:
        activation = activation.clone()
        activation[:, 3] = 0
        return activation

    def look(activation: Tensor, hook: Any) -> None: ...

    name = "blocks.2.hook_resid_mid"
    changed = model.run_with_hooks(tokens, fwd_hooks=[(name, zero)])
    assert (changed - before).abs().max() > 1e-2
    assert model.run_with_hooks(tokens, fwd_hooks=[(name, zeroed)]).equal(changed)
    assert model.run_with_hooks(tokens, fwd_hooks=[(lambda own: own == name, zero)]).equal(changed)
    assert model.run_with_hooks(tokens, fwd_hooks=[(lambda _: True, look)]).equal(before)
    assert seen == [(name, 2)] * 2


def hooks_on(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def test_no_hooks_are_left() -> None:
    made = pair(blip(), blip(1))
    model = made.corrupted.original_model
    model(
        pixel_values=torch.zeros(1, 3, 64, 64), input_ids=made.tokens, labels=made.tokens
    )  # transformers' own
    before = hooks_on(model)
    cache = made.cache()
    real.get_act_patch_resid_mid(made.corrupted, made.tokens, cache, green)
    ours.get_act_patch_attn_head_all_pos_every(made.corrupted, made.tokens, cache, green)

    def fail(activation: Tensor, hook: Any) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        made.corrupted.run_with_hooks(made.tokens, [(lambda name: "z" in name, fail)])
    assert hooks_on(model) == before


def test_signatures() -> None:
    """Every function of the library is here, with its arguments in their order and their defaults."""
    theirs = {
        name for name in dir(real) if name.startswith(("get_act_patch", "generic_", "make_df", "layer_"))
    }
    assert theirs | {"HOOKS", "HookedBlip", "PatchingResult"} == set(ours.__all__)
    for name in theirs:
        own, exact = getattr(ours, name), getattr(real, name)
        if isinstance(exact, partial):
            assert own.keywords == exact.keywords
            assert own.__doc__ == exact.__doc__
        parameters = [inspect.signature(function).parameters.values() for function in (own, exact)]
        assert [(p.name, p.kind, p.default) for p in parameters[0]] == [
            (p.name, p.kind, p.default) for p in parameters[1]
        ]


def test_a_model_of_ones_own(tiny_folder: Path) -> None:
    """Its processor prepares; caches of other weights are refused, and so is training mode."""
    model = BlipForQuestionAnswering.from_pretrained(tiny_folder)
    processor = BlipProcessor.from_pretrained(tiny_folder, backend="pil")
    made = pair(
        *(HookedBlip(model, image, processor=processor) for image in pictures()), "what color is the red"
    )
    cache, metric = made.cache(), lambda logits: logits[0, -1, 11]
    values = [
        library.get_act_patch_resid_pre(made.corrupted, made.tokens, cache, metric)
        for library in (real, ours)
    ]
    assert (values[0] - values[1]).abs().max() <= 1e-5
    assert values[0].max() - values[0].min() >= 1e-3
    without = HookedBlip(model, tracer_of(model, processor).inputs.pixels(pictures()[1]))
    with pytest.raises(ValueError, match="without a processor"):
        without.to_tokens("what")
    assert without(made.tokens).equal(made.corrupted(made.tokens))
    with torch.no_grad():
        model.text_encoder.encoder.layer[0].output.dense.bias[0] += 5
        model.vision_model.post_layernorm.bias[0] += 5
    with pytest.raises(ValueError, match="weights before a change"):
        ours.get_act_patch_resid_pre(made.corrupted, made.tokens, cache, metric)
    cache = made.cache()
    again = [
        library.get_act_patch_resid_pre(made.corrupted, made.tokens, cache, metric)
        for library in (real, ours)
    ]
    assert (again[0] - again[1]).abs().max() <= 1e-5
    assert (again[0] - values[0]).abs().max() > 1e-3
    model.text_encoder.train()
    with pytest.raises(ValueError, match="training mode"):
        ours.get_act_patch_resid_pre(made.corrupted, made.tokens, cache, metric)
    with pytest.raises(ValueError, match="evaluation mode"):
        real.get_act_patch_resid_pre(made.corrupted, made.tokens, cache, metric)
