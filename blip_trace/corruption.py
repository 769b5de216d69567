"""What corrupts an input: objects that turn clean image embeddings into several corrupted ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Corruption = Callable[[Tensor], Tensor]
"""Takes the clean image embeddings [N, D] and returns corrupted ones [S, N, D], one for each sample."""


@dataclass(frozen=True)
class GaussianNoise:
    """Gaussian noise on the image embeddings, drawn once per sample and used for every cell of it.

    mode="multiply": e * n with n ~ N(mean, std), elementwise, as the BLIP causal-tracing tool does (Palit et
    al. 2023, with N(1, 5)); mode="add": e + n (Meng et al. 2022 for token embeddings, mean 0).
    Sample s is the same however many samples are drawn.
    """

    mean: float = 1.0
    std: float = 5.0
    mode: Literal["multiply", "add"] = "multiply"
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("multiply", "add"):
            raise ValueError(f"unknown noise mode {self.mode!r}: choose multiply or add")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ValueError(f"samples must be a whole number of at least 1, not {self.samples!r}")
        if not math.isfinite(self.mean):
            raise ValueError(f"the noise's mean must be a finite number, not {self.mean!r}")
        if not (math.isfinite(self.std) and self.std >= 0):
            raise ValueError(f"the noise's std must be a finite number of at least 0, not {self.std!r}")

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Corrupt embeddings [N, D]: [samples, N, D] in float32 or better, drawn on the CPU on any device."""
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.samples, *embeddings.shape)
        noise = torch.randn(shape, generator=generator).mul_(self.std).add_(self.mean)
        noise = noise.to(embeddings.device)
        clean = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        return clean * noise if self.mode == "multiply" else clean + noise


def corrupt(corruption: Corruption, embeddings: Tensor) -> Tensor:
    """Apply a corruption to embeddings [N, D] and check what it returns: [S, N, D] in their type.

    Raises TypeError or ValueError where it is no tensor, has another shape, or holds NaN or infinity.
    """
    corrupted = corruption(embeddings)
    if not isinstance(corrupted, Tensor):
        raise TypeError(f"a corruption must return a tensor [samples, {embeddings.shape[0]}, "
                        f"{embeddings.shape[1]}], not {type(corrupted).__name__}")  # fmt: skip
    if corrupted.dim() != 3 or corrupted.shape[1:] != embeddings.shape or corrupted.shape[0] == 0:
        raise ValueError(
            f"a corruption must return [samples, {embeddings.shape[0]}, {embeddings.shape[1]}], "
            f"not {list(corrupted.shape)}"
        )
    if not bool(torch.isfinite(corrupted).all()):
        raise ValueError("the corruption made NaN or infinite embeddings")
    return corrupted.to(embeddings.dtype)
