"""Effects of many samples at once: columns of ragged maps as arrays, and their means by row and layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...sites import HEAD_KINDS
from ..roles import ROLES
from ..schema import Layout

if TYPE_CHECKING:
    from .run import Run

Floats = npt.NDArray[np.float64]
Whole = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

CHUNK = 512
"""Samples in memory at once: of the image encoder's single patches 28 MB."""


class Ragged(NamedTuple):
    """Maps of several samples: values [tokens of all, heads, layers] (kinds without heads: one), and how many
    tokens each sample has, -1 without a map."""

    values: Floats
    lengths: Whole


@dataclass
class Labels:
    """Names of the rows of averages, numbered in the order in which they are met."""

    by: Literal["role", "position"]
    numbers: dict[str, int] = field(default_factory=dict)

    def codes(self, tokens: pa.Array) -> Whole:
        """The number of each token's row, [tokens], of their roles or positions."""
        coded = tokens.dictionary_encode()
        known = [
            self.numbers.setdefault(str(name), len(self.numbers)) for name in coded.dictionary.to_pylist()
        ]
        codes: Whole = np.array(known, np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
        return codes

    def sorted(self) -> list[str]:
        """The names as averages show them: roles in their own order, positions from the first on."""
        if self.by == "position":
            return sorted(self.numbers, key=int)
        return sorted(
            self.numbers, key=lambda name: (ROLES.index(name) if name in ROLES else len(ROLES), name)
        )


class Profiles(NamedTuple):
    """Some samples: `table` their columns; `usable` [samples] those whose map is there and finite, and
    `infinite` those whose map or scores are not; means [samples, rows, heads, layers] of their effects over
    each row's tokens, NaN where a sample has none. Rows are numbered by `Labels`."""

    table: pa.Table
    usable: Flags
    infinite: Flags
    means: Floats


def profiles(
    run: Run,
    stack: str,
    kind: str,
    metric: str,
    labels: Labels,
    columns: Sequence[str] = (),
    normalized: bool = False,
) -> Iterator[Profiles]:
    """All samples of a run, some at a time, in its order; `columns`: further ones that the tables hold."""
    name = run.layout.map_column(stack, kind, metric)
    scores = [f"{metric}_high", f"{metric}_low"]
    names = {"role": f"{stack}_roles", "position": f"{stack}_positions"}[labels.by]
    wanted = dict.fromkeys(("sample_id", "status", "total_effect_vanishes", name, names, *scores, *columns))
    for group in run.groups(list(wanted)):
        for start in range(0, len(group), CHUNK):
            table = group.slice(start, CHUNK).combine_chunks()
            ragged = decode(table[name], kind in HEAD_KINDS)
            high, low = (floats(table[score]) for score in scores)
            sample = np.repeat(np.arange(len(table)), ragged.lengths.clip(min=0))
            codes = labels.codes(of_tokens(table[names], ragged.lengths))
            scored = (ends[sample, None, None] for ends in (high, low))
            effects = indirect_effect(run.layout, ragged.values, *scored)
            if normalized:
                with np.errstate(divide="ignore", invalid="ignore"):
                    effects /= (high - low)[sample, None, None]
            lost = ~np.isfinite(effects).all((1, 2))
            effects[lost] = np.nan  # sums of infinities would warn
            infinite = np.bincount(sample[lost], minlength=len(table)) > 0
            yield Profiles(
                table.drop_columns([name]),
                (ragged.lengths > 0) & ~infinite,
                infinite,
                _means(effects, sample, codes, len(table), len(labels.numbers)),
            )


def indirect_effect(layout: Layout, restored: Floats, high: Floats | float, low: Floats | float) -> Floats:
    """Restored minus low score; in noising, high score minus what is left."""
    return high - restored if layout.direction == "noise" else restored - low


def decode(column: pa.ChunkedArray, heads: bool) -> Ragged:
    """Maps [tokens, layers], or of kinds of heads [heads, tokens, layers], of a column.

    Raises ValueError where maps have not the same number of layers, or of heads.
    """
    array = column.combine_chunks()
    lengths = _lengths(array)
    inner = array.flatten()
    count = 1
    if heads:
        in_each = _lengths(inner)  # tokens, head by head
        counts = set(lengths[lengths > 0].tolist())
        if len(counts) > 1:
            raise ValueError(f"maps of heads have different numbers of heads: {sorted(counts)}")
        count = counts.pop() if counts else 1
        inner = inner.flatten()
        by_head = in_each.reshape(-1, count)
        if (by_head != by_head[:, :1]).any():
            raise ValueError("the heads of a map have different numbers of tokens")
        lengths = lengths.copy()
        lengths[lengths > 0] = by_head[:, 0]
    layers = inner.type.list_size
    # null numbers become NaN, which is counted; a null row of layers would shift all that follows
    values = inner.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(-1, layers)
    if len(values) != count * lengths.clip(min=0).sum():
        raise ValueError("a map lacks some of its layers")
    return Ragged(values[_token_major(lengths, count)] if heads else values[:, None], lengths)


def _token_major(lengths: Whole, heads: int) -> Whole:
    """Where the values of each token and head stand that are stored head by head: [tokens, heads]."""
    lengths = lengths.clip(min=0)
    of_token = np.repeat(lengths, lengths)
    first = np.repeat(np.cumsum(lengths) - lengths, lengths)  # of its sample
    within = np.arange(len(first)) - first
    places: Whole = (first * heads + within)[:, None] + np.arange(heads) * of_token[:, None]
    return places


def of_tokens(column: pa.ChunkedArray, lengths: Whole) -> pa.Array:
    """What a column of lists says of each token that has a map. Raises ValueError for lists of other lengths
    than the maps."""
    array = column.combine_chunks()
    found = _lengths(array)
    mapped = lengths > 0
    if (found[mapped] != lengths[mapped]).any():
        raise ValueError("maps and roles are of different numbers of tokens")
    return array.filter(pa.array(mapped)).flatten()


def _lengths(lists: pa.Array) -> Whole:
    """Of each list, -1 of null."""
    lengths: Whole = pc.fill_null(pc.list_value_length(lists), -1).to_numpy(zero_copy_only=False)
    return lengths.astype(np.int64)


def floats(column: pa.ChunkedArray) -> Floats:
    """NaN where there is none."""
    values: Floats = column.to_numpy().astype(np.float64)
    return values


def _means(effects: Floats, sample: Whole, codes: Whole, samples: int, rows: int) -> Floats:
    """[samples, rows, heads, layers] of effects [tokens, heads, layers]."""
    means = np.full((samples * rows, *effects.shape[1:]), np.nan)
    if len(effects):
        places = sample * rows + codes
        order = np.argsort(places, kind="stable")
        there, starts, counts = np.unique(places[order], return_index=True, return_counts=True)
        means[there] = np.add.reduceat(effects[order], starts) / counts[:, None, None]
    return means.reshape(samples, rows, *effects.shape[1:])
