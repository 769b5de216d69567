"""Which rows of a batch are whose: the layout of the classes of runs that share rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """Classes of runs, one behind the other: class c has `tokens[c]` tokens, and rows of its own from token
    `shared[c]` on. The rows before that are those of class `leader[c]`, which shares none: in a causal stack
    what comes before the first token that differs is the same."""

    tokens: Ints
    shared: Ints
    leader: Ints

    @classmethod
    def whole(cls, tokens: Ints) -> Layout:
        """Of classes that have all their rows."""
        return cls(tokens, np.zeros_like(tokens), np.arange(len(tokens)))

    @cached_property
    def starts(self) -> Ints:
        """First row of each class, and behind the last the number of rows."""
        return np.concatenate(([0], np.cumsum(self.tokens - self.shared)))

    def row(self, number: int, token: int) -> int:
        """The row of a class's token."""
        if token < self.shared[number]:
            number = int(self.leader[number])
        return int(self.starts[number] + token - self.shared[number])

    def rows(self, number: int) -> Ints:
        """The rows of all tokens of a class."""
        shared = int(self.shared[number])
        before = self.starts[self.leader[number]] + np.arange(shared)
        return np.concatenate((before, np.arange(self.starts[number], self.starts[number + 1])))

    def gathered(self, parents: Ints, after: Layout) -> Ints:
        """For every row of the layout `after` this one, where class c descends from class parents[c], the row
        of this one that it stands for."""
        own = after.tokens - after.shared
        first = self.starts[parents] + after.shared - self.shared[parents]
        rows: Ints = np.repeat(first - after.starts[:-1], own) + np.arange(after.starts[-1])
        for number in np.flatnonzero(after.shared < self.shared[parents]):  # it shares less than before
            begin, end = after.starts[number : number + 2]
            rows[begin:end] = self.rows(int(parents[number]))[after.shared[number] :]
        return rows

    def prefixes(self) -> Tensor | None:
        """For each class the first row of what it shares and how many, int32 [classes, 2]; None: nothing."""
        if not self.shared.any():
            return None
        return int32(np.stack((np.where(self.shared > 0, self.starts[self.leader], 0), self.shared), axis=1))


def int32(values: Ints) -> Tensor:
    """Row numbers as the ops take them."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
