"""What the engine is given and what it returns: a question's numbers, and what was read of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .metrics import Readings, Reads
from .program import Program
from .runs import Job
from .sites import Cell


@dataclass(frozen=True)
class Task:
    """One text about one image, to trace.

    text_ids [T] and answer_ids [A] (int64, the last perhaps `metrics.OWN`), clean [N, D] and
    corrupted [S, N, D] states of the image, the cells to change, in which direction (see `schedule.Job`), and
    corrupted embeddings of the text's tokens, words [S, T, C]. Where `corrupted` or `words` is None, that is
    clean; where both are, there is one sample, the clean run itself.

    `patches`: the image is given by its embedded patches, and the image stack is part of the trace.
    `foil_ids`, `reads`: see `head.Asked`.
    """

    text_ids: Tensor
    answer_ids: Tensor
    clean: Tensor
    corrupted: Tensor | None
    cells: tuple[Cell, ...]
    direction: str = "denoise"
    words: Tensor | None = None
    patches: bool = False
    foil_ids: Tensor | None = None
    reads: Reads = "answer"

    @property
    def samples(self) -> int:
        """Corrupted inputs."""
        given = self.words if self.corrupted is None else self.corrupted
        return 1 if given is None else len(given)

    @property
    def images(self) -> tuple[Tensor, ...]:
        """Sets of rows that stand for the image, the clean one and then the corrupted ones: each [sets, N,
        D]."""
        clean = self.clean[None]
        return (clean,) if self.corrupted is None else (clean, self.corrupted)

    def part(self, first: int, last: int) -> Task:
        """The task of these samples alone."""
        corrupted, words = (None if x is None else x[first:last] for x in (self.corrupted, self.words))
        return replace(self, corrupted=corrupted, words=words)

    def job(self, program: Program) -> Job:
        """The task's shape in the stacks of a program."""
        text, answer = len(self.text_ids), len(self.answer_ids)
        tokens, first = {
            "answer": ((text, answer), 0),
            "continue": ((text + answer - 1,), text - 1),
            "match": ((text,), 0),
        }[program.task]
        return Job(
            tokens,
            range(first, first + answer),
            self.samples,
            self.cells,
            self.direction,
            images=self.corrupted is not None,
            words=self.words is not None,
        )


@dataclass(frozen=True)
class Scores:
    """What was read of a task's runs: clean [A], corrupted [S, A], patched [S, cells, A]."""

    answer_ids: Tensor
    clean: Readings
    corrupted: Readings
    patched: Readings
