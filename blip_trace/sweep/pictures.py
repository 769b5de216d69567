"""Pictures of samples, read and prepared in the background while the model computes."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import PIL.Image
from torch import Tensor

from ..images import decode_image
from ..inputs import Inputs
from .media import Media

AHEAD = 16
"""Pictures that are read before they are needed, at least: two batches."""

READERS = 8
"""Threads that read for a GPU, at most one a core: a photograph takes several times as long to read as a GPU
takes for its maps. A CPU has other work; there one reads."""

UNREADABLE = (OSError, ValueError, TypeError)
"""What a picture that cannot be used raises, in one sentence."""


@dataclass(frozen=True)
class Picture:
    """Pixel values [1, 3, H, W] and the SHA-256 of the file."""

    pixels: Tensor
    sha256: str


class Pictures:
    """The pictures of some samples, in the order in which they will be asked for."""

    def __init__(
        self, media: Media, inputs: Inputs, pool: ThreadPoolExecutor, order: Sequence[str], batch: int
    ) -> None:
        self._media = media
        self._inputs = inputs
        self._pool = pool
        self._uses = Counter(order)
        self._waiting = iter(dict.fromkeys(order))
        self._read: dict[str, Future[Picture]] = {}
        self._fetch(max(AHEAD, 2 * batch))

    def take(self, reference: str) -> Picture:
        """A picture; each may be taken as often as it stands in the order. Raises `UNREADABLE`."""
        while reference not in self._read:
            self._fetch(1)
        picture = self._read[reference]
        self._uses[reference] -= 1
        if not self._uses[reference]:
            del self._read[reference]
            self._fetch(1)
        return picture.result()

    def open(self, reference: str) -> PIL.Image.Image:
        """A picture as it is, at once."""
        return decode_image(self._media.read(reference), reference)

    def _fetch(self, count: int) -> None:
        for _, reference in zip(range(count), self._waiting, strict=False):
            self._read[reference] = self._pool.submit(self._prepare, reference)

    def _prepare(self, reference: str) -> Picture:
        data = self._media.read(reference)
        pixels = self._inputs.pixels(decode_image(data, reference))
        return Picture(pixels, hashlib.sha256(data).hexdigest())


@contextmanager
def reading(device: str) -> Iterator[ThreadPoolExecutor]:
    """Threads that read pictures for a device; what was not begun is dropped at the end."""
    threads = 1 if device == "cpu" else min(READERS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(references: Iterable[str | None]) -> list[str]:
    """Those that there are."""
    return [reference for reference in references if reference is not None]
