"""Runs a Program under a schedule: the one orchestrator, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import cost
from .contexts import Knockout
from .embedding import embed_text, layer_norm
from .head import Asked, read_answers
from .metrics import Readings, Reads
from .ops import OpSet
from .program import (
    CrossAttention,
    Mlp,
    Program,
    SelfAttention,
    Stack,
    Sublayer,
)
from .runs import Job
from .schedule import Plan, StackPlan, StackShape, Step, plan, straight_plan
from .sites import Cell

DEFAULT_MEMORY = 128 * 2**20
"""Bytes of activations that a pass may take unless told otherwise: larger passes are hardly faster."""

DEFAULT_IMAGE_MEMORY = 512 * 2**20
"""The same where the image stack is traced: its runs are as large as the picture, and every pass takes the
clean and the corrupted run along."""

Progress = Callable[[int, int], None]
"""Called with operations done and operations in all."""

KNOCKOUT_BYTES = 2**25
"""Of states that are gathered at once for attention with edges cut."""

Tick = Callable[[int], None]
"""Called with the operations that were just done."""


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


@torch.inference_mode()
def encode_image(program: Program, ops: OpSet, embedded: Tensor) -> Tensor:
    """The image stack's final states [B, N, C] of embedded patches [B, N, C]."""
    images, tokens, width = embedded.shape
    plan = image_plan(program, images, tokens)
    states = _run_stack(program.image, plan, ops, embedded.reshape(-1, width), None)
    return states.view(images, tokens, width)


def image_plan(program: Program, images: int, tokens: int) -> StackPlan:
    """The plan by which `encode_image` runs the image stack."""
    return straight_plan(stack_shape(program.image), images, tokens)


def stack_shape(stack: Stack) -> StackShape:
    """What planning needs to know of a stack."""
    steps = tuple((layer, sublayer.name) for layer, sublayer in stack.steps())
    return StackShape(stack.name, steps, stack.heads, stack.causal)


@torch.inference_mode()
def score(
    program: Program, ops: OpSet, tasks: Sequence[Task], memory: int | None, progress: Progress | None = None
) -> list[Scores]:
    """Trace all tasks, as many runs in one pass as `memory` bytes of activations allow (None: as
    the constants above).

    Tasks share a pass, and one that is too large for a pass is split, by samples first and then by cells;
    every part takes its clean and corrupted runs along, so the numbers stay the same but for rounding.
    """
    passes = list(_passes(program, tasks, memory))
    plans = [plan_pass(program, [part for _, part in parts]) for parts in passes]
    tick = None
    if progress is not None:
        tick = _counter(progress, sum(cost.operations(program, p) for p in plans))
    answers = [task.answer_ids for task in tasks]
    pieces: list[list[Scores]] = [[] for _ in tasks]
    for parts, shape in zip(passes, plans, strict=True):
        known = [replace(part, answer_ids=answers[number]) for number, part in parts]
        for (number, _), scores in zip(parts, _run(program, ops, known, shape, tick), strict=True):
            answers[number] = scores.answer_ids
            pieces[number].append(scores)
    return [_merge(task, own) for task, own in zip(tasks, pieces, strict=True)]


def count_operations(program: Program, tasks: Sequence[Task], memory: int | None) -> int:
    """What `score` will do, by formula: see `cost`."""
    passes = _passes(program, tasks, memory)
    return sum(cost.operations(program, plan_pass(program, [part for _, part in parts])) for parts in passes)


def _run(program: Program, ops: OpSet, tasks: Sequence[Task], plan: Plan, tick: Tick | None) -> list[Scores]:
    """One pass over the planned stacks and the head."""
    states = torch.cat([rows for task in tasks for rows in task.images]).flatten(0, 1)
    for shape in plan.stacks:
        stack = program.stacks[shape.name]
        if stack is program.image:
            states = _run_stack(stack, shape, ops, states, None, tick)
        else:
            embedded = torch.cat(
                [embed_text(program, stack, task.text_ids, task.answer_ids, task.words) for task in tasks]
            )
            states = _run_stack(stack, shape, ops, embedded, states, tick)
    asked = [
        Asked(torch.from_numpy(rows), task.answer_ids, task.foil_ids, task.reads)
        for rows, task in zip(plan.answer_rows, tasks, strict=True)
    ]
    read = read_answers(program.head, ops, states, asked)
    if tick is not None:
        tick(cost.head_operations(program.head, plan.rows))
    return [_scores(task, *own) for task, own in zip(tasks, read, strict=True)]


