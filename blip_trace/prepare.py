"""From what a user hands in to what the engine is given: pixels and ids, image states, corrupted inputs."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cost, engine, hooks
from .cache import Cache
from .corruption import Corrupted, Corruption, Edit, Original, corrupt
from .embedding import embed_patches, word_table
from .graphs import Graphs
from .inputs import Inputs
from .metrics import Reads
from .ops import OpSet
from .passes import budget
from .program import PatchEmbedding, Program
from .request import Grid
from .sites import Cell, Shape
from .task import Task

CACHED_BYTES = 2**28
"""Of encoded images."""

IMAGES_TOGETHER = 32
"""That a GPU encodes at most: they fill it."""


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
        """How many samples of an image to encode together."""
        ...

    @property
    def together(self) -> int:
        """How many images of several questions."""
        ...


@dataclass(frozen=True)
class HooksVision:
    """That of the unmodified model."""

    model: Any
    at_once: int = 1
    together: int = 1

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
    """That of the engine; `memory`: bytes of activations that it may take, and `graphs`, as in
    `engine.score`."""

    program: Program
    ops: OpSet
    memory: int | None
    graphs: Graphs | None

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Vision`."""
        return embed_patches(self.program.image, pixels.to(self.program.device))

    def encode(self, embedded: Tensor) -> Tensor:
        """See `Vision`."""
        return engine.encode_image(self.program, self.ops, embedded, self.graphs)

    @property
    def at_once(self) -> int:
        """See `Vision`."""
        image = self.program.image
        assert isinstance(image.embedding, PatchEmbedding)
        room = budget(self.program.device, self.memory, patches=False)
        return max(1, room // (len(image.embedding.positions) * cost.row_bytes(image)))

    @property
    def together(self) -> int:
        """See `Vision`. A CPU is as fast with one, and then an image's states do not hang on the others'."""
        return min(self.at_once, IMAGES_TOGETHER) if self.program.device.type == "cuda" else 1


class Preparer:
    """Prepares the questions of one model. Encoded images are cached."""

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._program = program
        self._inputs = inputs
        self._states = Cache[Tensor](CACHED_BYTES, lambda states: states.nbytes)
        self._keys = WeakTensorKeyDictionary()

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

    def task(
        self,
        vision: Vision,
        asked: Asked,
        corruption: Corruption | None,
        wanted: Wanted,
        image: Tensor | None = None,
    ) -> tuple[Task, str]:
        """What the engine is given, and what the corruption says it changed; None: nothing is corrupted.
        image: the image's states, if they were encoded before.

        Raises ValueError where the image stack is part of the trace but the corruption changes nothing before
        it, and whatever the corruption raises.
        """
        patches = wanted.patches
        if image is None and not patches:
            (image,) = self.encode(vision, [asked])
        made = Corrupted()
        if corruption is not None:
            made = corrupt(corruption, self._original(vision, asked, image))
            if patches and made.images is None:
                raise ValueError("nothing in the vision stack can be restored: the image is not corrupted")
        clean = vision.embed(asked.pixels)[0] if image is None else image
        task = Task(
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
        self._states.clear()

    def encode(self, vision: Vision, asked: Sequence[Asked]) -> list[Tensor]:
        """Image states [N, D] of each question's image, from the cache if they were seen before.

        Raises ValueError where they are not finite.
        """
        return self._states_of(vision, [own.pixels for own in asked])

    def _states_of(self, vision: Vision, pictures: Sequence[Tensor]) -> list[Tensor]:
        keys = self._hashed(pictures)
        known = {key: states for key in keys if (states := self._states.find(key)) is not None}
        new = {key: own for key, own in zip(keys, pictures, strict=True) if key not in known}
        left, most = list(new), vision.together
        while left:
            # in powers of two: few sizes, which come again
            size = 1 << (min(len(left), most).bit_length() - 1)
            own = left[:size]
            try:
                states = vision.encode(vision.embed(torch.cat([new[key] for key in own])))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                most = size // 2
                warnings.warn(f"out of memory: going on with {most} images at a time", stacklevel=2)
                continue
            left = left[size:]
            if not bool(torch.isfinite(states).all()):
                raise ValueError("the image encoder gives NaN or infinite embeddings for this image")
            for key, image in zip(own, states.unbind(), strict=True):
                known[key] = image.clone() if size > 1 else image  # else one would keep all in memory
                self._states.put(key, known[key])
        return [known[key] for key in keys]

    def _hashed(self, pictures: Sequence[Tensor]) -> list[bytes]:
        """A key for each image's pixel values; each tensor is read once, and several side by side."""
        new = [own for own in dict.fromkeys(pictures) if own not in self._keys]
        if len(new) > 1:
            with ThreadPoolExecutor() as threads:
                made = list(threads.map(_digest, new))
        else:
            made = [_digest(own) for own in new]
        for own, key in zip(new, made, strict=True):
            self._keys[own] = key
        return [self._keys[own] for own in pictures]

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

    def _original(self, vision: Vision, asked: Asked, encoded: Tensor | None) -> Original:
        """What a corruption may know of a question; encoded: its image's states, None where the image stack
        is part of the trace."""
        patches = encoded is None
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
            return vision.embed(pixels) if patches else self._states_of(vision, [pixels])[0][None]

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
            ids=ids,
            words=table[ids.to(table.device)],
            words_std=lambda: self._words_std,
            labels=self._inputs.labels(ids.tolist()),
            enter=enter,
            image=image,
            question=self._inputs.question_ids,
            embed=lambda other: table[other.to(table.device)],
            find=lambda phrase: self._inputs.find(phrase, ids),
        )


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).digest()
