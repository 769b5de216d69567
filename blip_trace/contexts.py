"""Rows of an attention's context that no run has as they are: edges cut, or heads of several runs mixed.

They are computed beside the batch and stand behind it when it is projected; the gather that forks runs reads
them like any other row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from .layout import Ints, Layout, int32


@dataclass(frozen=True)
class Knockout:
    """Rows of an attention's context computed anew because edges of theirs are cut. All int32.

    query_rows [P]: rows of the batch that they stand for, group by group: those of group g are
    query_starts[g] to query_starts[g + 1], and attend to state_rows[state_starts[g]:state_starts[g + 1]],
    rows of the batch (self-attention) or of the states that are attended to. query_marks and state_marks are
    the same starts on the CPU, wherever the plan is.
    """

    query_rows: Tensor
    query_starts: Tensor
    state_rows: Tensor
    state_starts: Tensor
    query_marks: tuple[int, ...]
    state_marks: tuple[int, ...]


class Override(NamedTuple):
    """A token's state, at a place, is that of another class of runs; at the place "context" it is what
    attention makes of all keys but those `cut`."""

    token: int
    place: str
    head: int = -1
    donor: int = -1
    cut: tuple[int, ...] = ()


class Attended(NamedTuple):
    """What the rows of an attention see: the class's own rows up to their own (`causal`) or all of them, or,
    of cross-attention, the rows from `starts[set]` on."""

    causal: bool
    starts: Ints | None


class Contexts:
    """The rows that stand behind a sublayer's context: first those of attention with edges cut, then those
    mixed of several runs' heads."""

    def __init__(self, layout: Layout, heads: int, attended: Attended | None) -> None:
        self._layout = layout
        self._heads = heads
        self._attended = attended
        self._queries: dict[tuple[int, ...], dict[int, int]] = {}  # of what is seen: rows, and their places
        self._mixed: dict[tuple[int, ...], int] = {}

    def see(self, parent: int, source: int, changed: Iterable[Override]) -> None:
        """Collect the rows whose edges are cut, before any row has its place."""
        for override in changed:
            if override.place == "context":
                seen = self._seen(parent, source, override)
                self._queries.setdefault(seen, {})[self._layout.row(parent, override.token)] = -1

    def rows(self, parent: int, source: int, changed: Iterable[Override]) -> dict[int, int]:
        """For the tokens of a class whose context is not its parent's: the row of its own."""
        rows: dict[int, int] = {}
        for override in changed:
            if override.place == "context":
                seen = self._seen(parent, source, override)
                rows[override.token] = self._place(seen, self._layout.row(parent, override.token))
        mixed: dict[int, list[int]] = {}
        for token, place, head, donor, _ in changed:
            if place == "head":
                own = rows.get(token, self._layout.row(parent, token))
                mixed.setdefault(token, [own] * self._heads)[head] = self._layout.row(donor, token)
        for token, heads in mixed.items():
            rows[token] = self._cut_end + self._mixed.setdefault(tuple(heads), len(self._mixed))
        return rows

    def knockout(self) -> Knockout | None:
        """How the rows whose edges are cut are computed."""
        if not self._queries:
            return None
        seen = list(self._queries)
        queries = [list(rows) for rows in self._queries.values()]
        query_starts = np.cumsum([0, *map(len, queries)])
        state_starts = np.cumsum([0, *map(len, seen)])
        return Knockout(
            query_rows=int32(np.concatenate(queries)),
            query_starts=int32(query_starts),
            state_rows=int32(np.concatenate(seen)),
            state_starts=int32(state_starts),
            query_marks=tuple(query_starts.tolist()),
            state_marks=tuple(state_starts.tolist()),
        )

    def head_rows(self) -> Tensor | None:
        """See `Step`."""
        return int32(np.array(list(self._mixed))) if self._mixed else None

    @property
    def _cut_end(self) -> int:
        return int(self._layout.starts[-1]) + sum(map(len, self._queries.values()))

    def _place(self, seen: tuple[int, ...], query: int) -> int:
        rows = self._queries[seen]
        if rows[query] < 0:  # all queries are known by now
            first = int(self._layout.starts[-1])
            for own in self._queries.values():
                own.update((row, first + number) for number, row in enumerate(own))
                first += len(own)
        return rows[query]

    def _seen(self, parent: int, source: int, override: Override) -> tuple[int, ...]:
        """Rows that a token's attention still sees."""
        assert self._attended is not None
        if self._attended.starts is not None:
            rows = np.arange(*self._attended.starts[source : source + 2])
        else:
            rows = self._layout.rows(parent)
            if self._attended.causal:
                rows = rows[: override.token + 1]
        cut = set(override.cut)
        return tuple(row for token, row in enumerate(rows.tolist()) if token not in cut)
