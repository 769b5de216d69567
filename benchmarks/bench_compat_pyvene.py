"""Grids of interchange interventions by pyvene itself and through `compat.pyvene`, on the shipped model.

pyvene's own loop makes an object for each layer and a call for each token, as its tutorials do; every call
runs the source and the base through the whole model.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import pyvene
import torch
from bench_trace import interleave
from conftest import Gate
from pyvene.models.blip.modelings_blip import BlipWrapper

from blip_trace import Tracer, shipped_model
from blip_trace.compat import pyvene as pv
from blip_trace.scenes import COLORS, random_scene

LAYERS, TOKENS, HEADS = 4, 9, 4


class Wrapper(BlipWrapper):  # type: ignore[misc]
    """With what pyvene asks for and its own wrapper lacks."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@cache
def subject() -> tuple[Wrapper, dict[str, Any], dict[str, Any]]:
    """The model, a base and a source: a question about a scene in other colours, and in its own."""
    tracer = Tracer.from_pretrained(shipped_model())
    for table in (pyvene.type_to_module_mapping, pyvene.type_to_dimension_mapping):
        table[Wrapper] = dict(table[BlipWrapper])
    scene = random_scene(Random(24))
    other = dict(zip(COLORS, list(COLORS)[1:] + list(COLORS)[:1], strict=True))
    recoloured = replace(scene, objects=tuple(replace(one, color=other[one.color]) for one in scene.objects))
    base, source = (
        tracer.processor(own.render(64), "what is the color of the triangle", return_tensors="pt")
        for own in (recoloured, scene)
    )
    return Wrapper(tracer.model), base, source


def configs(component: str) -> list[Any]:
    """One for each layer."""
    return [
        pyvene.IntervenableConfig(
            [pyvene.RepresentationConfig(layer, f"model_text_enc.encoder.layer[{layer}].{component}.output")]
        )
        for layer in range(LAYERS)
    ]


LOCATIONS = [{"sources->base": token} for token in range(TOKENS)]


def loop(component: str, package: Any) -> torch.Tensor:
    """The tutorials' loop with pyvene, or with what stands in for it."""
    model, base, source = subject()
    found = []
    for config in configs(component):
        made = package.IntervenableModel(config, model)
        found += [made(base, [source], location)[1]["decoder_logits"] for location in LOCATIONS]
    return torch.cat(found)


def grid(component: str) -> torch.Tensor:
    """The same in one pass."""
    model, base, source = subject()
    rows = pv.interchange(model, configs(component), base, [source], LOCATIONS)
    return torch.cat([call[1]["decoder_logits"] for row in rows for call in row])


@pytest.mark.parametrize("component", ["output", "crossattention.output.dense"])
def test_grid(benchmark: Any, gate: Gate, quick: bool, component: str) -> None:
    own, theirs = grid(component).softmax(-1), loop(component, pyvene).softmax(-1)
    assert (own - theirs).abs().max() <= 1e-5
    others = {"pyvene": lambda: loop(component, pyvene), "calls": lambda: loop(component, pv)}
    ours, taken = interleave(benchmark, 3 if quick else 7, lambda: grid(component), others)
    gate(
        {
            f"shipped model, pyvene {component}: pyvene's own loop": taken["pyvene"] / ours,
            f"shipped model, pyvene {component}: pyvene's own loop, call by call": taken["pyvene"]
            / taken["calls"],
        }
    )
