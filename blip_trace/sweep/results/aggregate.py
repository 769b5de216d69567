"""Averages over the samples of a run, with intervals that take one pass over the data: `aggregate`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...sites import HEAD_KINDS, check_count, check_names
from .profiles import Flags, Floats, Labels, Profiles, Whole, profiles

if TYPE_CHECKING:
    from .run import Run

NONE = "(none)"
"""The group of samples without a value, or with an empty one, in the column that splits them."""
MAX_GROUPS = 200
"""A column with more values does not split a run into groups worth an average each."""

LANES = 4  # draws from one 64-bit hash
GAMMA = 0x9E3779B97F4A7C15


class Curve(NamedTuple):
    """An average layer by layer, each [layers], of kinds of heads [heads, layers]; n: how many samples."""

    mean: Floats
    standard_error: Floats
    lower: Floats
    upper: Floats
    n: int


@dataclass(frozen=True)
class Average:
    """The mean over a group's samples: float64 [rows, layers], of kinds of heads [rows, heads, layers]; NaN
    where no sample has tokens of that row.

    n [rows]: how many samples have such tokens, of `samples` in all. standard_deviation: between samples, NaN
    for a single one; so are standard_error and the interval from lower to upper. excluded: how many samples
    are not in it, by reason: `filtered`, `error` and `not_finite` (a status, or NaN or infinity in this map),
    `vanishing` (a total effect that vanishes, where effects are divided by it) and `no_map`.
    """

    samples: int
    n: Whole
    mean: Floats
    standard_deviation: Floats
    standard_error: Floats
    lower: Floats
    upper: Floats
    excluded: Mapping[str, int]


@dataclass(frozen=True)
class Aggregate:
    """Averages of one map: of all samples, and of each group where `split` names a column. `rows` are the
    names of the rows of all of them: roles, or positions in the stack."""

    stack: str
    kind: str
    metric: str
    by: str
    rows: tuple[str, ...]
    overall: Average
    groups: Mapping[str, Average]
    split: str | None
    normalized: bool
    level: float
    unit: str

    def layer_curve(self, row: str = "content", group: str | None = None) -> Curve:
        """One row's average, layer by layer, over all samples or a group of them. Raises KeyError for a row
        or a group that there is not."""
        if row not in self.rows:
            raise KeyError(f"no sample has a token {row!r}: there are {', '.join(self.rows)}")
        if group is not None and group not in self.groups:
            raise KeyError(f"there is no group {group!r}: there are {', '.join(self.groups) or 'none'}")
        of, at = self.overall if group is None else self.groups[group], self.rows.index(row)
        return Curve(of.mean[at], of.standard_error[at], of.lower[at], of.upper[at], int(of.n[at]))


def aggregate(
    run: Run,
    stack: str,
    kind: str,
    metric: str | None,
    by: Literal["role", "position"],
    split: str | None,
    normalized: bool,
    level: float,
    draws: int,
    seed: int,
    unit: Literal["sample", "image"],
) -> Aggregate:
    """The mean indirect effect over samples with status ok, by the tokens' role or position, and layer.

    A sample's value at a role is the mean over its tokens of that role, so long questions count no more than
    short ones. split: a column of text, numbers or truth values, or a key of `extra`; groups by its values.
    normalized: effects over each sample's total effect, without samples whose total effect vanishes.

    Intervals are percentiles of a Poisson bootstrap (Hanley & MacGibbon 2006; Chamandy et al. 2012), which
    needs neither all samples at once nor their number: in each draw each unit counts Poisson(1) times. How
    often is a hash of seed, unit and draw, so that results depend neither on the order of the samples nor on
    the borders of files. unit: "sample", or "image": all questions about an image count equally often, as
    they must where they share it; the standard error is then the spread of the bootstrap's means.

    Raises ValueError for a map or column that the run does not have, a column with over `MAX_GROUPS` values,
    a level outside 0 to 1, draws below 2, or a broken file.
    """
    metric = run.check_map(stack, kind, metric)
    check_names("grouping of tokens", by, ("role", "position"))
    check_names("unit", unit, ("sample", "image"))
    check_count("draws", draws)
    if draws < 2:
        raise ValueError("a bootstrap of a single draw has no interval")
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level!r}")
    column = "sample_id" if unit == "sample" else "image"
    further = [column] if split is None else [column, _split_column(run, split)]
    labels = Labels(by)
    groups: dict[str, _Totals] = {}
    for part in profiles(run, stack, kind, metric, labels, further, normalized):
        excluded = _excluded(part, normalized)
        weights = poisson_weights(unit_keys(part.table[column].to_pylist(), seed), draws)
        names = [""] * len(part.table) if split is None else _values(part.table, split)
        if len(groups.keys() | set(names)) > MAX_GROUPS:
            raise ValueError(
                f"{split!r} has more than {MAX_GROUPS} different values: split by another column"
            )
        codes = np.array(names)
        for name in dict.fromkeys(names):
            groups.setdefault(name, _Totals(draws)).add(part.means, weights, excluded, codes == name)
    if split is not None and split not in run.columns.names and set(groups) == {NONE}:
        raise ValueError(f"{split!r} is neither a column of the run nor a key of extra")

    rows = labels.sorted()
    order = np.array([labels.numbers[row] for row in rows], np.int64)
    shown = sorted(groups) if split is not None else []
    ends = ((1 - level) / 2, (1 + level) / 2)
    overall = _Totals(draws)
    for name in sorted(groups):
        overall.merge(groups[name])
    layers = next(known.layers for known in run.layout.stacks if known.name == stack)
    cells = overall.mean.shape[1:] if overall.samples else (1, layers)
    whole, *each = (
        totals.average(order, cells, ends, unit, kind in HEAD_KINDS)
        for totals in (overall, *(groups[name] for name in shown))
    )
    averages = dict(zip(shown, each, strict=True))
    return Aggregate(stack, kind, metric, by, tuple(rows), whole, averages, split, normalized, level, unit)


@dataclass
class _Totals:
    """What is known of a group: of each row [rows] the number of samples, of each cell [rows, heads, layers]
    their mean and the sum of squared differences from it; of each draw the weights and weighted sums."""

    draws: int
    samples: int = 0
    excluded: Counter[str] = field(default_factory=Counter)
    n: Whole = field(default_factory=lambda: np.zeros(0, np.int64))
    mean: Floats = field(default_factory=lambda: np.zeros((0, 1, 1)))
    squares: Floats = field(default_factory=lambda: np.zeros((0, 1, 1)))
    weights: Floats = field(default_factory=lambda: np.zeros((0, 0)))  # [draws, rows]
    sums: Floats = field(default_factory=lambda: np.zeros((0, 0, 1, 1)))  # [draws, rows, heads, layers]

    def add(self, means: Floats, weights: Floats, excluded: npt.NDArray[np.str_], which: Flags) -> None:
        """Count the samples `which` of means [samples, rows, heads, layers], weights [samples, draws]."""
        self.excluded.update(excluded[which & (excluded != "")].tolist())
        which = which & (excluded == "")
        values, weights = means[which], weights[which]
        there = ~np.isnan(values[:, :, 0, 0])  # [samples, rows]
        values = np.where(there[..., None, None], values, 0.0)
        n = there.sum(0)
        mean = values.sum(0) / np.maximum(n, 1)[:, None, None]
        apart = np.where(there[..., None, None], values - mean, 0.0)
        sums = np.tensordot(weights, values, (0, 0))
        squares = (apart * apart).sum(0)
        self.merge(
            _Totals(
                self.draws, len(values), Counter(), n, mean, squares, weights.T @ there.astype(float), sums
            )
        )

    def merge(self, other: _Totals) -> None:
        """Count another group's samples too (Chan et al. 1979); it may have met more rows."""
        self.excluded.update(other.excluded)
        if not other.samples:
            return  # without a map it knows nothing of the number of heads
        rows = len(other.n)
        self._grow(rows, other.mean.shape[1:])
        mine, theirs = self.n[:rows], other.n
        share = (theirs / np.maximum(mine + theirs, 1))[:, None, None]
        gap = other.mean - self.mean[:rows]
        self.squares[:rows] += other.squares + gap * gap * share * mine[:, None, None]
        self.mean[:rows] += gap * share
        self.n[:rows] += theirs
        self.weights[:, :rows] += other.weights
        self.sums[:, :rows] += other.sums
        self.samples += other.samples

    def _grow(self, rows: int, cells: tuple[int, ...]) -> None:
        """Make room for more rows. Raises ValueError where cells [heads, layers] differ from those known."""
        known = len(self.n)
        if self.samples and self.mean.shape[1:] != cells:
            raise ValueError(f"maps have different numbers of heads: {self.mean.shape[1]} and {cells[0]}")
        if rows > known or not self.samples:
            fresh = (max(rows, known), *cells)
            old, self.n = self.n, np.zeros(fresh[0], np.int64)
            self.n[:known] = old
            self.mean, self.squares = (_padded(part, fresh) for part in (self.mean, self.squares))
            self.weights = _padded(self.weights, (self.draws, fresh[0]))
            self.sums = _padded(self.sums, (self.draws, *fresh))

    def average(
        self, order: Whole, cells: tuple[int, ...], ends: tuple[float, float], unit: str, heads: bool
    ) -> Average:
        """As it is returned, rows in this order and of cells [heads, layers]."""
        self._grow(len(order), cells)
        n = self.n[order]
        few = (n < 2)[:, None, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.where((n > 0)[:, None, None], self.mean[order], np.nan)
            deviation = np.sqrt(self.squares[order] / (n - 1)[:, None, None])
            deviation = np.where(few, np.nan, deviation)
            error = deviation / np.sqrt(n)[:, None, None]
            drawn = self.sums[:, order] / self.weights[:, order, None, None]
        lower, upper = np.full_like(mean, np.nan), np.full_like(mean, np.nan)
        several = ~few[:, 0, 0]
        if several.any():
            # a draw may leave out all of a few samples: it has no mean
            lower[several], upper[several] = np.nanquantile(drawn[:, several], ends, axis=0)
            if unit == "image":
                error[several] = np.nanstd(drawn[:, several], axis=0, ddof=1)
        parts = (mean, deviation, error, lower, upper)
        mean, deviation, error, lower, upper = parts if heads else (part[:, 0] for part in parts)
        return Average(self.samples, n, mean, deviation, error, lower, upper, dict(self.excluded))


def _padded(array: Floats, shape: tuple[int, ...]) -> Floats:
    """With zeros up to this shape; nothing of it is kept where it held no sample yet."""
    padded = np.zeros(shape)
    if array.size:
        padded[tuple(slice(size) for size in array.shape)] = array
    return padded


def unit_keys(units: list[str | None], seed: int) -> npt.NDArray[np.uint64]:
    """A number for each unit that no other has, but for one case in 2^64."""
    key = str(seed).encode()[-64:]
    digests = b"".join(blake2b((unit or "").encode(), digest_size=8, key=key).digest() for unit in units)
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def poisson_weights(keys: npt.NDArray[np.uint64], draws: int) -> Floats:
    """How often each unit counts in each draw, Poisson(1) to 16 bits: float64 [units, draws].

    SplitMix64 (Steele et al. 2014), begun at the unit's key: a draw's number says where in it to look.
    """
    steps = np.arange(1, -(-draws // LANES) + 1, dtype=np.uint64) * np.uint64(GAMMA)
    bits = keys[:, None] + steps
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits ^= bits >> np.uint64(shift)
        bits *= np.uint64(factor)
    bits ^= bits >> np.uint64(31)
    weights: Floats = _POISSON[bits.astype("<u8", copy=False).view("<u2")]
    return weights[:, :draws]


def _poisson_table() -> Floats:
    """Poisson(1) of a uniform number of 16 bits: [65536]."""
    count = np.arange(12)
    probabilities = np.exp(-1) / np.cumprod(np.maximum(count, 1))
    borders = np.round(np.cumsum(probabilities) * 2**16)
    return np.searchsorted(borders, np.arange(2**16), side="right").astype(np.float64)


_POISSON = _poisson_table()


def _excluded(part: Profiles, normalized: bool) -> npt.NDArray[np.str_]:
    """Why each sample does not count, "" where it does: [samples]."""
    statuses = np.array(part.table["status"].to_pylist())
    why = np.where(part.usable, "", "no_map").astype("<U16")
    if normalized:
        vanishes = pc.fill_null(part.table["total_effect_vanishes"], True).to_numpy()
        why[vanishes.astype(bool)] = "vanishing"
    why[part.infinite & ~(why == "vanishing")] = "not_finite"
    return np.where(statuses == "ok", why, statuses)


def _split_column(run: Run, split: str) -> str:
    """The column that holds what splits a run. Raises ValueError for one whose values make no groups."""
    if split not in run.columns.names:
        return "extra"
    kind = run.columns.field(split).type
    if pa.types.is_nested(kind) or pa.types.is_floating(kind):
        raise ValueError(f"{split!r} cannot split a run into groups: its values are {kind}")
    return split


def _values(table: pa.Table, split: str) -> list[str]:
    """Of each sample the name of its group."""
    if split in table.column_names:
        values = table[split].to_pylist()
    else:
        values = [json.loads(extra).get(split) for extra in table["extra"].to_pylist()]
    texts = (str(value).lower() if isinstance(value, bool) else value for value in values)
    return [NONE if text is None or text == "" else str(text) for text in texts]
