"""NOTICE's functions on this engine against NOTICE's own way: three rows through the whole model, hooks, for
every cell, and a job for every head.

The small shipped model, as everything else here that calls a processor. The loop is timed on one cell (each
costs it the same) and scaled. It is spared the attention maps that the tool asks the model for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from bench_trace import interleave
from conftest import Gate
from torch import Tensor

from blip_trace import Tracer, hooks, shipped_model
from blip_trace.compat import notice
from blip_trace.compat.models import tracer_of
from blip_trace.scenes import random_scene

CLEAN, CORRUPT = (random_scene(Random(seed)).render(64) for seed in (3, 4))
QUESTION = "what shape is at the bottom center"
TOKENS, LAYERS, HEADS = 9, 4, 4
KIND = "crossattention_block"


@cache
def subject() -> tuple[Any, Any, tuple[int, int]]:
    """Model, processor and the tokens of two answers."""
    made = Tracer.from_pretrained(shipped_model())
    tokenizer = made.processor.tokenizer
    correct, incorrect = (tokenizer(word).input_ids[1] for word in ("circle", "square"))
    return made.model, made.processor, (correct, incorrect)


@cache
def encoded() -> Tensor:
    """Image states [3, N, D] of clean, corrupt and corrupt."""
    model, processor, _ = subject()
    pixels = processor.image_processor([CLEAN, CORRUPT, CORRUPT], return_tensors="pt").pixel_values
    with torch.no_grad():
        states: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
    return states


@torch.no_grad()
def one_cell(states: Tensor | None = None, head: int | None = None) -> Tensor:
    """A cell as the tool does it: images prepared and encoded, or `states` given; its four numbers."""
    model, processor, (correct, incorrect) = subject()
    if states is None:
        inputs = processor(images=[CLEAN, CORRUPT, CORRUPT], text=[QUESTION] * 3, return_tensors="pt")
        images = model.vision_model(pixel_values=inputs.pixel_values).last_hidden_state
    else:
        inputs, images = processor(text=[QUESTION] * 3, return_tensors="pt"), states

    def patch(output: Tensor) -> Tensor:
        output = output.clone()
        rows = output.unflatten(2, (HEADS, -1))
        part = slice(None) if head is None else head
        rows[2, 6, part] = rows[0, 6, part]
        return output

    with hooks.editing({hooks.site_module(model, "text_encoder", 1, "cross_attn_head"): patch}):
        question = model.text_encoder(input_ids=inputs.input_ids, encoder_hidden_states=images)
        begin = torch.full((3, 1), model.decoder_start_token_id)
        logits = model.text_decoder(input_ids=begin, encoder_hidden_states=question.last_hidden_state).logits[
            :, -1
        ]
    p = logits.softmax(-1)[:, correct]
    clean, corrupt, patched = logits[:, correct] - logits[:, incorrect]
    return torch.stack((p[2], p[2] - p[1], patched - corrupt, (patched - corrupt) / (clean - corrupt)))


def block() -> object:
    """The map of a kind; the images are encoded anew."""
    model, processor, answers = subject()
    tracer_of(model, processor).forget_images()
    inputs = (QUESTION, CLEAN, CORRUPT, answers, "image", 0, LAYERS, "text_encoder", KIND)
    return notice.calculate_hidden_flow(model, processor, *inputs)


def heads() -> object:
    """The maps of all heads, in one pass."""
    model, processor, answers = subject()
    tracer_of(model, processor).forget_images()
    inputs = (QUESTION, CLEAN, CORRUPT, answers, "image", 0, LAYERS, "text_encoder", KIND)
    return notice.calculate_head_flows(model, processor, *inputs)


JOBS: dict[str, tuple[Callable[[], object], int, int | None]] = {
    "a block": (block, TOKENS * LAYERS, None),
    "all heads": (heads, TOKENS * LAYERS * HEADS, 2),
}


@pytest.mark.parametrize("name", JOBS)
def test_notice(benchmark: Any, gate: Gate, quick: bool, name: str) -> None:
    ours, cells, head = JOBS[name]
    states = encoded()
    others = {"cell": lambda: one_cell(head=head), "encoded": lambda: one_cell(states, head)}
    taken, loops = interleave(benchmark, 5 if quick else 21, ours, others)
    gate(
        {
            f"notice, shipped model, {name}: the tool's loop": loops["cell"] * cells / taken,
            f"notice, shipped model, {name}: loop, images encoded once": loops["encoded"] * cells / taken,
        }
    )
