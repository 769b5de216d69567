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
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .cache import Cache
from .contexts import Attended, Contexts, Knockout, Override
from .devices import send
from .layout import Ints, Layout, int32
from .runs import Change, Job, Lose, Take, bases_of, changes_of, inputs_of
from .sites import KINDS

CACHED_BYTES = 2**27
"""Of plans that are kept."""


@dataclass(frozen=True)
class StackShape:
    """What planning knows of a stack: its name, its sublayers (layer, sublayer name) in order, and the heads
    of its attention."""

    name: str
    steps: tuple[tuple[int, str], ...]
    heads: int
    causal: bool


@dataclass(frozen=True)
class Step:
    """How one sublayer is run, and how its batch becomes the next one's.

    starts [classes + 1]: first row of each class in the batch that the sublayer sees. prefixes [classes, 2]:
    see `Layout.prefixes`. query_starts and state_starts [groups + 1]: for cross-attention, the rows that
    share a set of states, and that set's rows.
    residual_rows, update_rows [rows of the next batch]: see `reference.linear_add_norm`; None: unchanged.
    knockout: rows that stand behind the batch before it is projected.
    head_rows [P, heads]: rows that stand behind those, mixed from all before: head h of row p is that of row
    head_rows[p, h]. All int32.
    """

    layer: int
    sublayer: str
    rows: int
    starts: Tensor
    prefixes: Tensor | None
    query_starts: Tensor | None
    state_starts: Tensor | None
    residual_rows: Tensor | None
    update_rows: Tensor | None
    knockout: Knockout | None
    head_rows: Tensor | None


@dataclass(frozen=True)
class StackPlan:
    """All steps of a stack; at its end run r is of class class_of[r], whose rows `layout` tells."""

    name: str
    entry_rows: Tensor | None
    steps: tuple[Step, ...]
    layout: Layout
    class_of: Ints

    @property
    def rows(self) -> int:
        """Rows of the final batch."""
        return int(self.layout.starts[-1])


@dataclass(frozen=True)
class Plan:
    """The plans of the stacks that are run, in order, and the rows of each run's answer.

    answer_rows[j] [runs, A]: where the last stack holds what job j's runs answer. Runs lie job after job:
    clean, corrupted samples, then cell after cell for the first sample, for the second, and so on.
    """

    stacks: tuple[StackPlan, ...]
    answer_rows: tuple[Ints, ...]

    @property
    def rows(self) -> int:
        """Rows of the last stack."""
        return self.stacks[-1].rows

    @property
    def nbytes(self) -> int:
        """Of its tensors, about: of what says for each row where it comes from."""
        steps = [step for stack in self.stacks for step in stack.steps]
        moved = [rows for step in steps for rows in (step.residual_rows, step.update_rows, step.head_rows)]
        return sum(rows.nbytes for rows in moved if rows is not None)


_plans = Cache[Plan](CACHED_BYTES, lambda made: made.nbytes)
_elsewhere = Cache[tuple[Plan, Plan]](CACHED_BYTES, lambda both: both[1].nbytes)


def located(plan: Plan, device: torch.device) -> Plan:
    """A plan with its row numbers on a device, moved once. Those of the answers stay on the CPU."""
    if device.type == "cpu":
        return plan

    def moved() -> tuple[Plan, Plan]:  # the plan itself is kept too, so that its id stays its own
        return plan, replace(plan, stacks=tuple(_moved(stack, device) for stack in plan.stacks))

    return _elsewhere.get((id(plan), device), moved)[1]


def _moved(node: Any, device: torch.device) -> Any:
    """A part of a plan with all its tensors on a device."""
    if isinstance(node, Tensor):
        return send(node, device)
    if isinstance(node, tuple):
        return tuple(_moved(child, device) for child in node)
    if isinstance(node, StackPlan | Step | Knockout):
        return replace(node, **{own.name: _moved(getattr(node, own.name), device) for own in fields(node)})
    return node


def plan(image: StackShape | None, texts: tuple[StackShape, ...], jobs: tuple[Job, ...], states: int) -> Plan:
    """Plan a pass over `jobs` through the text stacks, in order, and before them through the image stack
    unless it is None.

    Each job brings sets of `states` rows for its image, clean and then corrupted: embedded patches, or the
    image stack's final states where that is not run. Its embedded texts likewise enter the first text stack,
    which attends to the image; each further one attends to the one before.
    """
    return _plans.get((image, texts, jobs, states), lambda: _planned(image, texts, jobs, states))


