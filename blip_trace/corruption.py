"""What corrupts an input: the image or its embeddings, or the question's token embeddings.

Any of these, or what `corrupting` says of others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .corrupting import Corrupted, Corruption, InputCorruption, Original, apply
from .devices import send
from .sites import check_count

_noises = Cache[Tensor](2**26, lambda noise: noise.nbytes)


@dataclass(frozen=True)
class _Noise:
    """Noise drawn once per sample and used for every cell of it; sample s is the same however many are drawn.

    n ~ N(mean, std), elementwise; mode="multiply": e * n; mode="add": e + n.
    """

    mean: float = 0.0
    std: float = 1.0
    mode: Literal["multiply", "add"] = "add"
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("multiply", "add"):
            raise ValueError(f"unknown noise mode {self.mode!r}: choose multiply or add")
        check_count("samples", self.samples)
        if not math.isfinite(self.mean):
            raise ValueError(f"the noise's mean must be a finite number, not {self.mean!r}")
        _check_std(self.std)

    def apply(self, clean: Tensor) -> Tensor:
        """Samples [S, ...] of `clean` in float32 or better, drawn on the CPU on any device."""
        noise = self._drawn(clean.shape, clean.device)
        clean = clean.to(torch.promote_types(clean.dtype, torch.float32))
        return clean * noise if self.mode == "multiply" else clean + noise

    def _drawn(self, shape: torch.Size, device: torch.device) -> Tensor:
        """The noise [S, ...]: common to all inputs of one shape, and kept, for drawing it can take longer
        than a pass."""

        def draw() -> Tensor:
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn((self.samples, *shape), generator=generator)
            return send(noise.mul_(self.std).add_(self.mean), device)

        return _noises.get((self.seed, self.samples, self.std, self.mean, shape, device), draw)


@dataclass(frozen=True)
class GaussianNoise(_Noise):
    """Gaussian noise on the image embeddings.

    mode="multiply": e * n with n ~ N(mean, std), elementwise, as the BLIP causal-tracing tool does (Palit et
    al. 2023, with N(1, 5)); mode="add": e + n.
    Sample s is the same however many samples are drawn.
    """

    mean: float = 1.0
    std: float = 5.0
    mode: Literal["multiply", "add"] = "multiply"

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Corrupt embeddings [N, D]: [samples, N, D] in float32 or better, drawn on the CPU on any device."""
        return self.apply(embeddings)


@dataclass(frozen=True)
class PixelNoise(_Noise):
    """Gaussian noise on the pixel values as the model sees them (normalised: their spread is about 1)."""

    def corrupt(self, original: Original) -> Corrupted:
        """Every sample is encoded."""
        return Corrupted(images=original.enter(self.apply(original.pixels[0]), None))


@dataclass(frozen=True)
class PatchNoise(_Noise):
    """Gaussian noise on the embedded patches (class token and positions included), the encoder's input."""

    def corrupt(self, original: Original) -> Corrupted:
        """Every sample is encoded."""

        noisy: list[Tensor] = []

        def edit(embedded: Tensor, samples: slice) -> Tensor:
            if not noisy:
                noisy.append(self.apply(embedded[0]))
            return noisy[0][samples].to(embedded.dtype)

        pixels = original.pixels.expand(self.samples, -1, -1, -1)
        return Corrupted(images=original.enter(pixels, edit))


