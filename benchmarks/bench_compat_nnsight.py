"""Activation patching by a loop of nnsight's traces and through `compat.nnsight`, on the shipped model.

The loop is that of nnsight's documentation: a trace of the clean run, and one of the corrupted run for every
cell.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from bench_trace import interleave
from conftest import Gate
from nnsight import NNsight

from blip_trace import Tracer, shipped_model
from blip_trace.compat.nnsight import activation_patching
from blip_trace.scenes import COLORS, random_scene

TOKENS, HEADS, WIDTH = 9, 4, 32
KINDS = ("states", "heads")


@cache
def subject() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The model, a clean and a corrupted input: a question about a scene in its own and in other colours."""
    tracer = Tracer.from_pretrained(shipped_model())
    scene = random_scene(Random(24))
    other = dict(zip(COLORS, list(COLORS)[1:] + list(COLORS)[:1], strict=True))
    recoloured = replace(scene, objects=tuple(replace(one, color=other[one.color]) for one in scene.objects))
    start = torch.tensor([[tracer.model.decoder_start_token_id]])
    clean, corrupted = (
        {
            **tracer.processor(own.render(64), "what is the color of the triangle", return_tensors="pt"),
            "decoder_input_ids": start,
        }
        for own in (scene, recoloured)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return NNsight(tracer.model), clean, corrupted


def envoys(kind: str) -> list[Any]:
    """Layers, or the attentions whose heads are patched."""
    layers = subject()[0].text_encoder.encoder.layer
    return list(layers) if kind == "states" else [layer.crossattention.E_output.dense for layer in layers]


def heads(kind: str) -> Sequence[int] | None:
    """All of them, or none."""
    return None if kind == "states" else range(HEADS)


@torch.no_grad()
def loop(kind: str) -> torch.Tensor:
    """One trace for each cell."""
    model, clean, corrupted = subject()
    found = []
    for envoy in envoys(kind):
        with model.trace(**clean):
            state = (envoy.output if kind == "states" else envoy.input).clone().save()
        for token in range(TOKENS):
            for head in heads(kind) or (None,):
                with model.trace(**corrupted):
                    if head is None:
                        envoy.output[:, token] = state[:, token]
                    else:
                        own = slice(head * WIDTH, head * WIDTH + WIDTH)
                        envoy.input[:, token, own] = state[:, token, own]
                    logits = model.text_decoder.output.logits.save()
                found.append(logits[0])
    return torch.stack(found)


def patched(kind: str) -> torch.Tensor:
    """The same in one pass."""
    model, clean, corrupted = subject()
    return activation_patching(model, clean, corrupted, envoys(kind), heads=heads(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_grid(benchmark: Any, gate: Gate, quick: bool, kind: str) -> None:
    own, theirs = patched(kind).flatten(0, -3).softmax(-1), loop(kind).softmax(-1)
    assert (own - theirs).abs().max() <= 1e-5
    ours, taken = interleave(
        benchmark, 3 if quick else 7, lambda: patched(kind), {"nnsight": lambda: loop(kind)}
    )
    gate({f"shipped model, nnsight {kind}: loop of traces": taken["nnsight"] / ours})