def _planned(
    image: StackShape | None, texts: tuple[StackShape, ...], jobs: tuple[Job, ...], states: int
) -> Plan:
    changes = changes_of(jobs)
    base_of = bases_of(jobs)
    inputs = [inputs_of(job) for job in jobs]
    first_set = _firsts([job.image_sets for job in jobs])
    first_entry = _firsts([job.entries for job in jobs])
    source_of = np.concatenate(
        [first + own * job.images for first, own, job in zip(first_set, inputs, jobs, strict=True)]
    )
    entry_of = np.concatenate(
        [first + own * job.words for first, own, job in zip(first_entry, inputs, jobs, strict=True)]
    )
    source_lengths: Ints = np.full(sum(job.image_sets for job in jobs), states)
    stacks = []
    if image is not None:
        nothing = np.zeros_like(source_of), np.zeros(1, dtype=np.int64)
        stacks.append(_plan_stack(image, source_lengths, source_of, *nothing, changes[image.name], base_of))
        source_of, source_lengths = stacks[-1].class_of, stacks[-1].layout.tokens
    for number, shape in enumerate(texts):
        entries = [1 if number else job.entries for job in jobs]
        lengths = np.repeat([job.tokens[number] for job in jobs], entries)
        if number:
            entry_of = np.repeat(np.arange(len(jobs)), [job.runs for job in jobs])
        stacks.append(
            _plan_stack(shape, lengths, entry_of, source_of, source_lengths, changes[shape.name], base_of)
        )
        # a stack that shares rows is the last one: what attends to another reads whole sets
        assert number == len(texts) - 1 or not shape.causal
        source_of, source_lengths = stacks[-1].class_of, stacks[-1].layout.tokens
    rows_of = [stacks[-1].layout.rows(number) for number in range(len(source_lengths))]
    answer_rows = []
    for job, own in zip(jobs, np.split(source_of, _firsts([job.runs for job in jobs])[1:]), strict=True):
        answer_rows.append(np.stack([rows_of[number][job.reads] for number in own.tolist()]))
    return Plan(tuple(stacks), tuple(answer_rows))


@lru_cache(maxsize=64)
def straight_plan(shape: StackShape, runs: int, tokens: int) -> Plan:
    """A plan in which nothing forks: `runs` runs of `tokens` tokens, as the image stack is run alone."""
    stack = _plan_stack(
        shape,
        lengths=np.full(runs, tokens),
        entry_of=np.arange(runs),
        source_of=np.zeros(runs, dtype=np.int64),
        source_lengths=np.zeros(1, dtype=np.int64),
        changes=(),
        base_of=np.arange(runs),
    )
    return Plan((stack,), ())


def _firsts(counts: Sequence[int]) -> list[int]:
    """Where each part begins, of parts of so many items one behind the other."""
    return [0, *np.cumsum(counts)[:-1].tolist()]


class _Refined(NamedTuple):
    """See `Step`."""

    residual_rows: Tensor | None = None
    update_rows: Tensor | None = None
    knockout: Knockout | None = None
    head_rows: Tensor | None = None


