"""Every op of the engine in plain torch: what the ops mean, and the backend that needs no compiler.

Rows of all runs lie packed in one matrix [rows, C]; run r owns rows `starts[r]:starts[r + 1]`. Sums,
softmax and LayerNorm are done in float32 for bfloat16 inputs, and in the inputs' own type otherwise, so
that a float64 model gives a float64 trace.
"""

from __future__ import annotations

import math
from collections import defaultdict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """The type in which sums over `x` are taken."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [rows, K] times weight [M, K] transposed, plus bias [M]: [rows, M] in x's type."""
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (the exact one, with erf) of `linear`: [rows, M]."""
    return F.gelu(_wide(F.linear(x, weight, bias))).to(x.dtype)


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_rows: Tensor | None,
    update_rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    """End a sublayer: project, add to the residual stream, normalise; and fork and restore on the way.

    With u = linear(x, weight, bias) [rows, C] the result is, for every row i of the batch that goes on,

        sum[i] = residual[residual_rows[i]] + u[update_rows[i]],    normed[i] = LayerNorm(sum[i]).

    Both index vectors [rows that go on] (int32) absent means row i of each. A fork is a run whose rows are
    read twice; a restored row is one that is read from the clean run: both from it restores the stream, only
    `update_rows` restores what the sublayer wrote.

    Returns (normed, sum); `sum` is empty [0] unless `return_sum` (pre-normalised stacks carry it on).
    """
    update = _wide(F.linear(x, weight, bias))
    stream = _wide(residual)
    if residual_rows is not None:
        stream = stream.index_select(0, residual_rows)
    if update_rows is not None:
        update = update.index_select(0, update_rows)
    total = stream + update
    normed = F.layer_norm(total, total.shape[-1:], _wide(norm_weight), _wide(norm_bias), eps)
    kept = total.to(x.dtype) if return_sum else total.new_empty(0, dtype=x.dtype)
    return normed.to(x.dtype), kept


def self_attention(qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool) -> Tensor:
    """Multi-head self-attention inside each run of a packed batch.

    qkv [rows, 3 C] holds queries, keys and values side by side; starts [runs + 1] (int32) marks the runs.
    prefixes [runs, 2] (int32): the first row and the number of rows that stand before a run's own, of another
    run that begins as it does. `causal`: a token sees those before it and itself.

    Returns the context [rows, C], heads side by side.
    """
    channels = qkv.shape[1] // 3
    size = channels // heads
    out = torch.empty_like(qkv[:, :channels])
    for rows, before in _runs_of_equal_length(starts, prefixes):  # [runs, T], [runs, P]
        q = _wide(qkv[rows, :channels]).unflatten(-1, (heads, size)).transpose(1, 2)  # [runs, H, T, d]
        seen = _wide(qkv[torch.cat((before, rows), 1), channels:])
        k, v = seen.unflatten(-1, (2, heads, size)).permute(2, 0, 3, 1, 4)  # [runs, H, P + T, d]
        scores = q @ k.transpose(-1, -2) / math.sqrt(size)
        if causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=qkv.device)
            scores = scores.masked_fill(future.triu(1 + before.shape[1]), float("-inf"))
        context = scores.softmax(-1) @ v
        out[rows] = context.transpose(1, 2).flatten(2).to(qkv.dtype)
    return out


def cross_attention(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_starts: Tensor,
    state_starts: Tensor,
    heads: int,
) -> Tensor:
    """Many query rows on few sets of states: group g's rows attend to its own set only.

    query [rows, C] (already projected), rows `query_starts[g]:query_starts[g + 1]` are group g's; states
    [all states, D], those of group g are `state_starts[g]:state_starts[g + 1]`; key_weight and value_weight
    [C, D]. There are no biases: a key's drops out of the softmax, and a value's is part of the output
    projection's, since attention weights sum to one. Returns the context [rows, C].

    A backend may project a group's states once, or *absorb* the projections into the query and the weighted
    sum, whichever is the smaller product; the result is the same.
    """
    channels = query.shape[1]
    size = channels // heads
    out = torch.empty_like(query)
    for q_rows, s_rows in _groups_of_equal_shape(query_starts, state_starts):
        k = _wide(F.linear(states[s_rows], key_weight)).unflatten(-1, (heads, size)).transpose(1, 2)
        v = _wide(F.linear(states[s_rows], value_weight)).unflatten(-1, (heads, size)).transpose(1, 2)
        q = _wide(query[q_rows]).unflatten(-1, (heads, size)).transpose(1, 2)  # [groups, H, n, d]
        context = (q @ k.transpose(-1, -2) / math.sqrt(size)).softmax(-1) @ v
        out[q_rows] = context.transpose(1, 2).flatten(2).to(query.dtype)
    return out


def token_logits(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of chosen tokens, and the log-sum-exp over the vocabulary that makes log-probabilities of them.

    hidden [rows, C], weight [V, C], bias [V], tokens [rows, K] (int64). Returns logits [rows, K] and
    log_sum_exp [rows], both float64: they are near each other, and their difference is what counts.
    """
    logits = _wide(F.linear(hidden, weight)) + _wide(bias)
    largest = logits.amax(1, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0)  # of -inf or +inf the difference to itself would be NaN
    sums = (logits - largest).exp().sum(1).double()
    return logits.gather(1, tokens).double(), sums.log() + largest[:, 0].double()


def _runs_of_equal_length(starts: Tensor, prefixes: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Row numbers of runs [runs, T] and of what stands before them [runs, P], a pair for each (T, P)."""
    by_length: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    marks = list(pairwise(starts.tolist()))
    before = [(0, 0)] * len(marks) if prefixes is None else prefixes.tolist()
    for (begin, end), (first, count) in zip(marks, before, strict=True):
        by_length[end - begin, count].append((begin, first))
    return [
        (
            _rows([begin for begin, _ in runs], n, starts.device),
            _rows([first for _, first in runs], p, starts.device),
        )
        for (n, p), runs in by_length.items()
        if n
    ]


def _groups_of_equal_shape(query_starts: Tensor, state_starts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Row numbers of queries [groups, n] and states [groups, m], a pair for each shape (n, m)."""
    by_shape: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    q, s = query_starts.tolist(), state_starts.tolist()
    for g in range(len(q) - 1):
        by_shape[q[g + 1] - q[g], s[g + 1] - s[g]].append((q[g], s[g]))
    device = query_starts.device
    return [
        (_rows([b for b, _ in begins], n, device), _rows([b for _, b in begins], m, device))
        for (n, m), begins in by_shape.items()
        if n
    ]


def _rows(begins: list[int], length: int, device: torch.device) -> Tensor:
    first = torch.tensor(begins, device=device)
    return first[:, None] + torch.arange(length, device=device)
