"""Which notebook, which arithmetic, and the noise that follows from both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ...corrupting import Corruption
from ...corruption import GaussianNoise
from ...sites import check_count, check_names
from ..models import UnsupportedError

Notebook = Literal["main", "attention"]
MEAN, STD = 1.0, 5.0
"""Of the main notebook's noise, by which image embeddings are multiplied."""
FACTOR = 0.7691
"""By which the attention notebook multiplies them instead: the same number everywhere, no noise."""
SAMPLES = 10


class Options(TypedDict, total=False):
    """What can be said behind the notebooks' own arguments, by keyword.

    notebook: "main" (noise of N(1, 5); `plot_hidden_flow` only returns its result) or "attention" (the
        constant factor 0.7691; plots are drawn, results have a `kind`): where the two differ. "main" unless
        given; the functions of `blip_trace.compat.palit.attention` say "attention".
    faithful: the notebook's own arithmetic: of "main", noise drawn anew for every cell and for the low score,
        one sample each; of "attention", a decoder map that begins at layer 1; normalisation without a guard.
    samples, seed: of the noise that all cells have in common; 10 and 0 unless given. Not with `faithful`, and
        not with a constant factor.
    generator: where faithful noise is drawn, on the CPU; torch's own generator unless given.
    """

    notebook: Notebook
    faithful: bool
    samples: int | None
    seed: int | None
    generator: torch.Generator | None


@dataclass(frozen=True)
class Settings:
    """`Options`, checked. Raises ValueError or TypeError, in one sentence."""

    notebook: Notebook = "main"
    faithful: bool = False
    samples: int | None = None
    seed: int | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        check_names("notebook", [self.notebook], ["main", "attention"])
        if not isinstance(self.faithful, bool):
            raise TypeError(f"faithful is True or False, not {self.faithful!r}")
        for name in ("samples", "seed"):
            if getattr(self, name) is not None and (self.faithful or self.notebook == "attention"):
                raise ValueError(
                    f"{name} is of the noise that all cells have in common: faithful cells have a draw each, "
                    "and the attention notebook multiplies by a constant"
                )
        if self.samples is not None:
            check_count("samples", self.samples)
        if self.generator is not None and not self.redrawn:
            raise ValueError(
                "a generator is for faithful=True in the main notebook: other noise comes from its seed"
            )
        check_generator(self.generator)

    @property
    def redrawn(self) -> bool:
        """Whether each cell has noise of its own."""
        return self.faithful and self.notebook == "main"

    def corruption(self) -> Corruption:
        """Of the image embeddings; where noise is redrawn, another draw at each use."""
        if self.notebook == "attention":
            return GaussianNoise(mean=FACTOR, std=0.0, samples=1)
        if self.faithful:
            return Redrawn(self.generator)
        samples = SAMPLES if self.samples is None else self.samples
        return GaussianNoise(MEAN, STD, samples=samples, seed=self.seed or 0)


@dataclass(frozen=True)
class Redrawn:
    """The main notebook's noise: one sample, another at each call."""

    generator: torch.Generator | None

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Image embeddings [N, D] corrupted: [1, N, D] in float32."""
        rows = embeddings.float().expand(2, -1, -1).clone()  # clean and corrupted, as the notebook has them
        return noisy_embedding(rows, generator=self.generator)[1:]


def noisy_embedding(
    image_embed_tensor: Tensor,
    noise: float = STD,
    percentage_dimensions: float = 1,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Multiply row 1 of image embeddings [2, N, D] by N(1, noise), elementwise and in place; returns them.

    One draw of `torch.normal` of [N, D] on the CPU, from `generator` or torch's own. Raises ValueError for
    another shape and for a generator that is not on the CPU; UnsupportedError for percentage_dimensions other
    than 1, which the notebook takes and does not use.
    """
    check_rows(image_embed_tensor)
    check_generator(generator)
    refuse_share(percentage_dimensions)
    row = image_embed_tensor[1]
    drawn = torch.normal(mean=MEAN, std=float(noise), size=tuple(row.shape), generator=generator)
    with torch.no_grad():
        row.mul_(drawn.to(row.device, row.dtype))
    return image_embed_tensor


def check_rows(image_embed_tensor: object) -> None:
    """Raises TypeError or ValueError for anything but the image embeddings of a clean and a corrupted run."""
    if not isinstance(image_embed_tensor, Tensor):
        raise TypeError(f"image embeddings are a tensor, not {type(image_embed_tensor).__name__}")
    if image_embed_tensor.dim() != 3 or len(image_embed_tensor) != 2:
        raise ValueError(
            "image embeddings are [2, N, D], a clean and a corrupted row, "
            f"not {list(image_embed_tensor.shape)}"
        )


def check_generator(generator: object) -> None:
    """Raises TypeError or ValueError for what cannot draw noise on the CPU."""
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"a generator is a torch.Generator, not {type(generator).__name__}")
    if generator.device.type != "cpu":
        raise ValueError(f"noise is drawn on the CPU, as the notebooks do, not on {generator.device}")


def refuse_share(percentage_dimensions: object) -> None:
    """Raises UnsupportedError for a share of the dimensions, which the notebooks take and do not use."""
    if percentage_dimensions != 1:
        raise UnsupportedError(
            f"percentage_dimensions={percentage_dimensions!r}",
            "the notebooks ignore it; give what corrupts a part to Tracer.trace(corruption=…)",
        )


def refuse_unused(**given: Any) -> None:
    """Raises UnsupportedError for an argument that the notebooks take and ignore."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UnsupportedError(
                f"{name}={value!r}", f"the notebooks take {name} and ignore it; {_INSTEAD[name]}"
            )


_INSTEAD = {
    "replace": "embeddings that take the place of the clean ones go to Tracer.trace(corruption=…)",
    "trace_layers": "record states with forward hooks on the layers of new_model",
    "subject": "a phrase of the question is corrupted by Tracer.trace(corruption=TokenNoise(span=…))",
    "output_attentions": "call the layers of new_model for their attention",
}
