"""From cells to a plan: which run forks where, and which rows it shares until then.

Runs that cannot yet differ are one *class* and share one set of rows. All runs of a question start as one
class. After every sublayer the classes are refined: runs whose next rows would differ, because a state of
theirs is restored or because they read another set of cross-attention states, get rows of their own. A fork
and a restoration are then the same thing, a gather: every new row says from which row of the batch its
residual and its sublayer update are read. A restored row reads them from the clean run, which runs along.

Planning looks at shapes only, never at numbers; equal shapes share one plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .sites import KINDS, Cell, Site

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Job:
    """The shape of one question: its runs are a clean one, one corrupted run per sample, and for every sample
    and cell one that is patched: the corrupted run with the cell's clean states (`denoise`) or the clean run
    with its corrupted ones (`noise`). `question` and `answer` are lengths in tokens. Corrupted are the image
    states, the question's embeddings (`words`), or both."""

    question: int
    answer: int
    samples: int
    cells: tuple[Cell, ...]
    direction: str = "denoise"
    images: bool = True
    words: bool = False

    @property
    def image_sets(self) -> int:
        """Sets of image states that the job brings: the clean one and, where images are corrupted, one for
        each sample."""
        return 1 + self.samples * self.images

    @property
    def entries(self) -> int:
        """Embedded questions that it brings, likewise."""
        return 1 + self.samples * self.words


@dataclass(frozen=True)
class StackShape:
    """What planning knows of a stack: its name, its sublayers (layer, sublayer name) in order, and the heads
    of its attention."""

    name: str
    steps: tuple[tuple[int, str], ...]
    heads: int


@dataclass(frozen=True)
class Step:
    """How one sublayer is run, and how its batch becomes the next one's.

    starts [runs + 1]: first row of each class in the batch that the sublayer sees. query_starts and
    state_starts [groups + 1]: for cross-attention, the rows that share a set of states, and that set's rows.
    residual_rows, update_rows [rows of the next batch]: see `reference.linear_add_norm`; None: unchanged.
    head_rows [P, heads]: rows that stand behind the batch before it is projected, mixed from it: head h of
    row p is that of row head_rows[p, h]. All int32.
    """

    layer: int
    sublayer: str
    rows: int
    starts: Tensor
    query_starts: Tensor | None
    state_starts: Tensor | None
    residual_rows: Tensor | None
    update_rows: Tensor | None
    head_rows: Tensor | None


@dataclass(frozen=True)
class StackPlan:
    """All steps of a stack; at its end run r is of class class_of[r], whose rows begin at starts[class]."""

    name: str
    entry_rows: Tensor | None
    steps: tuple[Step, ...]
    starts: Tensor
    class_of: Ints

    @property
    def rows(self) -> int:
        """Rows of the final batch."""
        return int(self.starts[-1])


@dataclass(frozen=True)
class Plan:
    """The plans of the question and the answer stack, and the rows of each run's answer.

    first_answer_row [runs]: a run's answer tokens are consecutive rows from there. Runs lie job after job:
    clean, corrupted samples, then cell after cell for the first sample, for the second, and so on.
    """

    question: StackPlan
    answer: StackPlan
    first_run: tuple[int, ...]
    first_answer_row: Ints


@lru_cache(maxsize=64)
def plan(question: StackShape, answer: StackShape, jobs: tuple[Job, ...], states: int) -> Plan:
    """Plan a pass over `jobs`. Each job brings its embedded questions and sets of `states` image states:
    clean, then corrupted."""
    first_run, restores = _runs(jobs)
    inputs = [_inputs_of(job) for job in jobs]
    first_set = _firsts([job.image_sets for job in jobs])
    first_entry = _firsts([job.entries for job in jobs])
    question_plan = _plan_stack(
        question,
        lengths=[job.question for job in jobs for _ in range(job.entries)],
        entry_of=np.concatenate(
            [first + own * job.words for first, own, job in zip(first_entry, inputs, jobs, strict=True)]
        ),
        source_of=np.concatenate(
            [first + own * job.images for first, own, job in zip(first_set, inputs, jobs, strict=True)]
        ),
        source_lengths=np.full(sum(job.image_sets for job in jobs), states),
        restores=restores[question.name],
    )
    answer_plan = _plan_stack(
        answer,
        lengths=[job.answer for job in jobs],
        entry_of=np.repeat(np.arange(len(jobs)), [_runs_of(job) for job in jobs]),
        source_of=question_plan.class_of,
        source_lengths=np.diff(question_plan.starts.numpy()),
        restores=restores[answer.name],
    )
    first_answer_row = answer_plan.starts.numpy()[answer_plan.class_of].astype(np.int64)
    return Plan(question_plan, answer_plan, first_run, first_answer_row)