class _Batch:
    """The classes of runs that share rows, sorted by the set of states that they read."""

    def __init__(
        self, shape: StackShape, entry_of: Ints, entry_lengths: Ints, source_of: Ints, base_of: Ints
    ) -> None:
        self.class_of = entry_of.copy()
        self.layout = Layout.whole(entry_lengths)
        self.source_of = source_of
        self.base_of = base_of
        self.shape = shape

    def refine(
        self, changes: Iterable[Change], by_source: bool, attended: Attended | None = None
    ) -> _Refined:
        """Give rows of their own to runs that differ from here on."""
        overrides = self._overrides(changes)
        split = by_source and not self._sorted_by_source()
        if not overrides and not split:
            return _Refined()

        source = self.source_of if split else np.zeros_like(self.source_of)
        keys: dict[tuple[int, int, tuple[Override, ...]], list[int]] = defaultdict(list)
        for run, key in enumerate(zip(self.class_of.tolist(), source.tolist(), strict=True)):
            keys[(*key, overrides.get(run, ()))].append(run)
        classes = sorted(keys.items(), key=lambda item: (self.source_of[item[1][0]], item[0][0], item[1][0]))

        old = self.layout
        parents = np.array([parent for (parent, _, _), _ in classes])
        leads = np.array([runs[0] for _, runs in classes])
        changed = [
            (n, key[0], int(self.source_of[leads[n]]), key[2]) for n, (key, _) in enumerate(classes) if key[2]
        ]
        contexts = Contexts(old, self.shape.heads, attended)
        for _, parent, own_source, overridden in changed:
            contexts.see(parent, own_source, overridden)
        shared = np.zeros_like(parents)
        if self.shape.causal:
            shared = np.array([self._shared(*key, runs) for key, runs in classes])
        for number, (_, runs) in enumerate(classes):
            self.class_of[runs] = number
        self.layout = Layout(old.tokens[parents], shared, self.class_of[self.base_of[leads]])
        residual = old.gathered(parents, self.layout)
        update = residual.copy()
        for number, parent, own_source, overridden in changed:
            first = self.layout.starts[number] - shared[number]
            for token, row in contexts.rows(parent, own_source, overridden).items():
                update[first + token] = row
            # what is put behind the projection stands, whatever the context was; a stream, whatever was added
            for token, place, _, donor, _ in sorted(overridden, key=lambda o: o.place == "stream"):
                if place in ("update", "stream"):
                    update[first + token] = old.row(donor, token)
                if place == "stream":
                    residual[first + token] = old.row(donor, token)
        return _Refined(int32(residual), int32(update), contexts.knockout(), contexts.head_rows())

    def _shared(self, parent: int, _: int, changed: tuple[Override, ...], runs: list[int]) -> int:
        """How many tokens a class shares from now on with the run that it was before anything was changed."""
        bases = self.base_of[runs]
        if len(set(self.class_of[bases])) > 1 or (bases == runs).any():
            return 0
        if (self.source_of[bases] != self.source_of[runs]).any():
            return 0
        before = int(self.layout.shared[parent])
        if self.class_of[bases[0]] == parent:
            before = int(self.layout.tokens[parent])  # they were the same until now
        return min([before, *(override.token for override in changed)])

    def _overrides(self, changes: Iterable[Change]) -> dict[int, tuple[Override, ...]]:
        """What differs in each run, in one order: plans must not hang on that of a set."""
        overrides: dict[int, set[Override]] = defaultdict(set)
        cuts: dict[tuple[int, int], set[int]] = defaultdict(set)
        for change in changes:
            if isinstance(change, Lose):
                for query in change.cut.queries:
                    cuts[change.run, query] |= change.cut.keys
            else:
                site, donor = change.site, int(self.class_of[change.donor])
                head = -1 if site.head is None else site.head
                overrides[change.run].add(Override(site.token, KINDS[site.kind].place, head, donor))
        for (run, query), keys in cuts.items():
            overrides[run].add(Override(query, "context", cut=tuple(sorted(keys))))
        # a run that only takes states of its own class has them already; beside others they may undo those
        return {
            run: tuple(sorted(own))
            for run, own in overrides.items()
            if any(override.donor != self.class_of[run] for override in own)
        }

    def groups(self, source_lengths: Ints) -> tuple[Tensor, Tensor]:
        """query_starts and state_starts: consecutive classes that read one set of states form a group."""
        sources = np.zeros(len(self.layout.tokens), dtype=np.int64)
        sources[self.class_of] = self.source_of
        first = np.searchsorted(sources, np.arange(len(source_lengths) + 1))
        return int32(self.layout.starts[first]), int32(np.concatenate(([0], np.cumsum(source_lengths))))

    def _sorted_by_source(self) -> bool:
        """Whether every class reads one set of states, and classes lie in the order of the sets."""
        lowest = np.full(len(self.layout.tokens), np.iinfo(np.int64).max)
        highest = np.full(len(self.layout.tokens), -1)
        np.minimum.at(lowest, self.class_of, self.source_of)
        np.maximum.at(highest, self.class_of, self.source_of)
        return bool((lowest == highest).all() and (np.diff(lowest) >= 0).all())


def _plan_stack(
    shape: StackShape,
    lengths: Ints,
    entry_of: Ints,
    source_of: Ints,
    source_lengths: Ints,
    changes: Iterable[Change],
    base_of: Ints,
) -> StackPlan:
    changed_at: dict[tuple[int, str], list[Change]] = defaultdict(list)
    for change in changes:
        if isinstance(change, Take):
            changed_at[change.site.layer, KINDS[change.site.kind].sublayer].append(change)
        else:
            changed_at[change.cut.layer, change.cut.sublayer].append(change)

    batch = _Batch(shape, entry_of, lengths, source_of, base_of)
    attended = {
        "self_attn": Attended(shape.causal, None),
        "cross_attn": Attended(False, np.concatenate(([0], np.cumsum(source_lengths)))),
    }
    crosses = [name == "cross_attn" for _, name in shape.steps] + [False]
    entry = batch.refine((), by_source=crosses[0])
    steps = []
    for number, (layer, name) in enumerate(shape.steps):
        layout = batch.layout
        query_starts, state_starts = batch.groups(source_lengths) if crosses[number] else (None, None)
        refined = batch.refine(changed_at[layer, name], crosses[number + 1], attended.get(name))
        steps.append(
            Step(
                layer=layer,
                sublayer=name,
                rows=int(layout.starts[-1]),
                starts=int32(layout.starts),
                prefixes=layout.prefixes(),
                query_starts=query_starts,
                state_starts=state_starts,
                residual_rows=refined.residual_rows,
                update_rows=refined.update_rows,
                knockout=refined.knockout,
                head_rows=refined.head_rows,
            )
        )
    return StackPlan(
        name=shape.name,
        entry_rows=entry.residual_rows,
        steps=tuple(steps),
        layout=batch.layout,
        class_of=batch.class_of,
    )
