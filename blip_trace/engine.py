"""Runs a Program under a schedule: the one orchestrator, the same for every backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from . import cost
from .contexts import Knockout
from .devices import fetch
from .embedding import embed_texts, entering, layer_norm
from .graphs import Graphs
from .head import Asked, Ending, answers, ending, read_answers
from .metrics import OWN, Readings
from .ops import OpSet
from .passes import Part, can_shrink, merge, pack
from .program import (
    CrossAttention,
    Mlp,
    Program,
    SelfAttention,
    Stack,
    Sublayer,
)
from .schedule import Plan, StackPlan, StackShape, Step, located, plan, straight_plan
from .task import Scores, Task

Progress = Callable[[int, int], None]
"""Called with operations done and operations in all."""

KNOCKOUT_BYTES = 2**25
"""Of states that are gathered at once for attention with edges cut."""

AHEAD = 64
"""Passes that are begun before what was read of the first one is looked at."""

Pending = Callable[[], list[Scores]]
"""Waits for a pass: what was read of its tasks."""

Tick = Callable[[int], None]
"""Called with the operations that were just done."""


@torch.inference_mode()
def encode_image(program: Program, ops: OpSet, embedded: Tensor, graphs: Graphs | None = None) -> Tensor:
    """The image stack's final states [B, N, C] of embedded patches [B, N, C]."""
    images, tokens, width = embedded.shape
    plan = image_plan(program, images, tokens)
    states = _through(program, ops, plan, graphs, None, embedded.reshape(-1, width))
    if graphs is not None:
        states = states.clone()  # a graph overwrites what it made
    return states.view(images, tokens, width)


def image_plan(program: Program, images: int, tokens: int) -> Plan:
    """The plan by which `encode_image` runs the image stack."""
    return straight_plan(stack_shape(program.image), images, tokens)


def stack_shape(stack: Stack) -> StackShape:
    """What planning needs to know of a stack."""
    steps = tuple((layer, sublayer.name) for layer, sublayer in stack.steps())
    return StackShape(stack.name, steps, stack.heads, stack.causal)


def score(
    program: Program,
    ops: OpSet,
    tasks: Sequence[Task],
    memory: int | None,
    progress: Progress | None = None,
    graphs: Graphs | None = None,
) -> list[Scores]:
    """Trace all tasks, as many runs in one pass as `memory` bytes of activations allow (None: see
    `passes.budget`). Where memory does not suffice after all, the passes that are left are made half as
    large, with a warning. graphs: see there; those of this program.
    """
    return begin(program, ops, tasks, memory, progress, graphs)()


@torch.inference_mode()
def begin(
    program: Program,
    ops: OpSet,
    tasks: Sequence[Task],
    memory: int | None,
    progress: Progress | None = None,
    graphs: Graphs | None = None,
) -> Pending:
    """What `score` does as far as a GPU need not be waited for: while it works, more can be prepared. What is
    returned waits, and has the scores."""
    halvings = 0
    passes = pack(program, [Part(number, task) for number, task in enumerate(tasks)], memory)
    tick = None if progress is None else _counter(progress, _operations(program, passes))
    answers = [task.answer_ids for task in tasks]
    pieces: list[list[tuple[Part, Scores]]] = [[] for _ in tasks]
    running: list[tuple[list[Part], Pending]] = []

    def settle() -> None:
        parts, pending = running.pop(0)
        for part, scores in zip(parts, pending(), strict=True):
            answers[part.number] = scores.answer_ids
            pieces[part.number].append((part, scores))

    while passes:
        parts = passes.pop(0)
        known = [replace(part.task, answer_ids=answers[part.number]) for part in parts]
        try:
            pending = _run(program, ops, known, plan_pass(program, known), tick, graphs)
        except torch.OutOfMemoryError:
            if not can_shrink(parts):
                raise
            halvings += 1
            _make_room(graphs)
            left = [part for own in (parts, *passes) for part in own]
            passes = pack(program, left, memory, halvings)
            warnings.warn(
                f"out of memory: going on with passes 1/{2**halvings} as large; give `memory` to begin so",
                stacklevel=2,
            )
            continue
        running.append((parts, pending))
        # an answer of the model's own must be the same in all parts of a task
        open_ended = any(task.answer_ids[-1] == OWN for task in known)
        split = any(part.task is not tasks[part.number] for part in parts)
        while len(running) > (0 if open_ended and split else AHEAD):
            settle()

    @torch.inference_mode()
    def finish() -> list[Scores]:
        while running:
            settle()
        return [merge(task, own) for task, own in zip(tasks, pieces, strict=True)]

    return finish


def count_operations(program: Program, tasks: Sequence[Task], memory: int | None) -> int:
    """What `score` will do, by formula: see `cost`."""
    return _operations(program, pack(program, [Part(0, task) for task in tasks], memory))