@dataclass(frozen=True)
class TokenNoise:
    """Noise added to the embeddings of the question's tokens (Meng et al. 2022, section 2.1).

    span: a phrase of the question, or its tokens (first, behind the last), from 0; None: all of them.
    std: in multiples of the standard deviation of the model's word embeddings (`relative`, as ROME's `s3`),
    or absolute. distribution: "gaussian", or "uniform" between -std and std.
    """

    span: str | tuple[int, int] | None = None
    std: float = 3.0
    relative: bool = True
    distribution: Literal["gaussian", "uniform"] = "gaussian"
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.distribution not in ("gaussian", "uniform"):
            raise ValueError(f"unknown distribution {self.distribution!r}: choose gaussian or uniform")
        check_count("samples", self.samples)
        _check_std(self.std)

    def corrupt(self, original: Original) -> Corrupted:
        """The image stays clean, and its keys and values are shared by all runs."""
        tokens = self._tokens(original)
        generator = torch.Generator().manual_seed(self.seed)
        words = original.words.to(torch.promote_types(original.words.dtype, torch.float32))
        shape = (self.samples, len(tokens), words.shape[1])
        if self.distribution == "gaussian":
            noise = torch.randn(shape, generator=generator)
        else:
            noise = torch.rand(shape, generator=generator) * 2 - 1
        corrupted = words.repeat(self.samples, 1, 1)
        scale = self.std * (original.words_std() if self.relative else 1.0)
        corrupted[:, tokens.start : tokens.stop] += send(noise, words.device) * scale
        spoilt = " ".join(original.labels[t] for t in tokens)
        return Corrupted(words=corrupted, note=f"tokens {tokens.start} to {tokens.stop - 1}: {spoilt}")

    def _tokens(self, original: Original) -> range:
        length = len(original.ids)
        if self.span is None:
            return range(length)
        if isinstance(self.span, str):
            return original.find(self.span)
        first, last = self.span
        if not 0 <= first < last <= length:
            raise ValueError(f"the span {self.span} is not within the question's {length} tokens")
        return range(first, last)


@dataclass(frozen=True)
class ImageSwap:
    """Another image in the place of the clean one, such as a semantic minimal pair (NOTICE): one sample."""

    image: Any

    def __repr__(self) -> str:
        return f"ImageSwap(image={_shown(self.image)})"

    def corrupt(self, original: Original) -> Corrupted:
        """Takes whatever `Tracer.trace` takes for an image."""
        return Corrupted(images=original.image(self.image))


@dataclass(frozen=True)
class TokenSwap:
    """Another question of as many tokens in the place of the clean one (symmetric token replacement, NOTICE):
    one sample. The note of the result's settings names the tokens that differ."""

    question: str | Tensor

    def __repr__(self) -> str:
        return f"TokenSwap(question={_shown(self.question)})"

    def corrupt(self, original: Original) -> Corrupted:
        """Raises ValueError where the questions differ in length, or not at all."""
        ids = original.question(self.question)
        if len(ids) != len(original.ids):
            raise ValueError(
                f"a token swap needs questions of equal length, not {len(original.ids)} and {len(ids)} tokens"
            )
        differing = (ids != original.ids).nonzero().flatten().tolist()
        if not differing:
            raise ValueError("a token swap needs another question: both have the same tokens")
        note = ", ".join(f"token {t} was {original.labels[t]}" for t in differing)
        return Corrupted(words=original.embed(ids)[None], note=note)


@dataclass(frozen=True)
class ImageAblation:
    """The image embeddings replaced by zeros, by their mean over reference images, or, one sample for each,
    by those of the reference images themselves (resample ablation)."""

    mode: Literal["zero", "mean", "resample"] = "zero"
    references: Sequence[Any] = ()

    def __post_init__(self) -> None:
        if self.mode not in ("zero", "mean", "resample"):
            raise ValueError(f"unknown ablation {self.mode!r}: choose zero, mean or resample")
        if (self.mode == "zero") == bool(len(self.references)):
            needs = "no reference images" if self.mode == "zero" else "reference images"
            raise ValueError(f"an ablation of mode {self.mode!r} takes {needs}")

    def corrupt(self, original: Original) -> Corrupted:
        """References are whatever `Tracer.trace` takes for an image."""
        if self.mode == "zero":
            return Corrupted(images=torch.zeros_like(original.states())[None])
        if self.mode == "mean":
            original.states()  # a mean over patches is not this ablation
        entered = torch.cat([original.image(image) for image in self.references])
        return Corrupted(images=entered if self.mode == "resample" else entered.mean(0, keepdim=True))


