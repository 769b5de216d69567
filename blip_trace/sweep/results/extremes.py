"""The samples of a run that stand out in one of its maps."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .aggregate import Aggregate
from .profiles import Floats, Labels, profiles
from .run import Run


class Extreme(NamedTuple):
    """A sample, and how far it stands out."""

    value: float
    sample_id: str


class Extremes(NamedTuple):
    """strongest: samples with the largest effect at any role and layer. unusual: those whose profile of roles
    and layers is farthest from the average, as the root mean square of its cells' distances, each in standard
    deviations between samples. The most extreme one first."""

    strongest: list[Extreme]
    unusual: list[Extreme]


def extremes(run: Run, average: Aggregate, count: int, sign: int = 1) -> Extremes:
    """The samples that stand out from an average by role that is not split by anything that leaves some out.

    sign: -1 where effects of the metric are negative. Raises ValueError where a file is broken.
    """
    labels = Labels("role")
    strongest: list[Extreme] = []
    unusual: list[Extreme] = []
    for ids, means in _included(run, average, labels):
        order = [average.rows.index(name) for name in labels.numbers]
        mean, spread = (
            part[order].reshape(len(order), *means.shape[2:])
            for part in (average.overall.mean, average.overall.standard_deviation)
        )
        spread = np.where(spread > 0, spread, np.nan)  # where all samples agree, none is unusual
        away = ((means - mean) / spread) ** 2
        cells = np.isfinite(away)
        distance = np.sqrt(np.where(cells, away, 0).sum((1, 2, 3)) / np.maximum(cells.sum((1, 2, 3)), 1))
        largest = np.nanmax(sign * means, axis=(1, 2, 3))
        strongest = _most(strongest, ids, largest, count)
        unusual = _most(unusual, ids, distance, count)
    return Extremes(strongest, unusual)


def _included(run: Run, average: Aggregate, labels: Labels) -> Iterator[tuple[list[str], Floats]]:
    """The samples in an average and their profiles [samples, roles, heads, layers]."""
    for part in profiles(
        run, average.stack, average.kind, average.metric, labels, normalized=average.normalized
    ):
        which = part.usable & (np.array(part.table["status"].to_pylist()) == "ok")
        if which.any():
            yield part.table["sample_id"].filter(which).to_pylist(), part.means[which]


def _most(found: list[Extreme], ids: list[str], values: Floats, count: int) -> list[Extreme]:
    """The largest of these and of those found before; of equal ones the first in the order of ids."""
    more = (Extreme(value, name) for value, name in zip(values.tolist(), ids, strict=True))
    return heapq.nsmallest(count, [*found, *more], key=lambda one: (-one.value, one.sample_id))
