"""Runs a Program under a schedule: the one orchestrator, the same for every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cost
from .ops import OpSet
from .program import (
    CrossAttention,
    Mlp,
    Norm,
    PatchEmbedding,
    Program,
    SelfAttention,
    Stack,
    Sublayer,
    TokenEmbedding,
)
from .schedule import Job, Plan, StackPlan, StackShape, Step, plan, straight_plan
from .sites import Cell

DEFAULT_MEMORY = 128 * 2**20
"""Bytes of activations that a pass may take unless told otherwise: larger passes are hardly faster."""

Progress = Callable[[int, int], None]
"""Called with operations done and operations in all."""

Tick = Callable[[int], None]
"""Called with the operations that were just done."""


@dataclass(frozen=True)
class Task:
    """One question to trace.

    question_ids [T] and answer_ids [A] (int64; None: the first token of the clean answer), clean [N, D] and
    corrupted [S, N, D] image states, the cells to restore, in which direction (see `schedule.Job`), and
    corrupted embeddings of the question's tokens, words [S, T, C]. Of `corrupted` and `words` one may be
    None: clean.
    """

    question_ids: Tensor
    answer_ids: Tensor | None
    clean: Tensor
    corrupted: Tensor | None
    cells: tuple[Cell, ...]
    direction: str = "denoise"
    words: Tensor | None = None

    @property
    def samples(self) -> int:
        """Corrupted inputs."""
        given = self.words if self.corrupted is None else self.corrupted
        assert given is not None
        return len(given)

    @property
    def images(self) -> tuple[Tensor, ...]:
        """Sets of image states, the clean one and then the corrupted ones: each [sets, N, D]."""
        clean = self.clean[None]
        return (clean,) if self.corrupted is None else (clean, self.corrupted)

    def part(self, first: int, last: int) -> Task:
        """The task of these samples alone."""
        corrupted, words = (None if x is None else x[first:last] for x in (self.corrupted, self.words))
        return replace(self, corrupted=corrupted, words=words)

    @property
    def job(self) -> Job:
        """The task's shape."""
        answer = 1 if self.answer_ids is None else len(self.answer_ids)
        return Job(
            len(self.question_ids),
            answer,
            self.samples,
            self.cells,
            self.direction,
            images=self.corrupted is not None,
            words=self.words is not None,
        )


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the answer's tokens: clean [A], corrupted [S, A], restored [S, cells, A]."""

    answer_ids: Tensor
    clean: Tensor
    corrupted: Tensor
    restored: Tensor


