"""From what a user hands in to what the engine is given: pixels and ids, image states, corrupted inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from . import cost, engine, hooks
from .cache import Cache
from .corruption import Corrupted, Corruption, Edit, Original, corrupt
from .embedding import embed_patches, word_table
from .inputs import Inputs
from .metrics import Reads
from .ops import OpSet
from .program import PatchEmbedding, Program
from .request import Grid
from .sites import Cell, Shape

CACHED_BYTES = 2**28
"""Of encoded images."""


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
    task: engine.Task
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Changed:
    """A question with cells that somebody chose: what the engine is given, which of its cells each of theirs
    is, and what the result says of it."""

    task: engine.Task
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


class Vision(Protocol):
    """The image encoder of a backend, in two steps."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Embedded patches [B, N, C] of pixel values [B, 3, H, W]."""
        ...

    def encode(self, embedded: Tensor) -> Tensor:
        """Image states [B, N, D] of those."""
        ...

    @property
    def at_once(self) -> int:
        """How many images to encode together."""
        ...


@dataclass(frozen=True)
class HooksVision:
    """That of the unmodified model."""

    model: Any
    at_once: int = 1

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Vision`."""
        with torch.inference_mode():
            return hooks.embed_image(self.model, pixels)

    def encode(self, embedded: Tensor) -> Tensor:
        """See `Vision`."""
        with torch.inference_mode():
            return hooks.encode_image(self.model, embedded)


@dataclass(frozen=True)
class EngineVision:
    """That of the engine; `memory`: bytes of activations that it may take, as in `engine.score`."""

    program: Program
    ops: OpSet
    memory: int | None

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Vision`."""
        return embed_patches(self.program.image, pixels)

    def encode(self, embedded: Tensor) -> Tensor:
        """See `Vision`."""
        return engine.encode_image(self.program, self.ops, embedded)

    @property
    def at_once(self) -> int:
        """See `Vision`."""
        image = self.program.image
        assert isinstance(image.embedding, PatchEmbedding)
        memory = self.memory or engine.DEFAULT_MEMORY
        return max(1, memory // (len(image.embedding.positions) * cost.row_bytes(image)))


class Preparer:
    """Prepares the questions of one model. Encoded images are cached."""

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._program = program
        self._inputs = inputs
        self._states = Cache[Tensor](CACHED_BYTES, lambda states: states.nbytes)

    def shapes(self, asked: Asked) -> dict[str, Shape]:
        """What the stacks have for this question."""
        image = self._program.image
        tokens, _ = self._image_shape
        shapes = {image.name: Shape(tokens, len(image.layers), image.heads, 0, image.causal)}
        task = engine.Task(asked.text_ids, asked.answer_ids, asked.pixels, None, ())
        for stack, length in zip(self._program.texts, task.job(self._program).tokens, strict=True):
            shapes[stack.name] = Shape(length, len(stack.layers), stack.heads, tokens, stack.causal)
            tokens = length
        return shapes

    def task(
        self, vision: Vision, asked: Asked, corruption: Corruption | None, wanted: Wanted
    ) -> tuple[engine.Task, str]:
        """What the engine is given, and what the corruption says it changed; None: nothing is corrupted.

        Raises ValueError where the image stack is part of the trace but the corruption changes nothing before
        it, and whatever the corruption raises.
        """
        patches = wanted.patches
        made = Corrupted()
        if corruption is not None:
            made = corrupt(corruption, self._original(vision, asked, patches))
            if patches and made.images is None:
                raise ValueError("nothing in the vision stack can be restored: the image is not corrupted")
        clean = vision.embed(asked.pixels)[0] if patches else self._image_states(vision, asked.pixels)
        task = engine.Task(
            asked.text_ids,
            asked.answer_ids,
            clean,
            made.images,
            wanted.cells,
            wanted.direction,
            made.words,
            patches,
            asked.foil_ids,
            wanted.reads,
        )
        return task, made.note

    def outline(self, asked: Asked, samples: int, wanted: Wanted) -> engine.Task:
        """A task of the same shape as that of a question whose image is corrupted, without its numbers."""
        states = torch.empty(()).expand(samples, *self._image_shape)
        return engine.Task(
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
        self._states.clear()

    def _image_states(self, vision: Vision, pixels: Tensor) -> Tensor:
        """Image states [N, D] of pixel values [1, 3, H, W], from the cache if they were seen before."""
        key = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()

        def encode() -> Tensor:
            states = vision.encode(vision.embed(pixels))[0]
            if not bool(torch.isfinite(states).all()):
                raise ValueError("the image encoder gives NaN or infinite embeddings for this image")
            return states

        return self._states.get(key, encode)

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

    def _original(self, vision: Vision, asked: Asked, patches: bool) -> Original:
        """What a corruption may know of a question."""
        table, ids = self._word_table, asked.text_ids

        def enter(pixels: Tensor, edit: Edit | None) -> Tensor:
            """Embedded patches, or the states made of them, as many at once as memory allows."""
            made = []
            for first in range(0, len(pixels), vision.at_once):
                samples = slice(first, first + vision.at_once)
                embedded = vision.embed(pixels[samples].float())
                if edit is not None:
                    embedded = edit(embedded, samples)
                made.append(embedded if patches else vision.encode(embedded))
            return torch.cat(made)

        def image(given: Any) -> Tensor:
            pixels = self._inputs.pixels(given)
            return vision.embed(pixels) if patches else self._image_states(vision, pixels)[None]

        def states() -> Tensor:
            if patches:
                raise ValueError(
                    "the vision stack lies before the image embeddings that this corruption changes: corrupt "
                    "the pixels or the patches (PixelNoise, PatchNoise, ImageSwap, ImageRegion)"
                )
            return self._image_states(vision, asked.pixels)

        return Original(
            pixels=asked.pixels,
            states=states,
            image_shape=self._image_shape,
            ids=ids,
            words=table[ids],
            words_std=lambda: self._words_std,
            labels=self._inputs.labels(ids.tolist()),
            enter=enter,
            image=image,
            question=self._inputs.question_ids,
            embed=lambda other: table[other],
            find=lambda phrase: self._inputs.find(phrase, ids),
        )