@dataclass(frozen=True)
class ImageRegion:
    """A region of the image hidden: filled with the mean colour, or blurred. One sample.

    box: (left, top, right, bottom) in shares of the image's size; or mask: bool [H, W] at the model's image
    size, true where it is hidden. blur: standard deviation in pixels; None: filled.
    """

    box: tuple[float, float, float, float] | None = None
    mask: Tensor | None = None
    blur: float | None = None

    def __post_init__(self) -> None:
        if (self.box is None) == (self.mask is None):
            raise ValueError("a region is given by a box or by a mask, one of the two")
        if self.box is not None:
            left, top, right, bottom = self.box
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(f"the box {self.box} is not (left, top, right, bottom) within 0 to 1")
        if self.blur is not None and not (math.isfinite(self.blur) and self.blur > 0):
            raise ValueError(f"the blur must be a finite number of pixels above 0, not {self.blur!r}")

    def corrupt(self, original: Original) -> Corrupted:
        """Raises ValueError where the mask is of another size, or hides nothing."""
        pixels = original.pixels
        hidden = self._hidden(pixels.shape[2], pixels.shape[3]).to(pixels.device)
        instead = torch.zeros_like(pixels) if self.blur is None else _blurred(pixels, self.blur)
        return Corrupted(images=original.enter(torch.where(hidden, instead, pixels), None))

    def _hidden(self, height: int, width: int) -> Tensor:
        if self.box is not None:
            left, top, right, bottom = self.box
            across = (torch.arange(width) + 0.5) / width
            down = (torch.arange(height) + 0.5) / height
            inside = ((across > left) & (across < right))[None, :]
            mask = inside & ((down > top) & (down < bottom))[:, None]
        else:
            assert self.mask is not None
            mask = self.mask
            if mask.dtype != torch.bool or mask.shape != (height, width):
                raise ValueError(
                    f"the mask must be bool [{height}, {width}], not {mask.dtype} {list(mask.shape)}"
                )
        if not bool(mask.any()):
            raise ValueError("the region holds no pixel")
        return mask


@dataclass(frozen=True)
class Together:
    """Several corruptions at once, such as one of the image and one of the question; sample s of each."""

    corruptions: tuple[Corruption, ...]

    def __init__(self, *corruptions: Corruption) -> None:
        if len(corruptions) < 2:
            raise ValueError("put at least two corruptions together")
        object.__setattr__(self, "corruptions", corruptions)

    def corrupt(self, original: Original) -> Corrupted:
        """Raises ValueError where two of them change the same input, or draw different numbers of samples."""
        all_made = [apply(corruption, original) for corruption in self.corruptions]
        images, words = (
            [x for x in part if x is not None]
            for part in zip(*((m.images, m.words) for m in all_made), strict=True)
        )
        if len(images) > 1 or len(words) > 1:
            raise ValueError("two corruptions of the same input cannot be put together")
        note = "; ".join(made.note for made in all_made if made.note)
        return Corrupted(images[0] if images else None, words[0] if words else None, note)


def _shown(given: Any) -> str:
    """What somebody handed in; of a tensor its shape, for printing its numbers takes longer than a pass."""
    return f"<tensor {list(given.shape)}>" if isinstance(given, Tensor) else repr(given)


def _blurred(pixels: Tensor, std: float) -> Tensor:
    """Gaussian blur of [1, 3, H, W]; the border is repeated outwards."""
    reach = math.ceil(3 * std)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=pixels.device) / std) ** 2)
    kernel = (kernel / kernel.sum()).to(pixels.dtype)
    channels = pixels.transpose(0, 1)  # [3, 1, H, W]
    wide = F.conv2d(F.pad(channels, (reach, reach, 0, 0), mode="replicate"), kernel.view(1, 1, 1, -1))
    both = F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="replicate"), kernel.view(1, 1, -1, 1))
    return both.transpose(0, 1)


def check_corruption(corruption: Corruption | None) -> Corruption:
    """A corruption; ten samples of noise unless given. Raises TypeError for anything else."""
    corruption = GaussianNoise() if corruption is None else corruption
    if not callable(corruption) and not isinstance(corruption, InputCorruption):
        raise TypeError(f"a corruption must be callable, not {type(corruption).__name__}")
    return corruption


def _check_std(std: float) -> None:
    if not (math.isfinite(std) and std >= 0):
        raise ValueError(f"the noise's std must be a finite number of at least 0, not {std!r}")