@torch.inference_mode()
def encode_images(
    program: Program, ops: OpSet, pixels: Tensor, edit: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Image states [B, N, D] of pixel values [B, 3, H, W]; `edit` changes the embedded patches [B, N, D]."""
    stack = program.image
    embedded = _embed_patches(stack, pixels)  # [B, N, D]
    if edit is not None:
        embedded = edit(embedded).contiguous()
    images, tokens, width = embedded.shape
    plan = image_plan(program, images, tokens)
    states = _run_stack(stack, plan, ops, embedded.view(-1, width), None)
    return states.view(images, tokens, width)


def image_plan(program: Program, images: int, tokens: int) -> StackPlan:
    """The plan by which `encode_images` runs the image stack."""
    return straight_plan(stack_shape(program.image), images, tokens)


def stack_shape(stack: Stack) -> StackShape:
    """What planning needs to know of a stack."""
    steps = tuple((layer, sublayer.name) for layer, sublayer in stack.steps())
    return StackShape(stack.name, steps, stack.heads)


@torch.inference_mode()
def score(
    program: Program, ops: OpSet, tasks: Sequence[Task], memory: int, progress: Progress | None = None
) -> list[Scores]:
    """Trace all tasks, as many runs in one pass as `memory` bytes of activations allow.

    Tasks share a pass, and one that is too large for a pass is split, by samples first and then by cells;
    every part takes its clean and corrupted runs along, so the numbers stay the same but for rounding.
    """
    passes = list(_passes(program, tasks, memory))
    plans = [_plan(program, [part for _, part in parts]) for parts in passes]
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


def _run(program: Program, ops: OpSet, tasks: Sequence[Task], plan: Plan, tick: Tick | None) -> list[Scores]:
    """One pass over the text stacks and the head."""
    images = torch.cat([states for task in tasks for states in task.images]).flatten(0, 1)
    embedded = torch.cat([_embed_question(program.question, task) for task in tasks])
    states = _run_stack(program.question, plan.question, ops, embedded, images, tick)

    given = [_decoder_input(program, task) for task in tasks]
    positions = torch.cat([torch.arange(len(ids)) for ids in given])
    words = _words(program.answer)[torch.cat(given)]
    embedded = _embed_words(program.answer, words, positions)
    hidden = _run_stack(program.answer, plan.answer, ops, embedded, states, tick)

    head = program.head
    hidden = ops.linear_gelu(hidden, head.dense.weight, head.dense.bias)
    hidden = _layer_norm(hidden, head.norm)  # [rows, C]
    first_row = torch.from_numpy(plan.first_answer_row)
    tokens = torch.zeros(plan.answer.rows, dtype=torch.int64)
    rows, answers = [], []
    for number, task in enumerate(tasks):
        first = plan.first_run[number]
        runs = 1 + task.samples * (1 + len(task.cells))
        answer = task.answer_ids
        if answer is None:
            clean = hidden[first_row[first]][None]
            answer = (
                (F.linear(clean, head.decoder.weight).float() + head.decoder.bias.float()).argmax(1).cpu()
            )
        rows.append(first_row[first : first + runs, None] + torch.arange(len(answer)))  # [runs, A]
        tokens[rows[-1]] = answer
        answers.append(answer)
    logits, log_sum_exp = ops.token_logits(hidden, head.decoder.weight, head.decoder.bias, tokens[:, None])
    log_probs = logits[:, 0] - log_sum_exp
    if tick is not None:
        tick(cost.head_operations(head, plan.answer.rows))
    return [
        _scores(task, answer, log_probs[own]) for task, answer, own in zip(tasks, answers, rows, strict=True)
    ]


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
        normed = _layer_norm(stream, norms[0])
        norms = [*norms[1:], stack.final_norm]  # each sublayer ends with the next one's norm
    for sublayer, norm, step in zip(sublayers, norms, plan.steps, strict=True):
        inner = _inner(ops, sublayer, step, normed, states)
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
            if step.rows == len(step.starts) - 1:
                # a run of one token attends to itself alone: the softmax over one key is 1
                return ops.linear(x, qkv.weight[-x.shape[1] :], None)
            return ops.self_attention(ops.linear(x, qkv.weight, qkv.bias), step.starts, heads, causal)
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


def _words(stack: Stack) -> Tensor:
    """The table of word embeddings [V, C]."""
    assert isinstance(stack.embedding, TokenEmbedding)
    return stack.embedding.words


def _embed_words(stack: Stack, words: Tensor, positions: Tensor) -> Tensor:
    """Embedded tokens [..., C] of word embeddings [..., C] at these positions."""
    assert isinstance(stack.embedding, TokenEmbedding)
    return _layer_norm(words + stack.embedding.positions[positions], stack.embedding.norm)


def _embed_question(stack: Stack, task: Task) -> Tensor:
    """The clean question, and the corrupted ones if there are any, one behind the other: [rows, C]."""
    words = _words(stack)[task.question_ids][None]
    if task.words is not None:
        words = torch.cat((words, task.words))
    return _embed_words(stack, words, torch.arange(len(task.question_ids))).flatten(0, 1)


def _embed_patches(stack: Stack, pixels: Tensor) -> Tensor:
    """Class token and patches [B, 1 + patches, C] of pixels [B, 3, H, W], positions added."""
    embedding = stack.embedding
    assert isinstance(embedding, PatchEmbedding)
    size = embedding.patch_size
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2)  # [B, patches, 3 p p]
    patches = F.linear(
        patches.to(embedding.positions.dtype), embedding.projection.weight, embedding.projection.bias
    )
    class_token = embedding.class_token.expand(len(pixels), 1, -1)
    return torch.cat((class_token, patches), dim=1) + embedding.positions


def _layer_norm(x: Tensor, norm: Norm) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _decoder_input(program: Program, task: Task) -> Tensor:
    """The answer's tokens shifted by the start token: [A]."""
    start = torch.tensor([program.start_token])
    return start if task.answer_ids is None else torch.cat((start, task.answer_ids[:-1]))


def _plan(program: Program, tasks: Sequence[Task]) -> Plan:
    jobs = tuple(task.job for task in tasks)
    return plan(stack_shape(program.question), stack_shape(program.answer), jobs, states=len(tasks[0].clean))


def _passes(program: Program, tasks: Sequence[Task], memory: int) -> Iterator[list[tuple[int, Task]]]:
    """Parts of tasks (number, part) that go through the model together."""
    parts: list[tuple[int, Task]] = []
    taken = 0
    for number, task in enumerate(tasks):
        job = task.job
        run_bytes = max(
            job.question * cost.row_bytes(program.question),
            job.answer * cost.row_bytes(program.answer),
        )
        for part in _split(task, max(2, memory // run_bytes)):
            needed = run_bytes * (1 + part.samples * (1 + len(part.cells)))
            if parts and taken + needed > memory:
                yield parts
                parts, taken = [], 0
            parts.append((number, part))
            taken += needed
    yield parts


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


def _scores(task: Task, answer: Tensor, log_probs: Tensor) -> Scores:
    """Sort the log-probabilities [runs, A] of a task's runs."""
    samples = task.samples
    return Scores(
        answer_ids=answer,
        clean=log_probs[0],
        corrupted=log_probs[1 : 1 + samples],
        restored=log_probs[1 + samples :].unflatten(0, (samples, len(task.cells))),
    )


def _merge(task: Task, parts: Sequence[Scores]) -> Scores:
    """Put together what `_split` took apart."""
    if len(parts) == 1:
        return parts[0]
    restored = torch.cat([part.restored.flatten(0, 1) for part in parts])
    samples, cells = task.samples, len(task.cells)
    # parts of one sample repeat its corrupted run
    corrupted = torch.cat([part.corrupted for part in parts])[:: max(1, -(-len(parts) // samples))]
    return Scores(
        answer_ids=parts[0].answer_ids,
        clean=parts[0].clean,
        corrupted=corrupted,
        restored=restored.unflatten(0, (samples, cells)),
    )


def _counter(progress: Progress, total: int) -> Tick:
    done = 0

    def tick(operations: int) -> None:
        nonlocal done
        done += operations
        progress(done, total)

    return tick
