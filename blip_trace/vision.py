"""The image encoder of a backend, and what it made of images that were seen before."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import cost, engine, hooks
from .cache import Cache
from .checks import Checks
from .devices import send_all
from .embedding import embed_patches
from .graphs import Graphs
from .ops import OpSet
from .passes import budget
from .program import PatchEmbedding, Program
from .threads import side_by_side

CACHED_BYTES = 2**28
"""Of encoded images."""

IMAGES_TOGETHER = 32
"""That a GPU encodes at most: they fill it."""


class Vision(Protocol):
    """The image encoder of a backend, in two steps."""

    def embed(self, pixels: Sequence[Tensor]) -> Tensor:
        """Embedded patches [B, N, C] of pixel values on the CPU, [b, 3, H, W] each."""
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

    def embed(self, pixels: Sequence[Tensor]) -> Tensor:
        """See `Vision`."""
        with torch.inference_mode():
            return hooks.embed_image(self.model, send_all(pixels, self.model.device))

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

    def embed(self, pixels: Sequence[Tensor]) -> Tensor:
        """See `Vision`."""
        return embed_patches(self.program.image, send_all(pixels, self.program.device))

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


class Encoded(NamedTuple):
    """An image's states [N, D], and whether they are finite, bool []."""

    states: Tensor
    finite: Tensor


class Images:
    """The states of images, kept for those that come again."""

    def __init__(self) -> None:
        self._known = Cache[Encoded](CACHED_BYTES, lambda own: own.states.nbytes)
        self._keys = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """Drop all."""
        self._known.clear()

    def encode(self, vision: Vision, pictures: Sequence[Tensor], checks: Checks) -> list[Tensor]:
        """States [N, D] of each picture's pixels [1, 3, H, W]; that they are finite is left to `checks`."""
        keys = self._hashed(pictures)
        known = {key: own for key in keys if (own := self._known.find(key)) is not None}
        new = {key: own for key, own in zip(keys, pictures, strict=True) if key not in known}
        left, most = list(new), vision.together
        while left:
            # in powers of two: few sizes, which come again
            size = 1 << (min(len(left), most).bit_length() - 1)
            batch = left[:size]
            try:
                states = vision.encode(vision.embed([new[key] for key in batch]))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                most = size // 2
                warnings.warn(f"out of memory: going on with {most} images at a time", stacklevel=2)
                continue
            left = left[size:]
            finite = torch.isfinite(states).flatten(1).all(1)
            for key, image, holds in zip(batch, states.unbind(), finite.unbind(), strict=True):
                # what is kept of several is a copy, else one would keep all in memory
                known[key] = Encoded(image.clone() if size > 1 else image, holds)
                self._known.put(key, known[key])
        for own in known.values():
            checks.that(own.finite, "the image encoder gives NaN or infinite embeddings for this image")
        return [known[key].states for key in keys]

    def _hashed(self, pictures: Sequence[Tensor]) -> list[bytes]:
        """A key for each image's pixel values; each tensor is read once, and several side by side."""
        new = [own for own in dict.fromkeys(pictures) if own not in self._keys]
        for own, key in zip(new, side_by_side(_digest, new), strict=True):
            self._keys[own] = key
        return [self._keys[own] for own in pictures]


def _digest(pixels: Tensor) -> bytes:
    return hashlib.blake2b(pixels.numpy().data, digest_size=16).digest()
