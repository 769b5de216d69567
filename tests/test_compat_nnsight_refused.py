"""What `compat.nnsight` refuses, each in one sentence that says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from nnsight import NNsight
from test_compat_nnsight import CLEAN, OTHERS, model, patched, wrapped
from torch import Tensor
from transformers import BlipForConditionalGeneration, BlipForQuestionAnswering

from blip_trace import Site
from blip_trace.compat.models import UnsupportedError
from blip_trace.compat.nnsight import activation_patching


def batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat((x, x)) for name, x in inputs.items()}


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **inputs,
        "input_ids": torch.cat((inputs["input_ids"], torch.zeros(1, 1, dtype=torch.int64)), dim=1),
    }


def masked(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, -1] = 0
    return {**inputs, "attention_mask": mask}


def without(name: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda inputs: {own: x for own, x in inputs.items() if own != name}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (batch, UnsupportedError, "a batch of 2 rows is not supported here: call this for one row"),
        (padded, UnsupportedError, "padding in input_ids"),
        (masked, UnsupportedError, "an attention_mask that hides tokens"),
        (lambda i: {**i, "labels": i["decoder_input_ids"]}, UnsupportedError, "the input labels"),
        (
            lambda i: {**i, "decoder_input_ids": torch.tensor([[30522, 7]])},
            UnsupportedError,
            "other tokens than the start token is not supported here: write a trace of your own",
        ),
        (
            lambda i: {**i, "input_ids": i["input_ids"][:, 1:]},
            UnsupportedError,
            "a corrupted question of another length",
        ),
        (without("decoder_input_ids"), ValueError, "a trace needs decoder_input_ids"),
        (without("pixel_values"), ValueError, "a run needs input_ids"),
        (
            lambda i: {**i, "pixel_values": i["pixel_values"].expand(2, -1, -1, -1)},
            ValueError,
            "input_ids have 1 rows but pixel_values 2",
        ),
        (lambda i: {**i, "pixel_values": i["pixel_values"][..., 1:]}, ValueError, "pixel_values must be"),
    ],
)
def test_inputs_that_are_refused(change: Any, error: type[Exception], match: str) -> None:
    layers = wrapped().text_encoder.encoder.layer
    with pytest.raises(error, match=match):
        activation_patching(wrapped(), change(CLEAN), OTHERS["picture"], layers)
    with pytest.raises(error, match=match):
        activation_patching(wrapped(), CLEAN, change(OTHERS["picture"]), layers)


def test_a_mask_that_hides_nothing() -> None:
    mask = {"attention_mask": torch.ones_like(CLEAN["input_ids"])}
    with_mask = activation_patching(
        wrapped(), {**CLEAN, **mask}, {**OTHERS["both"], **mask}, wrapped().text_encoder.encoder.layer
    )
    assert torch.equal(with_mask, patched())


@pytest.mark.parametrize(
    ("sites", "options", "error", "match"),
    [
        (lambda m: [], {}, ValueError, "no sites given"),
        (
            lambda m: [m.vision_model.embeddings],
            {},
            UnsupportedError,
            "output of model.vision_model.embeddings",
        ),
        (lambda m: m.text_encoder.encoder.layer[0].attention.self.query, {}, UnsupportedError, "query"),
        (lambda m: m.text_encoder.encoder.layer, {"heads": [0]}, UnsupportedError, "patching heads at"),
        (lambda m: m.text_encoder.encoder.layer, {"tokens": [9]}, ValueError, "there is no token 9"),
        (lambda m: m.text_encoder.encoder.layer, {"tokens": []}, ValueError, "no tokens given"),
        (
            lambda m: m.text_encoder.encoder.layer[0].attention.self,
            {"heads": [4]},
            ValueError,
            "there is no head 4",
        ),
        (
            lambda m: [m.text_encoder.encoder.layer[0], m.vision_model.encoder.layers[0]],
            {},
            ValueError,
            "different numbers of tokens",
        ),
        (
            lambda m: [m.text_encoder.encoder.layer[0], Site("text_encoder", 0, "hidden", 0)],
            {},
            TypeError,
            "there is a Site among envoys",
        ),
        (lambda m: [["hidden"]], {}, TypeError, "a cell is made of sites, not of str"),
        (lambda m: [Site("text_encoder", 0, "hidden", 0)], {"tokens": [1]}, ValueError, "go with envoys"),
        (lambda m: [Site("text_encoder", 9, "hidden", 0)], {}, ValueError, "has no layer 9"),
    ],
)
def test_sites_that_are_refused(sites: Any, options: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        activation_patching(wrapped(), CLEAN, OTHERS["picture"], sites(wrapped()), **options)


def test_models_that_are_refused() -> None:
    def refused(given: Any, error: type[Exception], match: str) -> None:
        with pytest.raises(error, match=match):
            activation_patching(given, CLEAN, OTHERS["picture"], wrapped().text_encoder.encoder.layer)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captioning = NNsight(BlipForConditionalGeneration(model().config))
        own = NNsight(deepcopy(model()))
        with torch.device("meta"):
            empty = NNsight(BlipForQuestionAnswering(model().config))
        half = NNsight(deepcopy(model()).bfloat16())
    refused(model(), TypeError, "must be wrapped by nnsight, not a BlipForQuestionAnswering")
    refused(wrapped().text_encoder, TypeError, "wraps a BlipTextModel")
    refused(captioning, TypeError, "wraps a BlipForConditionalGeneration")
    refused(own, ValueError, "is no envoy of this model")
    refused(empty, UnsupportedError, "load it with dispatch=True")
    refused(half, UnsupportedError, "bfloat16")
    with own.edit(inplace=True):
        own.text_encoder.encoder.layer[3].output[:] = 0
    refused(own, UnsupportedError, r"a model with edits is not supported here: clear_edits\(\) first")
    own.clear_edits()
    own._module.train()
    refused(own, UnsupportedError, r"a model in training mode is not supported here: call eval\(\)")
    assert own._module.training
    with pytest.raises(TypeError, match="not a str"):
        activation_patching(wrapped(), CLEAN, "none", wrapped().text_encoder.encoder.layer)
