"""ROME's noise on the words of a question: drawn from one fixed seed, so that every cell has the same.

Codes for its level, as ROME's runner takes them: `s3`, three times the standard deviation of the words of all
subjects; `u1`, uniform between -1 and 1 times that number; `m`, a Gaussian with the mean and the covariance
of word embeddings; `t3`, Student's t with that many degrees of freedom and that covariance; or a number, a
standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ... import hooks
from ...corrupting import Corrupted, Original
from .inputs import ModelAndTokenizer

SEED = 1
FACTOR_SEED = 2

Noise = float | Callable[[Tensor], Tensor]
"""A factor for draws [samples, tokens, C] (float64), or what is made of them."""


def draw(shape: Sequence[int], uniform: bool) -> Tensor:
    """Draws [samples, tokens, C] in float64, always the same: standard normal, or uniform in [-1, 1)."""
    state = np.random.RandomState(SEED)
    return torch.from_numpy(state.uniform(-1, 1, tuple(shape)) if uniform else state.randn(*shape))


@dataclass(frozen=True)
class BatchNoise:
    """The corrupted rows of a batch as ROME makes them (`trace_with_patch`): their own words, with noise
    added to those of some tokens, or put in their place.

    ids [S, T]; pixels [S, 3, H, W] where they see another picture than the clean row; tokens: first and
    behind the last, None: no noise.
    """

    ids: Tensor = field(repr=False)
    pixels: Tensor | None = field(repr=False)
    tokens: tuple[int, int] | None
    noise: Noise
    uniform: bool
    replace: bool

    def corrupt(self, original: Original) -> Corrupted:
        """Raises ValueError where the tokens are not in the question or the noise comes in another shape, and
        TypeError where the noise is neither a number nor callable."""
        words = original.embed(self.ids).double()  # [S, T, C]
        if self.tokens is not None:
            first, last = self.tokens
            if not 0 <= first < last <= words.shape[1]:
                raise ValueError(
                    f"the tokens {self.tokens} are not within the question's {words.shape[1]} tokens"
                )
            made = self._noise((len(words), last - first, words.shape[2])).to(words.device)
            words[:, first:last] = made if self.replace else words[:, first:last] + made
        images = None if self.pixels is None else original.enter(self.pixels, None)
        return Corrupted(images=images, words=words)

    def _noise(self, shape: tuple[int, int, int]) -> Tensor:
        drawn = draw(shape, self.uniform)
        if isinstance(self.noise, int | float) and not isinstance(self.noise, bool):
            return drawn * self.noise
        if not callable(self.noise):
            raise TypeError(
                f"noise must be a number or callable, not {self.noise!r}: `noise_of` makes noise of a code"
            )
        made: object = self.noise(drawn)
        if not isinstance(made, Tensor) or made.shape != drawn.shape:
            raise ValueError(f"noise must be a tensor {list(shape)}, made of such a one")
        return made.double()


def collect_embedding_std(mt: ModelAndTokenizer, subjects: Sequence[str]) -> float:
    """The standard deviation of the word embeddings of these texts, over all tokens and channels; their
    special tokens are left out, which ROME's models do not have. Raises ValueError where there is no text."""
    return float(_words(mt, subjects).std())


def collect_embedding_gaussian(
    mt: ModelAndTokenizer, *, questions: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """What makes draws of the Gaussian with mean and covariance of the words of these questions out of
    standard normal ones [..., C]. ROME fits it on WikiText; here it is fitted on what is given."""
    words = _words(mt, questions)
    mean, covariance = words.mean(0), torch.cov(words.T)
    _, scales, directions = torch.linalg.svd(covariance)
    root = scales.sqrt()[:, None] * directions

    def transform(drawn: Tensor) -> Tensor:
        made: Tensor = drawn.double() @ root + mean
        return made

    return transform


def collect_embedding_tdist(
    mt: ModelAndTokenizer, degree: float = 3, *, questions: Sequence[str]
) -> Callable[[Tensor], Tensor]:
    """As `collect_embedding_gaussian`, but of Student's t: each token's draw times a factor of its own, with
    the same covariance. Raises ValueError for a degree up to 2, where that is infinite."""
    if not (math.isfinite(degree) and degree > 2):
        raise ValueError(f"the degrees of freedom must be a finite number above 2, not {degree!r}")
    gaussian = collect_embedding_gaussian(mt, questions=questions)

    def transform(drawn: Tensor) -> Tensor:
        shape = drawn.shape[:-1]
        chi_squared = np.random.RandomState(FACTOR_SEED).chisquare(degree, shape.numel())
        factors = torch.from_numpy(((degree - 2) / chi_squared) ** 0.5)
        return factors.view(*shape, 1) * gaussian(drawn)

    return transform


def noise_of(
    mt: ModelAndTokenizer,
    code: str | float,
    subjects: Sequence[str],
    questions: Sequence[str],
) -> tuple[Noise, bool]:
    """What a code stands for: `noise` and `uniform_noise` of `calculate_hidden_flow`.

    subjects, questions: what `s` and what `m` and `t` are fitted on. Raises ValueError for an unknown code.
    """
    if not isinstance(code, str):
        return float(code), False
    kind, number = code[:1], code[1:]
    if code == "m":
        return collect_embedding_gaussian(mt, questions=questions), False
    if kind in ("s", "t", "u"):
        factor = _number(number or "1", code) if kind == "s" else _number(number, code)
        if kind == "s":
            return factor * collect_embedding_std(mt, subjects), False
        if kind == "t":
            return collect_embedding_tdist(mt, factor, questions=questions), False
        return factor, True
    return _number(code, code), False


def _number(text: str, code: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"unknown noise level {code!r}: that is a number, s or s3, u1, t3 (with any numbers), or m"
        )
    return number


def _words(mt: ModelAndTokenizer, texts: Sequence[str]) -> Tensor:
    """Word embeddings [n, C] of all tokens of these texts, in float64."""
    ids = [i for text in texts for i in mt.tokenizer(text, add_special_tokens=False).input_ids]
    if len(ids) < 2:
        raise ValueError("noise is fitted on texts of at least two tokens in all")
    return hooks.clean_words(mt.model, torch.tensor(ids)).double()
