"""Attention of packed groups in one kernel, which both attention ops launch."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .product import _BUSY, precision_of

# How many groups a step of the search for a tile's group looks at together.
_PROBES = tl.constexpr(128)


@triton.jit
def _group_of(tile, starts, groups, BLOCK_ROWS: tl.constexpr):
    """The group that a tile belongs to: the last one whose first tile is not behind it.

    Group g's tiles begin at starts[g] // BLOCK_ROWS + g. These numbers rise with g, and up to the next
    group's there are always enough of them for the group's rows, so that the grid follows from the number
    of rows and of groups alone, and no length has to be known on the host.
    """
    first = 0
    count = groups
    while count > 1:
        step = tl.cdiv(count, _PROBES)
        ahead = tl.arange(0, _PROBES) * step
        start = tl.load(starts + first + ahead, mask=ahead < count, other=0)
        begun = (ahead < count) & (start // BLOCK_ROWS + first + ahead <= tile)
        passed = (tl.sum(begun.to(tl.int32), 0) - 1) * step
        first += passed
        count = tl.minimum(step, count - passed)
    return first


@triton.jit
def _rows_of_head(
    matrix, rows, stride, inside, MASKED: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr
):
    """Rows of a matrix, in one head's columns: [rows, WIDTH], zeros behind HEAD columns and where masked."""
    cols = tl.arange(0, WIDTH)
    at = matrix + rows.to(tl.int64)[:, None] * stride + cols[None, :]
    if MASKED or HEAD != WIDTH:
        return tl.load(at, mask=inside[:, None] & (cols < HEAD)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit(do_not_specialize=["groups", "heads"])
def _attention_kernel(
    query,
    key,
    value,
    out,
    query_starts,
    key_starts,
    prefixes,
    stride,
    out_stride,
    groups,
    heads,
    scale,
    CAUSAL: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    tile = tl.program_id(0) // heads
    column = tl.program_id(0) % heads * HEAD  # programs side by side read the heads of the same rows
    group = _group_of(tile, query_starts, groups, BLOCK_ROWS)
    begin = tl.load(query_starts + group)
    end = tl.load(query_starts + group + 1)
    first = begin + (tile - (begin // BLOCK_ROWS + group)) * BLOCK_ROWS
    if first >= end:
        return

    # Keys are numbered from the prefix's first one on: `shared` of them, then the group's own.
    own = tl.load(key_starts + group)
    count = tl.load(key_starts + group + 1) - own
    shared = 0
    before = 0
    if prefixes is not None:
        before = tl.load(prefixes + 2 * group)
        shared = tl.load(prefixes + 2 * group + 1)
    # `seen` keys are seen by any query of the tile, the first `common` of them by every one.
    if CAUSAL:
        seen = shared + tl.minimum(count, first - begin + BLOCK_ROWS)
        common = shared + first - begin + 1
    else:
        seen = shared + count
        common = seen
    whole = common // BLOCK_KEYS * BLOCK_KEYS

    rows = first + tl.arange(0, BLOCK_ROWS)
    q = _rows_of_head(query + column, rows, stride, rows < end, True, HEAD, WIDTH)
    # The least float, not -inf: of scores that are all -inf the difference to it is still a number.
    most = tl.full((BLOCK_ROWS,), -3.4e38, tl.float32)
    weights = tl.zeros((BLOCK_ROWS,), tl.float32)
    context = tl.zeros((BLOCK_ROWS, WIDTH), tl.float32)
    for MASKED in tl.static_range(2):  # blocks that all queries see whole, and those that need a mask
        for at in range(whole if MASKED else 0, seen if MASKED else whole, BLOCK_KEYS):
            number = at + tl.arange(0, BLOCK_KEYS)
            if prefixes is not None:
                key_rows = tl.where(number < shared, before, own - shared) + number
            else:
                key_rows = own + number
            k = _rows_of_head(key + column, key_rows, stride, number < seen, MASKED, HEAD, WIDTH)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [rows, keys]
            if MASKED:
                visible = (number < seen)[None, :]
                if CAUSAL:
                    visible &= number[None, :] <= (shared - begin + rows)[:, None]
                scores = tl.where(visible, scores, float("-inf"))
            # `scale` turns scores into exponents of two, which cost less than those of e.
            largest = tl.maximum(most, tl.max(scores, 1) * scale)
            p = tl.exp2(scores * scale - largest[:, None])
            shrink = tl.exp2(most - largest)
            most = largest
            weights = weights * shrink + tl.sum(p, 1)
            v = _rows_of_head(value + column, key_rows, stride, number < seen, MASKED, HEAD, WIDTH)
            context = context * shrink[:, None]
            context = tl.dot(p.to(v.dtype), v, context, input_precision=PRECISION)
    cols = tl.arange(0, WIDTH)
    out_at = out + column + rows.to(tl.int64)[:, None] * out_stride + cols[None, :]
    context = (context / weights[:, None]).to(out.dtype.element_ty)
    tl.store(out_at, context, mask=(rows < end)[:, None] & (cols < HEAD)[None, :])


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    prefixes: Tensor | None,
    heads: int,
    causal: bool,
) -> Tensor:
    """Multi-head attention of packed groups: the context [rows, C], heads side by side.

    query [rows, C], key and value [key rows, C], all with one stride between rows and their columns side by
    side. Rows query_starts[g]:query_starts[g + 1] see key rows key_starts[g]:key_starts[g + 1] and, before
    them, the prefixes[g, 1] key rows from prefixes[g, 0] on. `causal`: a group's query i sees its own keys up
    to i, and there must be as many of each.

    Nothing is read on the host: the grid follows from shapes, and how rows are cut up from their averages.
    """
    rows, channels = query.shape
    groups = query_starts.shape[0] - 1
    head = channels // heads
    width = max(16, triton.next_power_of_2(head))
    out = query.new_empty(rows, channels)
    if not out.numel():
        return out
    block_rows, block_keys, warps, stages = _blocks(query, key, groups, heads, width, prefixes is not None)
    _attention_kernel[((rows // block_rows + groups) * heads,)](
        query,
        key,
        value,
        out,
        query_starts,
        key_starts,
        prefixes,
        query.stride(0),
        channels,
        groups,
        heads,
        math.log2(math.e) / math.sqrt(head),
        CAUSAL=causal,
        HEAD=head,
        WIDTH=width,
        PRECISION=precision_of(query),
        BLOCK_ROWS=block_rows,
        BLOCK_KEYS=block_keys,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _blocks(
    query: Tensor, key: Tensor, groups: int, heads: int, width: int, prefixes: bool
) -> tuple[int, int, int, int]:
    """Query rows and keys of a block, warps and stages: no tile spills on an H200, heads up to 128."""
    rows, keys = query.shape[0], key.shape[0]
    few_rows = rows < 32 * groups
    few_keys = keys < 32 * groups and not prefixes
    if query.element_size() == 4:  # on the ordinary units, whose operands are in registers
        if width > 64:
            return 16, 16, 4, 2
        return (16, 16, 4, 2) if few_rows else (32, 32, 4, 2)
    if few_rows:
        wide = max(1, width // 64)
        if few_keys:
            return 16, 16 if keys <= 16 * groups else 32, wide, 2
        return 16, 64, 2 * wide, 3 if width <= 128 else 2
    if width > 128:
        return 64, 32, 4, 2
    if rows // 128 * heads < 2 * _BUSY:
        return 64, 64, 4, 2
    return 128, 64, 8, 3 if width <= 64 else 2
