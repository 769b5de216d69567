"""What a pass costs, by formula: the operations that must be done, and the memory that they take.

A multiply-add counts as two operations. Only matrix products count; everything else should be hidden by
them, and the distance to (operations / the machine's measured rate) is the work left.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .program import CrossAttention, Head, Mlp, Program, SelfAttention, Stack, Sublayer
from .schedule import Plan, StackPlan, Step


def step_operations(sublayer: Sublayer, step: Step) -> int:
    """Operations of one sublayer on its batch."""
    rows = step.rows
    mixed = 0 if step.head_rows is None else len(step.head_rows)
    if step.knockout is not None:
        mixed += len(step.knockout.query_rows)
    match sublayer:
        case SelfAttention(qkv=qkv, out=out):
            lengths = step.starts.diff().long()
            seen = lengths if step.prefixes is None else lengths + step.prefixes[:, 1]
            if rows == int(seen.sum()) == len(lengths):  # one token: its own value is the context
                return 2 * rows * qkv.weight.numel() // 3 + 2 * (rows + mixed) * out.weight.numel()
            core = 4 * int((lengths * seen).sum()) * out.weight.shape[1]
            return 2 * rows * qkv.weight.numel() + 2 * (rows + mixed) * out.weight.numel() + core
        case CrossAttention(query=query, key=key, out=out, heads=heads):
            assert step.query_starts is not None
            assert step.state_starts is not None
            queries = step.query_starts.diff().long()
            states = step.state_starts.diff().long()
            width, source = query.weight.shape[0], key.shape[1]
            project = 4 * states * source * width + 4 * queries * states * width
            absorb = 4 * queries * source * width + 4 * queries * states * source * heads
            core = int(project.minimum(absorb)[queries > 0].sum())
            return 2 * rows * query.weight.numel() + 2 * (rows + mixed) * out.weight.numel() + core
        case Mlp(up=up, down=down):
            return 2 * rows * (up.weight.numel() + down.weight.numel())


def stack_operations(stack: Stack, plan: StackPlan) -> Iterator[int]:
    """Operations of each step of a stack."""
    for (_, sublayer), step in zip(stack.steps(), plan.steps, strict=True):
        yield step_operations(sublayer, step)


def stacks_operations(program: Program, plan: Plan) -> int:
    """Operations of the stacks that are planned."""
    return sum(sum(stack_operations(program.stacks[own.name], own)) for own in plan.stacks)


def operations(program: Program, plan: Plan) -> int:
    """Operations of a pass over the stacks that are planned, and the head."""
    return stacks_operations(program, plan) + head_operations(program.head, plan.rows)


def head_operations(head: Head, rows: int) -> int:
    """Operations of the vocabulary head on `rows` rows."""
    dense = 0 if head.dense is None else head.dense.weight.numel()
    return 2 * rows * (dense + head.decoder.weight.numel())


def image_operations(stack: Stack, plan: StackPlan) -> int:
    """Operations of the image encoder, patch embedding included."""
    patches = plan.rows - len(plan.layout.tokens)
    projection: Tensor = stack.embedding.projection.weight  # type: ignore[union-attr]
    return 2 * patches * projection.numel() + sum(stack_operations(stack, plan))


def row_bytes(stack: Stack) -> int:
    """Peak bytes of activations for each row of a stack's batch."""
    elements = 0
    for sublayer in stack.layers[0].sublayers:
        match sublayer:
            case SelfAttention(qkv=qkv):
                own = qkv.weight.shape[0] + 3 * stack.width
            case CrossAttention():
                own = 4 * stack.width
            case Mlp(up=up):
                own = up.weight.shape[0] + 3 * stack.width
        elements = max(elements, own)
    size = stack.embedding.positions.element_size()
    return elements * (size if size >= 4 else size + 4)  # bfloat16 products may go through float32
