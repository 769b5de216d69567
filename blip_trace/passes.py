"""Which questions go through the model together, and which are too large for one pass and go in parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import cost
from .program import Program
from .runs import Job
from .task import Scores, Task

DEFAULT_MEMORY = 128 * 2**20
"""Bytes of activations that a pass may take unless told otherwise: larger passes are hardly faster."""

DEFAULT_IMAGE_MEMORY = 512 * 2**20
"""The same where the image stack is traced: its runs are as large as the picture, and every pass takes the
clean and the corrupted run along."""

GPU_SHARE = 0.25
"""The same on a GPU: of the memory that is free."""

GPU_MEMORY = 4 * 2**30
"""And at most so much of it, for the same reason."""


def budget(device: torch.device, memory: int | None, patches: bool) -> int:
    """Bytes of activations that a pass may take on a device: `memory`, or as the constants above."""
    if memory is not None:
        return memory
    if device.type == "cuda":
        return min(int(GPU_SHARE * _free(device)), GPU_MEMORY)
    return DEFAULT_IMAGE_MEMORY if patches else DEFAULT_MEMORY


@lru_cache
def _free(device: torch.device) -> int:
    """Bytes that were free on a GPU when this was first asked: what passes themselves keep there is no reason
    for smaller ones, and equal passes are to come again."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


class Part(NamedTuple):
    """Of task `number` the samples from `sample` on and the cells from `cell` on, as a task of its own."""

    number: int
    task: Task
    sample: int = 0
    cell: int = 0


def pack(program: Program, parts: Iterable[Part], memory: int | None, halvings: int = 0) -> list[list[Part]]:
    """Parts that go through the model together, pass after pass, within a budget halved so often.

    On the CPU in order, as many as have room. On a GPU a pass is captured as a graph and its shape should
    come again: so equal shapes go together, in powers of two.

    A part that is too large for a pass is split, by samples first and then by cells; every piece takes its
    clean and corrupted runs along, so the numbers stay the same but for rounding.
    """
    parts = list(parts)
    device = program.device
    rooms = {
        patches: budget(device, memory, patches) >> halvings
        for patches in {part.task.patches for part in parts}
    }
    together = _alike if device.type == "cuda" else _in_order
    return list(together(program, parts, rooms))


def _in_order(program: Program, parts: Sequence[Part], rooms: dict[bool, int]) -> Iterator[list[Part]]:
    packed: list[Part] = []
    taken = 0
    for part in parts:
        room, each = rooms[part.task.patches], _run_bytes(program, part.task)
        for piece in _split(part, max(2, room // each)):
            needed = each * _runs(piece.task)
            if packed and (taken + needed > room or packed[0].task.patches != piece.task.patches):
                yield packed
                packed, taken = [], 0
            packed.append(piece)
            taken += needed
    yield packed


def _alike(program: Program, parts: Sequence[Part], rooms: dict[bool, int]) -> Iterator[list[Part]]:
    by_shape: dict[tuple[bool, Job], list[Part]] = defaultdict(list)
    for part in parts:
        by_shape[part.task.patches, part.task.job(program)].append(part)
    for (patches, _), equal in by_shape.items():
        room, each = rooms[patches], _run_bytes(program, equal[0].task)
        at_once = room // (each * _runs(equal[0].task))
        if not at_once:
            for part in equal:
                yield from ([piece] for piece in _split(part, max(2, room // each)))
            continue
        first = 0
        while first < len(equal):
            size = 1 << (min(at_once, len(equal) - first).bit_length() - 1)
            yield equal[first : first + size]
            first += size


def can_shrink(parts: Sequence[Part]) -> bool:
    """Whether a smaller budget would make smaller passes of these."""
    return len(parts) > 1 or parts[0].task.samples > 1 or len(parts[0].task.cells) > 1


def merge(task: Task, parts: Sequence[tuple[Part, Scores]]) -> Scores:
    """What was read of a task, from what was read of its parts."""
    first = parts[0][1]
    if len(parts) == 1:
        return first
    samples, cells = task.samples, len(task.cells)

    def corrupted(name: str) -> Tensor:
        whole = first.corrupted[name].new_empty(samples, *first.corrupted[name].shape[1:])
        for part, scores in reversed(parts):  # those of the same samples repeat their corrupted runs
            whole[part.sample : part.sample + part.task.samples] = scores.corrupted[name]
        return whole

    def patched(name: str) -> Tensor:
        whole = first.patched[name].new_empty(samples, cells, *first.patched[name].shape[2:])
        for (_, own, sample, cell), scores in parts:
            whole[sample : sample + own.samples, cell : cell + len(own.cells)] = scores.patched[name]
        return whole

    return Scores(
        answer_ids=first.answer_ids,
        clean=first.clean,
        corrupted={name: corrupted(name) for name in first.clean},
        patched={name: patched(name) for name in first.clean},
    )


def _runs(task: Task) -> int:
    return 1 + task.samples * (1 + len(task.cells))


def _run_bytes(program: Program, task: Task) -> int:
    """Bytes of activations that each run of a task takes."""
    tokens = task.job(program).tokens
    largest = max(n * cost.row_bytes(stack) for n, stack in zip(tokens, program.texts, strict=True))
    if task.patches:
        largest = max(largest, len(task.clean) * cost.row_bytes(program.image))
    return largest


def _split(part: Part, runs: int) -> Iterator[Part]:
    """Pieces of a part of at most `runs` runs each, the clean one not counted."""
    number, task, sample, cell = part
    cells = len(task.cells)
    samples = runs // (1 + cells)
    if samples:
        for first in range(0, task.samples, samples):
            yield Part(number, task.part(first, first + samples), sample + first, cell)
        return
    for own in range(task.samples):
        one = task.part(own, own + 1)
        for first in range(0, cells, runs - 1):
            fewer = replace(one, cells=task.cells[first : first + runs - 1])
            yield Part(number, fewer, sample + own, cell + first)