def _run_stack(
    stack: Stack,
    plan: StackPlan,
    ops: OpSet,
    embedded: Tensor,
    states: Tensor | None,
    tick: Tick | None = None,
) -> Tensor:
    """Run a stack's layers over embedded rows [rows, C]; returns its final states [rows, C]."""
    sublayers = [sublayer for _, sublayer in stack.steps()]
    norms = [sublayer.norm for sublayer in sublayers]
    stream = embedded if plan.entry_rows is None else embedded[plan.entry_rows]
    normed = stream
    if stack.norm_first:
        assert stack.final_norm is not None
        normed = layer_norm(stream, norms[0])
        norms = [*norms[1:], stack.final_norm]  # each sublayer ends with the next one's norm
    for sublayer, norm, step in zip(sublayers, norms, plan.steps, strict=True):
        inner = _inner(ops, sublayer, step, normed, states)
        if step.knockout is not None:
            inner = torch.cat((inner, _knocked_out(ops, sublayer, step.knockout, normed, states)))
        if step.head_rows is not None:
            inner = torch.cat((inner, _mix_heads(inner, step.head_rows)))
        out = sublayer.down if isinstance(sublayer, Mlp) else sublayer.out
        normed, total = ops.linear_add_norm(
            inner,
            out.weight,
            out.bias,
            stream,
            step.residual_rows,
            step.update_rows,
            norm.weight,
            norm.bias,
            norm.eps,
            stack.norm_first,
        )
        stream = total if stack.norm_first else normed
        if tick is not None:
            tick(cost.step_operations(sublayer, step))
    return normed


def _inner(ops: OpSet, sublayer: Sublayer, step: Step, x: Tensor, states: Tensor | None) -> Tensor:
    """What a sublayer computes before its last projection: [rows, C], or [rows, 4 C] for an MLP."""
    match sublayer:
        case SelfAttention(qkv=qkv, heads=heads, causal=causal):
            if step.rows == len(step.starts) - 1 and step.prefixes is None:
                # a run of one token attends to itself alone: the softmax over one key is 1
                return ops.linear(x, qkv.weight[-x.shape[1] :], None)
            return ops.self_attention(
                ops.linear(x, qkv.weight, qkv.bias), step.starts, step.prefixes, heads, causal
            )
        case CrossAttention(query=query, key=key, value=value, heads=heads):
            assert states is not None
            assert step.query_starts is not None
            assert step.state_starts is not None
            q = ops.linear(x, query.weight, query.bias)
            return ops.cross_attention(q, states, key, value, step.query_starts, step.state_starts, heads)
        case Mlp(up=up):
            return ops.linear_gelu(x, up.weight, up.bias)


def _mix_heads(context: Tensor, rows: Tensor) -> Tensor:
    """Rows [P, C] mixed from those of `context` [rows, C]: head h of row p is that of row rows[p, h]."""
    heads = rows.shape[1]
    parts = context.unflatten(1, (heads, -1))  # [rows, H, d]
    mixed: Tensor = parts[rows.long(), torch.arange(heads)]  # [P, H, d]
    return mixed.flatten(1)


