"""What a corruption is: what it is given, what it makes, and how it is applied.

It is an object with a method `corrupt`, from `Original` to `Corrupted`, or any callable from the clean image
embeddings [N, D] to corrupted ones [S, N, D], one for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .checks import Checks
from .devices import send

Edit = Callable[[Tensor, slice], Tensor]
"""Takes the embedded patches [B, N, D] of these samples and returns what is to be encoded in their place."""


@dataclass(frozen=True)
class Original:
    """What a corruption starts from, and what it may ask for.

    pixels [1, 3, H, W]; states() [N, D], the clean image embeddings, of shape `image_shape`; ids [T] and
    words [T, C], the question's tokens and their embeddings (before positions and norm), of a table whose
    standard deviation is `words_std()`; labels [T]. `enter(pixels [S, 3, H, W], edit)` gives what stands for
    these images in the model, with `edit` applied to the embedded patches [S, N, D] first: image embeddings
    [S, N, D] or, where the image encoder itself is traced, those patches; `states` raises ValueError then.
    `image` makes the same of an image as a user hands it in, [1, N, D], once for each. `question` turns what
    a user hands in into ids, `embed` ids into words, `find` a phrase into its tokens.
    """

    pixels: Tensor
    states: Callable[[], Tensor]
    image_shape: tuple[int, int]
    ids: Tensor
    words: Tensor
    words_std: Callable[[], float]
    labels: tuple[str, ...]
    enter: Callable[[Tensor, Edit | None], Tensor]
    image: Callable[[Any], Tensor]
    question: Callable[[Any], Tensor]
    embed: Callable[[Tensor], Tensor]
    find: Callable[[str], range]


@dataclass(frozen=True)
class Corrupted:
    """Corrupted inputs of S samples: images [S, N, D], as `Original.enter` or `Original.states` gave them,
    and words [S, T, C]; None: that is left clean. `note` tells what was changed, where that is not plain from
    the corruption."""

    images: Tensor | None = None
    words: Tensor | None = None
    note: str = ""


@runtime_checkable
class InputCorruption(Protocol):
    """A corruption that sees the whole input."""

    def corrupt(self, original: Original) -> Corrupted:
        """Corrupt it."""
        ...


Corruption = Callable[[Tensor], Tensor] | InputCorruption


def corrupt(corruption: Corruption, original: Original, checks: Checks) -> Corrupted:
    """Apply a corruption; images and words come in the type of the clean ones, and to where these are.

    Raises TypeError or ValueError where it returns something else or another shape. That it makes no NaN and
    no infinity is left to `checks`.
    """
    made = apply(corruption, original)
    for values in (made.images, made.words):
        if values is not None:
            checks.that(torch.isfinite(values).all(), "the corruption made NaN or infinite embeddings")
    return made


def apply(corruption: Corruption, original: Original) -> Corrupted:
    """The same, its numbers unseen: they may be part of something else."""
    if not isinstance(corruption, InputCorruption):
        states = original.states()
        return Corrupted(images=_checked(corruption(states), original.image_shape, original.words))
    made = corruption.corrupt(original)
    if not isinstance(made, Corrupted) or (made.images is None and made.words is None):
        raise TypeError("a corruption must return a Corrupted with images, words or both")
    images, words = made.images, made.words
    if images is not None:
        images = _checked(images, original.image_shape, original.words)
    if words is not None:
        words = _checked(words, original.words.shape, original.words)
    if images is not None and words is not None and len(images) != len(words):
        raise ValueError(
            f"image and text must be corrupted in as many samples each, not in {len(images)} and {len(words)}"
        )
    return Corrupted(images, words, made.note)


def _checked(corrupted: object, shape: Sequence[int], like: Tensor) -> Tensor:
    expected = f"[samples, {', '.join(map(str, shape))}]"
    if not isinstance(corrupted, Tensor):
        raise TypeError(f"a corruption must return a tensor {expected}, not {type(corrupted).__name__}")
    if corrupted.dim() != 3 or corrupted.shape[1:] != torch.Size(shape) or corrupted.shape[0] == 0:
        raise ValueError(f"a corruption must return {expected}, not {list(corrupted.shape)}")
    return send(corrupted, like.device).to(like.dtype)
