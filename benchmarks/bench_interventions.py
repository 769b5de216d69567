"""Every kind of intervention in one pass, against the lean loop over hooks and against plain restoration.

BLIP-VQA-base size, float32, random weights, one sample. The hooks' loop is timed on one cell (each costs it
the same) and scaled; what it does once, the clean and the corrupted run, is not counted against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from baselines import lean_hooks
from bench_trace import interleave
from conftest import Gate
from subject import TOKENS, Subject, blip_base, grid
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from blip_trace import attribution, engine
from blip_trace.embedding import embed_patches
from blip_trace.lowering.blip import Blip, lower
from blip_trace.ops import get_ops
from blip_trace.program import Program
from blip_trace.sites import HEAD_KINDS, Cell, Shape, grid_cells, patch_groups

ENCODER = "text_encoder"
EVERY_METRIC = ("probability", "log_probability", "logit", "kl_divergence", "rank")


@dataclass(frozen=True)
class Job:
    """A model and what to do with it."""

    model: Blip
    program: Program
    task: engine.Task

    def score(self) -> None:
        """By the engine; the image is encoded already."""
        engine.score(self.program, get_ops("native"), [self.task], None)


@cache
def subject() -> Subject:
    return Subject(blip_base("float32"), samples=1)


def job(cells: Sequence[Cell], **changes: Any) -> Job:
    """These cells of the common question."""
    base = subject()
    return Job(base.model, base.program, replace(base.task, cells=tuple(cells), **changes))


def states(kind: str = "hidden", window: int = 1, sever: Sequence[str] = ()) -> list[Cell]:
    """The 108 cells of a kind in the question encoder."""
    shape = Shape(TOKENS, 12, 12, source=577, causal=False)
    return grid_cells(ENCODER, kind, [(token,) for token in range(TOKENS)], shape, window, sever)


def heads() -> Job:
    return job([cell for kind in HEAD_KINDS for cell in grid(subject().model, ENCODER, kind, [TOKENS - 1])])


def corrupted_words() -> Job:
    words = subject().program.texts[0].embedding.words[subject().ids][None]  # type: ignore[union-attr]
    return job(states(), corrupted=None, words=words + torch.randn_like(words))


def other_image() -> Job:
    return job(states(), corrupted=subject().encoded_by_model().flip(1))


def knockouts() -> Job:
    """Each token blind to a quarter of the patches, in windows of three layers."""
    return job(
        [
            Cell.knockout(ENCODER, "cross_attn", [token], range(1, 145), range(layer, min(12, layer + 3)))
            for token in range(TOKENS)
            for layer in range(12)
        ]
    )


def image_stack() -> Job:
    """Blocks of 8 x 8 patches and the class token, every third layer."""
    shape = Shape(577, 12, 12, source=0, causal=False)
    cells = grid_cells("vision", "hidden", list(patch_groups(24, 8).values()), shape)
    embedded = embed_patches(subject().program.image, subject().pixels)
    noisy = embedded + torch.randn_like(embedded)
    return job(cells[::3], clean=embedded[0], corrupted=noisy, patches=True)


def with_text_stack(model: Blip, answer: Sequence[int], stack: str) -> Job:
    """A captioning or matching model of the same size: all states of its text stack."""
    with torch.no_grad():
        program = lower(model)
    task = replace(subject().task, answer_ids=torch.tensor(answer), cells=())
    (tokens,) = task.job(program).tokens
    shape = Shape(tokens, 12, 12, source=577, causal=program.texts[0].causal)
    cells = grid_cells(stack, "hidden", [(token,) for token in range(tokens)], shape)
    return Job(model, program, replace(task, cells=tuple(cells)))


def caption() -> Job:
    model = BlipForConditionalGeneration(subject().model.config).eval()
    return with_text_stack(model, range(100, 109), "text_decoder")


def match() -> Job:
    model = BlipForImageTextRetrieval(subject().model.config).eval()
    return with_text_stack(model, [1], ENCODER)


AGAINST_HOOKS: dict[str, Callable[[], Job]] = {
    "heads": heads,
    "words corrupted": corrupted_words,
    "another image": other_image,
    "into the clean run": lambda: job(states(), direction="noise"),
    "windows of three": lambda: job(states(window=3)),
    "severed mlp": lambda: job(states(sever=("mlp",))),
    "knockout": knockouts,
    "all metrics": lambda: job(states(), reads="vocabulary"),
    "image stack": image_stack,
    "caption": caption,
    "match": match,
}
PER_CELL = ("another image", "into the clean run", "windows of three")
"""What must cost no more than 1.2 times as much as plain restoration, cell by cell."""


def loop_over(made: Job) -> dict[str, Callable[[], object]]:
    """The hooks' loop with one cell and with none."""
    some = made.task.cells[len(made.task.cells) // 2 :][:1]
    return {
        "one cell": lambda: lean_hooks(made.model, made.task, some),
        "no cells": lambda: lean_hooks(made.model, made.task, ()),
    }


@pytest.mark.parametrize("name", AGAINST_HOOKS)
def test_intervention(benchmark: Any, gate: Gate, quick: bool, name: str) -> None:
    made = AGAINST_HOOKS[name]()
    others = loop_over(made)
    if name in PER_CELL:
        others["plain"] = job(states()).score
    ours, taken = interleave(benchmark, 1 if quick else 3, made.score, others)
    cells = len(made.task.cells)
    found = {f"base float32, {name}: lean hook loop": (taken["one cell"] - taken["no cells"]) * cells / ours}
    if name in PER_CELL:
        found[f"base float32, {name}: plain restoration, per cell"] = taken["plain"] / ours
    gate(found)


@pytest.mark.parametrize("name", ["attribution", "attribution of the image stack"])
def test_attribution(benchmark: Any, gate: Gate, quick: bool, name: str) -> None:
    """One backward pass for the whole map, against doing its cells by hooks."""
    made = job(states()) if name == "attribution" else image_stack()

    def estimate() -> None:
        attribution.estimate(made.model, made.task, ("probability",), steps=1)

    ours, taken = interleave(benchmark, 1 if quick else 3, estimate, loop_over(made))
    cells = len(made.task.cells)
    gate({f"base float32, {name}: lean hook loop": (taken["one cell"] - taken["no cells"]) * cells / ours})
