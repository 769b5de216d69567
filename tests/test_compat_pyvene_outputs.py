"""What calls through `compat.pyvene` return: pyvene's own shapes, entries and numbers."""

from __future__ import annotations

import pickle
from copy import copy
from random import Random
from typing import Any

import pytest
import torch
from pyvene import CollectIntervention, VanillaIntervention
from test_compat_nnsight import LAYERS, TEXTS, TOKENS, assert_same, run
from test_compat_pyvene import (
    BASES,
    CLEAN,
    ENCODER,
    Inputs,
    Wrapper,
    config,
    covered,
    inputs,
    load,
    original,
    ours,
    passes,
)
from test_parity import TOLERANCE, tracer
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import shipped_model
from blip_trace.scenes import random_scene

__all__ = ["covered", "passes"]  # fixtures


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("return_dict", [True, False, None])
@pytest.mark.parametrize("with_original", [True, False])
def test_what_a_call_returns(return_dict: bool | None, with_original: bool, passes: list[int]) -> None:
    options = {"output_original_output": with_original, "return_dict": return_dict}
    location = {"sources->base": 7}
    mine, theirs = (
        each(config("block_output", 3))(BASES["picture"], [CLEAN], location, **options)
        for each in (ours, original)
    )
    assert type(mine) is type(theirs)
    if return_dict:
        assert list(mine) == list(theirs)
        mine, theirs = ((own.original_outputs, own.intervened_outputs) for own in (mine, theirs))
    assert (mine[0] is None) == (theirs[0] is None) == (not with_original)
    pairs = [both for both in zip(mine, theirs, strict=True) if both[0] is not None]
    logits = [torch.cat([own["decoder_logits"] for own in each]) for each in zip(*pairs, strict=True)]
    if with_original:
        assert_same(*logits)
    assert passes == [1]


def entries(output: dict[str, Any]) -> list[Tensor]:
    """All tensors of what the wrapper returns."""
    found = [output["decoder_logits"], output["image_embeds"], output["encoder_last_hidden_state"]]
    return [*found, *output["encoder_hidden_states"], *output["decoder_hidden_states"]]


