"""The runs of a trace: what each begins with, and what is changed in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .layout import Ints
from .sites import Cell, Cut, Site


@dataclass(frozen=True)
class Job:
    """The shape of one question: its runs are a clean one, one corrupted run per sample, and for every sample
    and cell one that is patched: the corrupted run with the cell's clean states (`denoise`) or the clean run
    with its corrupted ones (`noise`).

    tokens: lengths in the text stacks. Corrupted are the image, the embeddings of the first text (`words`),
    both, or nothing. The answer is read from rows `reads` of a run in the last stack.
    """

    tokens: tuple[int, ...]
    reads: range
    samples: int
    cells: tuple[Cell, ...]
    direction: str = "denoise"
    images: bool = True
    words: bool = False

    def __hash__(self) -> int:
        # all cells would take longer than planning saves; equal jobs mostly hold the very same ones
        rest = (self.samples, len(self.cells), self.direction, self.images, self.words)
        return hash((self.tokens, self.reads, *rest))

    @property
    def image_sets(self) -> int:
        """Sets of image states that the job brings: the clean one and, where images are corrupted, one for
        each sample."""
        return 1 + self.samples * self.images

    @property
    def entries(self) -> int:
        """Embedded texts that it brings, likewise."""
        return 1 + self.samples * self.words

    @property
    def runs(self) -> int:
        """All its runs."""
        return 1 + self.samples * (1 + len(self.cells))


@dataclass(frozen=True)
class Take:
    """A run's site takes the donor run's state."""

    run: int
    site: Site
    donor: int


@dataclass(frozen=True)
class Lose:
    """A run loses attention edges."""

    run: int
    cut: Cut


Change = Take | Lose


def changes_of(jobs: Sequence[Job]) -> dict[str, list[Change]]:
    """All that is changed in the runs of a stack."""
    changes: dict[str, list[Change]] = defaultdict(list)
    clean = 0
    for job in jobs:
        run = clean + 1 + job.samples
        for corrupted in range(clean + 1, clean + 1 + job.samples):
            base, donor = (corrupted, clean) if job.direction == "denoise" else (clean, corrupted)
            for cell in job.cells:
                for site in cell.sites:
                    changes[site.stack].append(Take(run, site, donor))
                for site in cell.frozen:
                    changes[site.stack].append(Take(run, site, base))
                for cut in cell.cuts:
                    changes[cut.stack].append(Lose(run, cut))
                run += 1
        clean = run
    return changes


def bases_of(jobs: Sequence[Job]) -> Ints:
    """For each run the one that it is until something is changed in it."""
    bases = []
    clean = 0
    for job in jobs:
        corrupted = clean + 1 + np.arange(job.samples)
        base = corrupted if job.direction == "denoise" else np.full_like(corrupted, clean)
        bases.append(np.concatenate(([clean], corrupted, np.repeat(base, len(job.cells)))))
        clean += job.runs
    return np.concatenate(bases)


def inputs_of(job: Job) -> Ints:
    """For each run of a job the input that it is given: 0 the clean one, 1 + s that of sample s."""
    samples = 1 + np.arange(job.samples)
    base = samples if job.direction == "denoise" else np.zeros_like(samples)
    return np.concatenate(([0], samples, np.repeat(base, len(job.cells))))