def _knocked_out(
    ops: OpSet, sublayer: Sublayer, knockout: Knockout, x: Tensor, states: Tensor | None
) -> Tensor:
    """Context [P, C] of the rows that lost edges: each set of rows that are still seen is a set of states of
    its own, in self-attention too."""
    match sublayer:
        case SelfAttention(qkv=qkv, heads=heads):
            query, key, value = qkv.weight.chunk(3)
            bias = qkv.bias[: len(query)]
            states = x
        case CrossAttention(query=projection, key=key, value=value, heads=heads):
            query, bias = projection.weight, projection.bias
        case _:
            raise ValueError("only attention has edges that can be cut")
    assert states is not None
    q = ops.linear(x[knockout.query_rows], query, bias)
    starts, ends = knockout.query_starts, knockout.state_starts
    parts = []
    for first, last in _blocks(ends.tolist(), KNOCKOUT_BYTES // (states.shape[1] * states.element_size())):
        seen = states[knockout.state_rows[ends[first] : ends[last]]]
        own = slice(int(starts[first]), int(starts[last]))
        queries, sets = (marks[first : last + 1] - marks[first] for marks in (starts, ends))
        parts.append(ops.cross_attention(q[own], seen, key, value, queries, sets, heads))
    return torch.cat(parts)


def _blocks(marks: Sequence[int], rows: int) -> Iterator[tuple[int, int]]:
    """Consecutive groups (first, behind the last) of at most so many rows together, and of one at least."""
    first = 0
    for group in range(1, len(marks)):
        if group == len(marks) - 1 or marks[group + 1] - marks[first] > rows:
            yield first, group
            first = group


def plan_pass(program: Program, tasks: Sequence[Task]) -> Plan:
    """The plan by which tasks go through the model together."""
    jobs = tuple(task.job(program) for task in tasks)
    image = stack_shape(program.image) if tasks[0].patches else None
    return plan(image, tuple(map(stack_shape, program.texts)), jobs, states=len(tasks[0].clean))


def _passes(program: Program, tasks: Sequence[Task], memory: int | None) -> Iterator[list[tuple[int, Task]]]:
    """Parts of tasks (number, part) that go through the model together."""
    parts: list[tuple[int, Task]] = []
    taken = 0
    for number, task in enumerate(tasks):
        run_bytes = _run_bytes(program, task)
        default = DEFAULT_IMAGE_MEMORY if task.patches else DEFAULT_MEMORY
        budget = default if memory is None else memory
        for part in _split(task, max(2, budget // run_bytes)):
            needed = run_bytes * (1 + part.samples * (1 + len(part.cells)))
            if parts and (taken + needed > budget or parts[0][1].patches != part.patches):
                yield parts
                parts, taken = [], 0
            parts.append((number, part))
            taken += needed
    yield parts


def _run_bytes(program: Program, task: Task) -> int:
    """Bytes of activations that each run of a task takes."""
    tokens = task.job(program).tokens
    largest = max(n * cost.row_bytes(stack) for n, stack in zip(tokens, program.texts, strict=True))
    if task.patches:
        largest = max(largest, len(task.clean) * cost.row_bytes(program.image))
    return largest


def _split(task: Task, runs: int) -> Iterator[Task]:
    """Parts of a task of at most `runs` runs each, the clean one not counted."""
    cells = len(task.cells)
    samples = runs // (1 + cells)
    if samples:
        for first in range(0, task.samples, samples):
            yield task.part(first, first + samples)
        return
    for sample in range(task.samples):
        one = task.part(sample, sample + 1)
        for first in range(0, cells, runs - 1):
            yield replace(one, cells=task.cells[first : first + runs - 1])


def _scores(task: Task, answer: Tensor, readings: Readings) -> Scores:
    """Sort the readings [runs, A] of a task's runs."""
    samples, cells = task.samples, len(task.cells)
    return Scores(
        answer_ids=answer,
        clean={name: read[0] for name, read in readings.items()},
        corrupted={name: read[1 : 1 + samples] for name, read in readings.items()},
        patched={name: read[1 + samples :].unflatten(0, (samples, cells)) for name, read in readings.items()},
    )


def _merge(task: Task, parts: Sequence[Scores]) -> Scores:
    """Put together what `_split` took apart."""
    if len(parts) == 1:
        return parts[0]
    samples, cells = task.samples, len(task.cells)

    def patched(name: str) -> Tensor:
        rows: Tensor = torch.cat([part.patched[name].flatten(0, 1) for part in parts])
        return rows.view(samples, cells, *rows.shape[1:])

    def corrupted(name: str) -> Tensor:
        # parts of one sample repeat its corrupted run
        rows = torch.cat([part.corrupted[name] for part in parts])
        each: Tensor = rows[:: max(1, -(-len(parts) // samples))]
        return each

    first = parts[0]
    return Scores(
        answer_ids=first.answer_ids,
        clean=first.clean,
        corrupted={name: corrupted(name) for name in first.clean},
        patched={name: patched(name) for name in first.clean},
    )


def _counter(progress: Progress, total: int) -> Tick:
    done = 0

    def tick(operations: int) -> None:
        nonlocal done
        done += operations
        progress(done, total)

    return tick
