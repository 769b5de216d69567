"""token_logits: logits of chosen tokens and the log-sum-exp over the vocabulary, block by block, so that the
logits of all words are never in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_like, check_matrix, check_tokens
from .library import register
from .product import product_options, tile_of_product

_LOG2_OF_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _finite(largest):
    """What to subtract in exponents: a maximum, unless it is infinite and its difference to itself NaN."""
    return tl.where(tl.abs(largest) == float("inf"), 0.0, largest)


@triton.jit(do_not_specialize=["row_count", "vocabulary", "chosen"])
def _blocks_kernel(
    hidden,
    weight,
    bias,
    tokens,
    logits,
    maxima,
    sums,
    row_count,
    vocabulary,
    depth,
    chosen,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """Of some rows in a block of words: the largest logit, the sum of exponentials, and the chosen logits."""
    # Programs side by side share words: the weight is the large one, and is read from memory once.
    row_blocks = tl.cdiv(row_count, BLOCK_ROWS)
    block = tl.program_id(0) // row_blocks
    rows = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    words = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    x = tile_of_product(
        hidden,
        weight,
        tl.minimum(rows, row_count - 1),
        tl.minimum(words, vocabulary - 1),
        depth,
        PRECISION,
        BLOCK_DEPTH,
        WHOLE_BLOCKS,
    )
    # Behind the vocabulary's end a logit is -inf and adds nothing to a sum.
    x += tl.load(bias + words, mask=words < vocabulary, other=0.0).to(tl.float32)[None, :]
    x = tl.where((words < vocabulary)[None, :], x, float("-inf"))  # [rows, words]

    for i in range(chosen):
        at = rows.to(tl.int64) * chosen + i
        token = tl.load(tokens + at, mask=rows < row_count, other=-1).to(tl.int32)
        here = token // BLOCK_COLS == block
        if tl.max(here.to(tl.int32), 0) > 0:  # in most blocks no row has a token
            logit = tl.sum(tl.where(words[None, :] == token[:, None], x, 0.0), 1)
            tl.store(logits + at, logit.to(tl.float64), mask=here & (rows < row_count))

    largest = tl.max(x, 1)
    sum_of_row = tl.sum(tl.exp2((x - _finite(largest)[:, None]) * _LOG2_OF_E), 1)
    at = rows.to(tl.int64) * tl.cdiv(vocabulary, BLOCK_COLS) + block
    tl.store(maxima + at, largest, mask=rows < row_count)
    tl.store(sums + at, sum_of_row, mask=rows < row_count)


@triton.jit(do_not_specialize=["blocks"])
def _log_sum_exp_kernel(maxima, sums, log_sum_exp, blocks, BLOCKS: tl.constexpr):
    """A row's log-sum-exp from what `_blocks_kernel` found in every block."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    inside = block < blocks
    largest = tl.load(maxima + row * blocks + block, mask=inside, other=float("-inf"))
    sum_of_block = tl.load(sums + row * blocks + block, mask=inside, other=0.0)
    base = _finite(tl.max(largest, 0))
    total = tl.sum(sum_of_block * tl.exp2((largest - base) * _LOG2_OF_E), 0)
    tl.store(log_sum_exp + row, tl.log(total.to(tl.float64)) + base.to(tl.float64))


def _token_logits(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    check_matrix("token_logits", "hidden", hidden)
    (rows, depth), vocabulary = hidden.shape, weight.shape[0]
    check_like("token_logits", "weight", weight, hidden, (vocabulary, depth))
    check_like("token_logits", "bias", bias, hidden, (vocabulary,))
    check_tokens("token_logits", tokens, hidden)
    options = product_options(hidden, weight)
    blocks = triton.cdiv(vocabulary, options["BLOCK_COLS"])
    chosen = tokens.shape[1]
    # Near each other, and their difference is what counts.
    logits = hidden.new_empty(rows, chosen, dtype=torch.float64)
    log_sum_exp = hidden.new_empty(rows, dtype=torch.float64)
    maxima = hidden.new_empty(rows, blocks, dtype=torch.float32)
    sums = torch.empty_like(maxima)
    if rows:
        _blocks_kernel[(triton.cdiv(rows, options["BLOCK_ROWS"]) * blocks,)](
            hidden.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            tokens.contiguous(),
            logits,
            maxima,
            sums,
            rows,
            vocabulary,
            depth,
            chosen,
            **options,
        )
        _log_sum_exp_kernel[(rows,)](
            maxima, sums, log_sum_exp, blocks, BLOCKS=triton.next_power_of_2(blocks), num_warps=1
        )
    return logits, log_sum_exp


token_logits = register(
    "token_logits(Tensor hidden, Tensor weight, Tensor bias, Tensor tokens) -> (Tensor, Tensor)",
    _token_logits,
)