@lru_cache(maxsize=64)
def straight_plan(shape: StackShape, runs: int, tokens: int) -> StackPlan:
    """A plan in which nothing forks: `runs` runs of `tokens` tokens, as the image stack is run."""
    return _plan_stack(
        shape,
        lengths=[tokens] * runs,
        entry_of=np.arange(runs),
        source_of=np.zeros(runs, dtype=np.int64),
        source_lengths=np.zeros(1, dtype=np.int64),
        restores=(),
    )


class _Override(NamedTuple):
    """A token's state, at a place, is that of another class of runs."""

    token: int
    place: str
    head: int | None
    donor: int


@dataclass(frozen=True)
class _Restore:
    """Replace a run's site by the donor run's state."""

    run: int
    site: Site
    donor: int


def _runs_of(job: Job) -> int:
    return 1 + job.samples * (1 + len(job.cells))


def _runs(jobs: Sequence[Job]) -> tuple[tuple[int, ...], dict[str, list[_Restore]]]:
    """First run of each job, and all restorations by stack."""
    first_run = []
    restores: dict[str, list[_Restore]] = defaultdict(list)
    runs = 0
    for job in jobs:
        first_run.append(runs)
        clean, run = runs, runs + 1 + job.samples
        for sample in range(job.samples):
            donor = clean if job.direction == "denoise" else clean + 1 + sample
            for cell in job.cells:
                for site in cell.sites:
                    restores[site.stack].append(_Restore(run, site, donor))
                run += 1
        runs = run
    return tuple(first_run), restores