def _operations(program: Program, passes: Sequence[Sequence[Part]]) -> int:
    return sum(cost.operations(program, plan_pass(program, [part.task for part in own])) for own in passes)


def _make_room(graphs: Graphs | None) -> None:
    if graphs is not None:
        graphs.clear()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _run(
    program: Program,
    ops: OpSet,
    tasks: Sequence[Task],
    plan: Plan,
    tick: Tick | None,
    graphs: Graphs | None = None,
) -> Pending:
    """One pass over the planned stacks and the head."""
    images = torch.cat([rows for task in tasks for rows in task.images]).flatten(0, 1)
    texts = [entering(program, stack, tasks) for stack in program.texts]
    asked = [
        Asked(torch.from_numpy(rows), task.answer_ids, task.foil_ids, task.reads)
        for rows, task in zip(plan.answer_rows, tasks, strict=True)
    ]
    last = ending(program.head, ops, asked, plan.rows, images.device)
    made = _through(program, ops, plan, graphs, tick, images, texts, last)
    found = read_answers(program.head, ops, made, asked) if last is None else _fetched(asked, made)
    if tick is not None:
        tick(cost.head_operations(program.head, plan.rows))
    return lambda: [_scores(task, *own) for task, own in zip(tasks, found(), strict=True)]


def _fetched(asked: Sequence[Asked], made: Tensor) -> Callable[[], list[tuple[Tensor, Readings]]]:
    """What the ending of a pass made, on its way back."""
    wait = fetch(made)
    return lambda: answers(asked, wait())


def _through(
    program: Program,
    ops: OpSet,
    plan: Plan,
    graphs: Graphs | None,
    tick: Tick | None,
    images: Tensor,
    texts: Sequence[tuple[Tensor, ...]] = (),
    last: Ending | None = None,
) -> Tensor:
    """The final states [rows, C] of the planned stacks, or what the ending makes of them: directly, or by a
    graph."""
    here = located(plan, images.device)
    name, function, inputs = (None, None, ()) if last is None else last
    counts, entered = [len(own) for own in texts], [part for own in texts for part in own]
    if graphs is None:
        return _run_stacks(program, ops, here, tick, counts, function, images, *entered, *inputs)
    key, whole = (id(here), name), partial(_run_stacks, program, ops, here, None, counts, function)
    made = graphs.run(key, whole, images, *entered, *inputs)
    if tick is not None:
        tick(cost.stacks_operations(program, plan))
    return made


def _run_stacks(
    program: Program,
    ops: OpSet,
    plan: Plan,
    tick: Tick | None,
    counts: Sequence[int],
    last: Callable[..., Tensor] | None,
    images: Tensor,
    *inputs: Tensor,
) -> Tensor:
    """Run the planned stacks one behind the other: the image stack over embedded patches `images` [rows, C],
    unless those are its final states already; then each text stack over what enters it, as many inputs as
    `counts` says; and last the ending, with those that are left."""
    states = images
    left, each = iter(inputs), iter(counts)
    for shape in plan.stacks:
        stack = program.stacks[shape.name]
        if stack is program.image:
            states = _run_stack(stack, shape, ops, states, None, tick)
        else:
            embedded = embed_texts(stack, *islice(left, next(each)))
            states = _run_stack(stack, shape, ops, embedded, states, tick)
    return states if last is None else last(states, *left)


def _run_stack(
    stack: Stack,
    plan: StackPlan,
    ops: OpSet,
    embedded: Tensor,
    states: Tensor | None,
    tick: Tick | None,
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
    taken = rows.long()[..., None].expand(-1, -1, parts.shape[2])  # [P, H, d]
    mixed: Tensor = parts.gather(0, taken)
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
    marks = knockout.state_marks
    for first, last in _blocks(marks, KNOCKOUT_BYTES // (states.shape[1] * states.element_size())):
        seen = states[knockout.state_rows[marks[first] : marks[last]]]
        own = slice(knockout.query_marks[first], knockout.query_marks[last])
        queries, sets = (all_[first : last + 1] - all_[first] for all_ in (starts, ends))
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


def _scores(task: Task, answer: Tensor, readings: Readings) -> Scores:
    """Sort the readings [runs, A] of a task's runs."""
    samples, cells = task.samples, len(task.cells)
    return Scores(
        answer_ids=answer,
        clean={name: read[0] for name, read in readings.items()},
        corrupted={name: read[1 : 1 + samples] for name, read in readings.items()},
        patched={name: read[1 + samples :].unflatten(0, (samples, cells)) for name, read in readings.items()},
    )


def _counter(progress: Progress, total: int) -> Tick:
    done = 0

    def tick(operations: int) -> None:
        nonlocal done
        done += operations
        progress(done, total)

    return tick
