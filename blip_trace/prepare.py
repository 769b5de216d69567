"""From what a user hands in to what the engine is given: pixels and ids, image states, corrupted inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .checks import Check, Checks
from .corrupting import Corrupted, Corruption, Edit, Original, corrupt
from .devices import send
from .embedding import word_table
from .inputs import Inputs
from .metrics import Reads
from .program import PatchEmbedding, Program
from .request import Grid
from .sites import Cell, Shape
from .task import Task
from .vision import Images, Vision


@dataclass(frozen=True)
class Asked:
    """A checked question: pixels [1, 3, H, W], text_ids [T], answer_ids [A] and foil_ids, or None; and the
    question as text."""

    pixels: Tensor
    text_ids: Tensor
    answer_ids: Tensor
    foil_ids: Tensor | None
    question: str


@dataclass(frozen=True)
class Prepared:
    """A question that is ready to be measured: its maps by (stack, kind), what the engine is given, and what
    the result says of its corruption."""

    asked: Asked
    grids: Mapping[tuple[str, str], Grid]
    task: Task
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Changed:
    """A question with cells that somebody chose: what the engine is given, which of its cells each of theirs
    is, and what the result says of it."""

    task: Task
    places: list[int]
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What is to be done with a question: cells, in which direction, what to read, and whether the image
    stack is part of the trace and takes its `patches`."""

    cells: tuple[Cell, ...]
    direction: str
    reads: Reads
    patches: bool


class Preparer:
    """Prepares the questions of one model. Encoded images are cached."""

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._program = program
        self._inputs = inputs
        self._images = Images()

    def shapes(self, asked: Asked) -> dict[str, Shape]:
        """What the stacks have for this question."""
        image = self._program.image
        tokens, _ = self._image_shape
        shapes = {image.name: Shape(tokens, len(image.layers), image.heads, 0, image.causal)}
        task = Task(asked.text_ids, asked.answer_ids, asked.pixels, None, ())
        for stack, length in zip(self._program.texts, task.job(self._program).tokens, strict=True):
            shapes[stack.name] = Shape(length, len(stack.layers), stack.heads, tokens, stack.causal)
            tokens = length
        return shapes

    def tasks(
        self,
        vision: Vision,
        asked: Sequence[Asked],
        corruptions: Sequence[Corruption | None],
        wanted: Sequence[Wanted],
    ) -> tuple[list[tuple[Task, str]], Check]:
        """What the engine is given for each question, and what its corruption says it changed; None: nothing
        is corrupted. Either all take patches or none. And what waits for a GPU to know that all numbers are
        finite.

        Raises, now or then, ValueError where numbers are not finite, where the image stack is part of the
        trace but the corruption changes nothing before it, and whatever the corruptions raise.
        """
        checks = Checks()
        images: Sequence[Tensor | None] = [None] * len(asked)
        if not any(own.patches for own in wanted):
            images = self._images.encode(vision, [own.pixels for own in asked], checks)
        ids = [own.text_ids for own in asked]
        words = self._words(torch.cat(ids)).split([len(own) for own in ids]) if ids else ()
        made = [
            self._task(vision, *own, checks)
            for own in zip(asked, corruptions, wanted, images, words, strict=True)
        ]
        return made, checks.begin()

    def _task(
        self,
        vision: Vision,
        asked: Asked,
        corruption: Corruption | None,
        wanted: Wanted,
        image: Tensor | None,
        words: Tensor,
        checks: Checks,
    ) -> tuple[Task, str]:
        """Of one question. image: its states, None where patches are taken; words [T, C]: its tokens'
        embeddings."""
        made = Corrupted()
        if corruption is not None:
            made = corrupt(corruption, self._original(vision, asked, image, words, checks), checks)
            if wanted.patches and made.images is None:
                raise ValueError("nothing in the vision stack can be restored: the image is not corrupted")
        clean = vision.embed([asked.pixels])[0] if image is None else image
        task = Task(
            asked.text_ids,
            asked.answer_ids,
            clean,
            made.images,
            wanted.cells,
            wanted.direction,
            made.words,
            wanted.patches,
            asked.foil_ids,
            wanted.reads,
        )
        return task, made.note

    def outline(self, asked: Asked, samples: int, wanted: Wanted) -> Task:
        """A task of the same shape as that of a question whose image is corrupted, without its numbers."""
        states = torch.empty(()).expand(samples, *self._image_shape)
        return Task(
            asked.text_ids,
            asked.answer_ids,
            states[0],
            states,
            wanted.cells,
            wanted.direction,
            patches=wanted.patches,
        )

    def forget_images(self) -> None:
        """Drop all encoded images."""
        self._images.forget()

    @property
    def _image_shape(self) -> tuple[int, int]:
        image = self._program.image
        assert isinstance(image.embedding, PatchEmbedding)
        return len(image.embedding.positions), image.width

    @property
    def _word_table(self) -> Tensor:
        return word_table(self._program.texts[0])

    @cached_property
    def _words_std(self) -> float:
        """Of all word embeddings; a pass over the whole table, which only noise in multiples of it needs."""
        return float(self._word_table.float().std())

    def _words(self, ids: Tensor) -> Tensor:
        """Embeddings [T, C] of tokens [T]."""
        return self._word_table[send(ids, self._word_table.device)]

    def _original(
        self, vision: Vision, asked: Asked, encoded: Tensor | None, words: Tensor, checks: Checks
    ) -> Original:
        """What a corruption may know of a question; encoded: its image's states, None where the image stack
        is part of the trace."""
        patches = encoded is None

        def enter(pixels: Tensor, edit: Edit | None) -> Tensor:
            """Embedded patches, or the states made of them, as many at once as memory allows."""
            made = []
            for first in range(0, len(pixels), vision.at_once):
                samples = slice(first, first + vision.at_once)
                embedded = vision.embed([pixels[samples].float()])
                if edit is not None:
                    embedded = edit(embedded, samples)
                made.append(embedded if patches else vision.encode(embedded))
            return torch.cat(made)

        def image(given: Any) -> Tensor:
            pixels = self._inputs.pixels(given)
            if patches:
                return vision.embed([pixels])
            return self._images.encode(vision, [pixels], checks)[0][None]

        def states() -> Tensor:
            if encoded is None:
                raise ValueError(
                    "the vision stack lies before the image embeddings that this corruption changes: corrupt "
                    "the pixels or the patches (PixelNoise, PatchNoise, ImageSwap, ImageRegion)"
                )
            return encoded

        return Original(
            pixels=asked.pixels,
            states=states,
            image_shape=self._image_shape,
            ids=asked.text_ids,
            words=words,
            words_std=lambda: self._words_std,
            labels=self._inputs.labels(asked.text_ids.tolist()),
            enter=enter,
            image=image,
            question=self._inputs.question_ids,
            embed=self._words,
            find=lambda phrase: self._inputs.find(phrase, asked.text_ids),
        )
