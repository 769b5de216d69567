"""ROME's functions on this engine against ROME's own way: a clean and ten noisy rows through the whole model,
hooks, for every cell.

The small shipped model. The loop is timed on one cell (each costs it the same) and scaled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from bench_trace import interleave
from conftest import Gate
from torch import Tensor

from blip_trace import hooks, shipped_model
from blip_trace.compat import rome
from blip_trace.compat.models import tracer_of
from blip_trace.scenes import random_scene

IMAGE = random_scene(Random(3)).render(64)
QUESTION, SUBJECT = "what shape is at the bottom center", "bottom center"
TOKENS, LAYERS, SAMPLES = 9, 4, 10
NOISE = 0.5


@cache
def mt() -> rome.ModelAndTokenizer:
    return rome.ModelAndTokenizer(shipped_model())


@cache
def inputs() -> dict[str, Tensor]:
    return rome.make_inputs(mt().processor, [QUESTION] * (SAMPLES + 1), image=IMAGE)


@cache
def encoded() -> Tensor:
    """Image states [1, N, D]."""
    with torch.no_grad():
        states: Tensor = mt().model.vision_model(pixel_values=inputs()["pixel_values"][:1]).last_hidden_state
    return states


@torch.no_grad()
def one_cell(layers: Sequence[int], kind: str, states: Tensor | None = None) -> Tensor:
    """A cell as the tool does it: the picture encoded in every row, or `states` given."""
    model, ids = mt().model, inputs()["input_ids"]
    if states is None:
        images = model.vision_model(pixel_values=inputs()["pixel_values"]).last_hidden_state
    else:
        images = states.expand(len(ids), -1, -1)

    def mix(output: Tensor) -> Tensor:
        output = output.clone()
        drawn = np.random.RandomState(1).randn(SAMPLES, 2, output.shape[2])
        output[1:, 6:8] += NOISE * torch.from_numpy(drawn)
        return output

    def patch(output: Tensor) -> Tensor:
        output = output.clone()
        output[1:, 7] = output[0, 7]
        return output

    edits: dict[torch.nn.Module, hooks.Edit] = {model.text_encoder.embeddings.word_embeddings: mix}
    edits.update((hooks.site_module(model, "text_encoder", layer, kind), patch) for layer in layers)
    with hooks.editing(edits):
        question = model.text_encoder(input_ids=ids, encoder_hidden_states=images)
        begin = torch.full((len(ids), 1), model.decoder_start_token_id)
        logits = model.text_decoder(input_ids=begin, encoder_hidden_states=question.last_hidden_state).logits
    return logits[1:, -1].softmax(-1).mean(0)[22]


@pytest.mark.parametrize(("kind", "layers", "own"), [(None, [1], "hidden"), ("mlp", range(4), "mlp")])
def test_rome(
    benchmark: Any, gate: Gate, quick: bool, kind: str | None, layers: Sequence[int], own: str
) -> None:
    def ours() -> None:
        tracer_of(mt().model).forget_images()
        rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, SAMPLES, NOISE, kind=kind, image=IMAGE)

    states = encoded()
    others = {
        "cell": lambda: one_cell(layers, own),
        "encoded": lambda: one_cell(layers, own, states),
    }
    taken, loops = interleave(benchmark, 5 if quick else 21, ours, others)
    cells, name = TOKENS * LAYERS, f"rome, shipped model, {kind or 'whole states'}"
    gate(
        {
            f"{name}: the tool's loop": loops["cell"] * cells / taken,
            f"{name}: loop, picture encoded once": loops["encoded"] * cells / taken,
        }
    )
