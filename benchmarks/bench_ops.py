"""Each compiled op against the best way to say the same in stock torch, interleaved in one process.

A ratio above 1 means that the own op is faster. Shapes are those of a trace of BLIP-base (image encoder: 577
rows; question encoder: runs of 9 tokens; answer decoder: 110 groups of a row on 9 states) and of the small
model that ships.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from blip_trace import ops

Work = Callable[[], object]
CASES: list[tuple[str, str, Callable[[torch.dtype], tuple[Work, Work]]]] = []


def native() -> ops.OpSet:
    return ops.get_ops("native")


def starts(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def add(op: str, shape: str, make: Callable[..., tuple[Work, Work]], *sizes: Any) -> None:
    CASES.append((op, shape, lambda dtype: make(dtype, *sizes)))


def layer(dtype: torch.dtype, rows: int, depth: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(cols, depth) * depth**-0.5
    return torch.randn(rows, depth).to(dtype), weight.to(dtype), torch.randn(cols).to(dtype)


def linear(dtype: torch.dtype, *size: int) -> tuple[Work, Work]:
    args = layer(dtype, *size)
    return lambda: native().linear(*args), lambda: F.linear(*args)


def linear_gelu(dtype: torch.dtype, *size: int) -> tuple[Work, Work]:
    args = layer(dtype, *size)
    return lambda: native().linear_gelu(*args), lambda: F.gelu(F.linear(*args))


def linear_add_norm(dtype: torch.dtype, rows: int, depth: int, cols: int) -> tuple[Work, Work]:
    args = layer(dtype, rows, depth, cols)
    residual, scale = torch.randn(rows, cols).to(dtype), torch.ones(cols, dtype=dtype)
    index = torch.randperm(rows).int()

    def stock() -> Tensor:
        total = residual.index_select(0, index) + F.linear(*args).index_select(0, index)
        return F.layer_norm(total, (cols,), scale, scale, 1e-12)

    return (
        lambda: native().linear_add_norm(*args, residual, index, index, scale, scale, 1e-12, False),
        stock,
    )


def self_attention(dtype: torch.dtype, runs: int, tokens: int, heads: int, size: int) -> tuple[Work, Work]:
    qkv = torch.randn(runs * tokens, 3 * heads * size).to(dtype)
    marks = starts([tokens] * runs)

    def stock() -> Tensor:
        q, k, v = qkv.view(runs, tokens, 3, heads, size).permute(2, 0, 3, 1, 4)
        context = F.scaled_dot_product_attention(q, k, v)
        return context.transpose(1, 2).reshape(runs * tokens, heads * size)

    return lambda: native().self_attention(qkv, marks, None, heads, False), stock


def cross_attention(
    dtype: torch.dtype, groups: int, n: int, m: int, heads: int, size: int
) -> tuple[Work, Work]:
    width = heads * size
    query, states = torch.randn(groups * n, width).to(dtype), torch.randn(groups * m, width).to(dtype)
    key, value = ((torch.randn(width, width) * width**-0.5).to(dtype) for _ in range(2))
    marks = starts([n] * groups), starts([m] * groups)

    def stock() -> Tensor:
        q = query.view(groups, n, heads, size).transpose(1, 2)
        k = F.linear(states, key).view(groups, m, heads, size).transpose(1, 2)
        v = F.linear(states, value).view(groups, m, heads, size).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(groups * n, width)

    return lambda: native().cross_attention(query, states, key, value, *marks, heads), stock


def token_logits(dtype: torch.dtype, rows: int, depth: int, words: int) -> tuple[Work, Work]:
    args = layer(dtype, rows, depth, words)
    tokens = torch.randint(0, words, (rows, 1))

    def stock() -> tuple[Tensor, Tensor]:
        logits = F.linear(*args).float()
        return logits.gather(1, tokens), logits.logsumexp(1)

    return lambda: native().token_logits(*args, tokens), stock


for rows in (9, 121, 577, 972):
    add("linear", f"{rows} x 768 -> 2304", linear, rows, 768, 2304)
    add("linear_gelu", f"{rows} x 768 -> 3072", linear_gelu, rows, 768, 3072)
    add("linear_add_norm", f"{rows} x 3072 -> 768", linear_add_norm, rows, 3072, 768)
add("self_attention", "1 x 577, 12 heads of 64", self_attention, 1, 577, 12, 64)
add("self_attention", "100 x 9, 12 heads of 64", self_attention, 100, 9, 12, 64)
add("cross_attention", "972 on 577, width 768", cross_attention, 1, 972, 577, 12, 64)
add("cross_attention", "9 on 577, width 768", cross_attention, 1, 9, 577, 12, 64)
add("cross_attention", "110 x 1 on 9, width 768", cross_attention, 110, 1, 9, 12, 64)
add("token_logits", "121 x 768, 30524 words", token_logits, 121, 768, 30524)
add("linear", "64 x 128 -> 384", linear, 64, 128, 384)
add("linear_gelu", "64 x 128 -> 512", linear_gelu, 64, 128, 512)
add("linear_add_norm", "64 x 512 -> 128", linear_add_norm, 64, 512, 128)
add("self_attention", "8 x 8, 4 heads of 32", self_attention, 8, 8, 4, 32)
add("cross_attention", "64 on 65, width 128", cross_attention, 1, 64, 65, 4, 32)
add("cross_attention", "20 x 1 on 8, width 128", cross_attention, 20, 1, 8, 4, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "shape", "make"), [pytest.param(*c, id=f"{c[0]}: {c[1]}") for c in CASES])
def test_op(benchmark: Any, dtype: str, op: str, shape: str, make: Any, request: Any) -> None:
    torch.manual_seed(0)
    own, stock = make(getattr(torch, dtype))
    times: list[float] = []

    def before() -> None:
        begin = time.perf_counter()
        stock()
        times.append(time.perf_counter() - begin)

    with torch.inference_mode():
        rounds = 7 if request.config.getoption("--quick", default=False) else 25
        benchmark.pedantic(own, setup=before, rounds=rounds, warmup_rounds=2, iterations=1)
    if benchmark.disabled:
        return
    ours = benchmark.stats.stats.data
    least, median = min(times[2:]) / min(ours), statistics.median(times[2:]) / statistics.median(ours)
    benchmark.extra_info.update(ratio_of_least=round(least, 2), ratio_of_medians=round(median, 2))
    ratios = f"stock / own {least:6.2f} (least) {median:6.2f} (medians)"
    print(f"\n{op:16} {shape:26} {dtype:9} own {min(ours) * 1e3:8.3f} ms  {ratios}")