@pytest.mark.parametrize("component", [f"{ENCODER % 1}.output", "model_vis.encoder.layers[1].output"])
def test_all_entries_of_the_wrappers_output(component: str) -> None:
    """As in pyvene's first call on a model: later ones of its own lack the hidden states."""
    fresh = Wrapper(BlipForQuestionAnswering.from_pretrained(shipped_model()))
    location = {"sources->base": 7}
    both = [
        each(config(component), wrapper)(BASES["both"], [CLEAN], location, output_original_output=True)
        for each, wrapper in ((ours, Wrapper(load("ours"))), (original, fresh))
    ]
    for mine, theirs in zip(*both, strict=True):
        assert list(mine) == list(theirs)
        assert len(mine) == 5
        tensors = entries(mine), entries(theirs)
        assert len(tensors[0]) == len(tensors[1]) == 3 + 2 * (LAYERS + 1)
        for one, other in zip(*tensors, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 10 * TOLERANCE
    original_states, states = (own["encoder_last_hidden_state"] for own in both[0])
    assert (original_states - states).abs().max() > 1e-2


def test_the_wrappers_output_is_a_dictionary() -> None:
    def call() -> dict[str, Any]:
        output: dict[str, Any] = ours(config("block_output", 3))(
            BASES["picture"], [CLEAN], {"sources->base": 7}
        )[1]
        return output

    made = call()
    assert isinstance(made, dict)
    assert "encoder_last_hidden_state" in made
    assert "loss" not in made
    assert made.get("loss", 3) == 3
    with pytest.raises(KeyError, match="loss"):
        made["loss"]
    full = entries(made)
    for read in (dict(call()), {**call()}, call().copy(), copy(call()), pickle.loads(pickle.dumps(call()))):
        assert type(read) is dict
        assert all(map(torch.equal, entries(read), full))
    assert [name for name, _ in made.items()] == list(made)
    assert repr(call()).startswith("WrapperOutput(decoder_logits, image_embeds, ")
    assert call().get("image_embeds").shape == (1, 65, 128)
    changed = call()
    changed["encoder_last_hidden_state"] = 1
    del changed["decoder_hidden_states"]
    assert changed["image_embeds"].shape == (1, 65, 128)
    assert changed["encoder_last_hidden_state"] == 1
    assert "decoder_hidden_states" not in changed
    assert not call()["decoder_logits"].is_inference()


def test_late_entries_of_inputs_that_changed() -> None:
    base = {name: x.clone() for name, x in BASES["picture"].items()}
    location = {"sources->base": ([[[7]]], [[[7]]])}
    sources, model = [dict(CLEAN)], BlipForQuestionAnswering.from_pretrained(shipped_model())
    made = ours(config("block_output", 3), Wrapper(model))
    outputs = [made(base, sources, location)[1] for _ in range(3)]
    expected = ours(config("block_output", 3))(base, sources, location)[1]
    # Other dictionaries, lists and locations do not matter,
    location["sources->base"][1][0][0][0] = 1
    sources[0]["pixel_values"] = pixels = base["pixel_values"]
    base["pixel_values"] = torch.zeros_like(pixels)
    for one, other in zip(entries(outputs[0]), entries(expected), strict=True):
        assert (one - other).abs().max() <= TOLERANCE
    # but what was changed in place, or weights that were exchanged, does.
    bias = model.text_encoder.encoder.layer[0].output.dense.bias
    model.text_encoder.encoder.layer[0].output.dense.bias = torch.nn.Parameter(bias.detach().clone())
    with pytest.raises(RuntimeError, match=r"image_embeds, .* cannot be computed any more"):
        outputs[1]["image_embeds"]
    model.text_encoder.encoder.layer[0].output.dense.bias = bias
    pixels.zero_()
    with pytest.raises(RuntimeError, match=r"image_embeds, .* cannot be computed any more"):
        outputs[2]["image_embeds"]
    assert outputs[2]["decoder_logits"].shape[:2] == (1, 1)
    assert outputs[0]["image_embeds"].shape == (1, 65, 128)


def test_inputs_as_the_processor_makes_them(passes: list[int]) -> None:
    picture = random_scene(Random(24)).render(64)
    source = tracer("hooks").processor(picture, TEXTS[0], return_tensors="pt")
    location = {"sources->base": 7}
    mine, theirs = (
        each(config("block_output", 3))(BASES["picture"], given, location)[1]["decoder_logits"]
        for each, given in ((ours, source), (original, [CLEAN]))
    )
    assert (mine - theirs).abs().max() <= 10 * TOLERANCE
    assert passes == [1]


def test_a_base_that_is_the_source(passes: list[int]) -> None:
    """Exchanging a state with itself changes nothing."""
    base = {name: x.clone() for name, x in CLEAN.items()}
    made = ours(config("block_output", 3))
    output = made(base, [CLEAN], {"sources->base": 7}, output_original_output=True)
    truth = original(config("block_output", 3))(base, [CLEAN], {"sources->base": 7})[1]["decoder_logits"]
    for own in output:
        assert (own["decoder_logits"] - truth).abs().max() <= 10 * TOLERANCE
    assert passes == [1]


def raw(picture: int, **decoder: Tensor) -> Inputs:
    """What the Hugging Face model itself is given."""
    return {**inputs(picture), **decoder}


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("as_argument", [True, False])
def test_the_loss_of_the_model_without_a_wrapper(as_argument: bool, passes: list[int]) -> None:
    start = run()["decoder_input_ids"]
    labels = torch.cat((start, torch.tensor([[7]])), dim=1)
    base, source = (raw(picture, labels=labels) for picture in (1, 0))
    options: dict[str, Any] = {"output_original_output": True}
    if as_argument:
        base, options = inputs(1), {"labels": labels}
    losses = []
    for token in range(TOKENS):
        both = [
            each(config("block_output", 3), load(name))(base, [source], {"sources->base": token}, **options)
            for each, name in ((ours, "ours"), (original, "pyvene"))
        ]
        for mine, theirs in zip(*both, strict=True):
            assert type(mine) is type(theirs)
            if mine is not None:
                assert list(mine) == list(theirs) == ["loss", "image_embeds", "last_hidden_state"]
                assert torch.equal(mine.image_embeds, theirs.image_embeds)
                losses.append((float(mine.loss), float(theirs.loss)))
    mine, theirs = torch.tensor(losses, dtype=torch.float64).T
    assert len(mine) == TOKENS * (1 if as_argument else 2)
    assert theirs.max() - theirs.min() > 1
    assert (mine - theirs).abs().max() <= 10 * TOLERANCE
    assert len(passes) == TOKENS


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("return_dict", [True, None])
def test_logits_that_are_collected(return_dict: bool | None) -> None:
    made = [
        {"layer": 3, "component": "block_output", "intervention_type": VanillaIntervention},
        {"component": "text_decoder.output", "intervention_type": CollectIntervention},
    ]
    start = run()["decoder_input_ids"]
    base, source = raw(1, decoder_input_ids=start), raw(0, decoder_input_ids=start)
    found: list[list[Tensor]] = [[], []]
    for token in range(TOKENS):
        location = {"sources->base": ([[[token]], None], [[[token]], [[0]]])}
        for number, (each, name) in enumerate(((ours, "ours"), (original, "pyvene"))):
            output = each(list(made), load(name))(base, [source, None], location, return_dict=return_dict)
            collected = output.collected_activations if return_dict else output[0][1]
            assert len(collected) == 1
            found[number].append(collected[0])
            counterfactual = output.intervened_outputs if return_dict else output[1]
            assert list(counterfactual) == ["image_embeds", "last_hidden_state"]
    assert_same(*map(torch.cat, found))