def _inputs_of(job: Job) -> Ints:
    """For each run of a job the input that it is given: 0 the clean one, 1 + s that of sample s."""
    samples = 1 + np.arange(job.samples)
    base = samples if job.direction == "denoise" else np.zeros_like(samples)
    return np.concatenate(([0], samples, np.repeat(base, len(job.cells))))


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each part begins, of parts of so many items one behind the other."""
    return [0, *np.cumsum(counts)[:-1].tolist()]


class _Refined(NamedTuple):
    """See `Step`."""

    residual_rows: Tensor | None = None
    update_rows: Tensor | None = None
    head_rows: Tensor | None = None


class _Batch:
    """The classes of runs that share rows, sorted by the set of states that they read."""

    def __init__(self, entry_of: Ints, entry_lengths: Sequence[int], source_of: Ints) -> None:
        self.class_of = entry_of.copy()
        self.source_of = source_of
        self.lengths = np.asarray(entry_lengths)

    @property
    def starts(self) -> Ints:
        return np.concatenate(([0], np.cumsum(self.lengths)))

    def refine(self, restores: Iterable[_Restore], by_source: bool, heads: int = 0) -> _Refined:
        """Give rows of their own to runs that differ from here on."""
        overrides: dict[int, set[_Override]] = defaultdict(set)
        for restore in restores:
            donor = int(self.class_of[restore.donor])
            if donor != self.class_of[restore.run]:  # else the state is the clean one already
                site = restore.site
                overrides[restore.run].add(_Override(site.token, KINDS[site.kind].place, site.head, donor))
        split = by_source and not self._sorted_by_source()
        if not overrides and not split:
            return _Refined()

        source = self.source_of if split else np.zeros_like(self.source_of)
        keys: dict[tuple[int, int, frozenset[_Override]], list[int]] = defaultdict(list)
        nothing: frozenset[_Override] = frozenset()
        for run, key in enumerate(zip(self.class_of.tolist(), source.tolist(), strict=True)):
            keys[(*key, frozenset(overrides[run]) if run in overrides else nothing)].append(run)
        classes = sorted(keys.items(), key=lambda item: (self.source_of[item[1][0]], item[0][0], item[1][0]))

        old_starts = self.starts
        parents = np.array([parent for (parent, _, _), _ in classes])
        self.lengths = self.lengths[parents]
        starts = self.starts
        residual = np.repeat(old_starts[parents] - starts[:-1], self.lengths) + np.arange(starts[-1])
        update = residual.copy()
        mixed: dict[tuple[int, ...], int] = {}  # rows of `head_rows`
        for number, ((parent, _, changed), runs) in enumerate(classes):
            self.class_of[runs] = number
            by_token: dict[int, list[int]] = {}
            for token, place, head, donor in changed:
                if place == "head":
                    assert head is not None
                    sources = by_token.setdefault(token, [int(old_starts[parent]) + token] * heads)
                    sources[head] = int(old_starts[donor]) + token
            for token, sources in by_token.items():
                row = mixed.setdefault(tuple(sources), len(mixed))
                update[starts[number] + token] = old_starts[-1] + row
            # what is restored behind the projection stands, whatever its heads were
            for token, place, _, donor in changed:
                if place != "head":
                    update[starts[number] + token] = old_starts[donor] + token
                if place == "stream":
                    residual[starts[number] + token] = old_starts[donor] + token
        head_rows = _int32(np.array(list(mixed))) if mixed else None
        return _Refined(_int32(residual), _int32(update), head_rows)

    def groups(self, source_lengths: Ints) -> tuple[Tensor, Tensor]:
        """query_starts and state_starts: consecutive classes that read one set of states form a group."""
        sources = np.zeros(len(self.lengths), dtype=np.int64)
        sources[self.class_of] = self.source_of
        first = np.searchsorted(sources, np.arange(len(source_lengths) + 1))
        return _int32(self.starts[first]), _int32(np.concatenate(([0], np.cumsum(source_lengths))))

    def _sorted_by_source(self) -> bool:
        """Whether every class reads one set of states, and classes lie in the order of the sets."""
        lowest = np.full(len(self.lengths), np.iinfo(np.int64).max)
        highest = np.full(len(self.lengths), -1)
        np.minimum.at(lowest, self.class_of, self.source_of)
        np.maximum.at(highest, self.class_of, self.source_of)
        return bool((lowest == highest).all() and (np.diff(lowest) >= 0).all())


def _plan_stack(
    shape: StackShape,
    lengths: Sequence[int],
    entry_of: Ints,
    source_of: Ints,
    source_lengths: Ints,
    restores: Iterable[_Restore],
) -> StackPlan:
    restored_at: dict[tuple[int, str], list[_Restore]] = defaultdict(list)
    for restore in restores:
        restored_at[restore.site.layer, KINDS[restore.site.kind].sublayer].append(restore)

    batch = _Batch(entry_of, lengths, source_of)
    crosses = [name == "cross_attn" for _, name in shape.steps] + [False]
    entry = batch.refine((), by_source=crosses[0])
    steps = []
    for number, (layer, name) in enumerate(shape.steps):
        starts = batch.starts
        query_starts, state_starts = batch.groups(source_lengths) if crosses[number] else (None, None)
        refined = batch.refine(restored_at[layer, name], by_source=crosses[number + 1], heads=shape.heads)
        steps.append(
            Step(
                layer=layer,
                sublayer=name,
                rows=int(starts[-1]),
                starts=_int32(starts),
                query_starts=query_starts,
                state_starts=state_starts,
                residual_rows=refined.residual_rows,
                update_rows=refined.update_rows,
                head_rows=refined.head_rows,
            )
        )
    return StackPlan(
        name=shape.name,
        entry_rows=entry.residual_rows,
        steps=tuple(steps),
        starts=_int32(batch.starts),
        class_of=batch.class_of,
    )


def _int32(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))
