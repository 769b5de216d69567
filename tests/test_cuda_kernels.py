"""The CUDA kernels themselves, on the emulator with bare pointers: widths that 16 bytes do not divide, addresses
that they do not, the last byte that may be read, sizes on both sides of every choice of a kernel, and what is
not finite. The ops that are made of them are tested in test_gpu_ops.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_pointers import (
    AddNorm,
    Arguments,
    AttendStates,
    Attention,
    BiasGelu,
    FoldLogits,
    Memory,
    Place,
    far_apart,
    launched,
)
from test_gpu_ops import TYPES
from test_ops import int32, starts
from torch import Tensor

INF, NAN = math.inf, math.nan
PLACES = [pytest.param(place, id=place.value) for place in Place]


@pytest.fixture(params=PLACES)
def memory(request: pytest.FixtureRequest) -> Memory:
    torch.manual_seed(0)
    return Memory(request.param)


def places(*wanted: Place) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("memory", [pytest.param(p, id=p.value) for p in wanted], indirect=True)


def near(result: Tensor, compute: Callable[[torch.dtype], Tensor], floor: float = 3e-7) -> None:
    """As near to float64 as plain torch is, which takes sums in float32. Where they are infinite or NaN, the
    result is, too."""
    plain, exact = compute(torch.float32).to(result.dtype), compute(torch.float64)
    finite = exact.isfinite()
    torch.testing.assert_close(result[~finite].double(), exact[~finite], equal_nan=True)
    result, plain, exact = result[finite].double(), plain[finite].double(), exact[finite]
    largest = exact.abs().max().item()
    allowed = 2 * (plain - exact).abs().max().item() + floor * max(1.0, largest)
    assert (result - exact).abs().max().item() <= allowed
    # neither zeros nor the mean would do
    assert largest > 20 * allowed
    assert exact.numel() < 9 or exact.std() > 20 * allowed


def lines(rows: int, cols: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (torch.randn(rows, cols) * spread + 0.5).to(dtype)


@pytest.mark.parametrize(
    ("rows", "cols"),
    [(1, 1), (3, 5), (7, 35), (9, 64), (5, 256), (5, 264), (6, 768), (5, 1000), (5, 1024), (3, 1032)]
    + [(3, 2048), (2, 3080), (2, 4096), (2, 4104), (2, 5001)],
)
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
@TYPES
def test_add_norm(memory: Memory, rows: int, cols: int, gathered: bool, dtype: torch.dtype) -> None:
    """In order with a bias and the sum, gathered without."""
    updates, stream = (max(1, rows // 2), rows + 2) if gathered else (rows, rows)
    update = memory.put(lines(updates, cols, dtype))
    residual = memory.put(lines(stream, cols, dtype, 2))
    weight, norm_bias = (memory.put(torch.randn(cols).to(dtype)) for _ in range(2))
    normed = memory.room([rows, cols], dtype)
    given: dict[str, Any] = {}
    if gathered:
        of = {"residual_rows": stream, "update_rows": updates}
        given = {name: memory.put(torch.randint(0, n, (rows,), dtype=torch.int32)) for name, n in of.items()}
    else:
        given = {"bias": memory.put(torch.randn(cols).to(dtype)), "sum": memory.room([rows, cols], dtype)}
    same: dict[str, Any] = {"rows": rows, "cols": cols, "eps": 1e-5, "type": dtype}
    norm = {"norm_weight": weight, "norm_bias": norm_bias, "normed": normed}
    memory.launch(AddNorm(update=update, residual=residual, **norm, **given, **same))

    def total(t: torch.dtype) -> Tensor:
        if gathered:
            return update.to(t)[given["update_rows"].long()] + residual.to(t)[given["residual_rows"].long()]
        return update.to(t) + given["bias"].to(t) + residual.to(t)

    near(normed, lambda t: F.layer_norm(total(t), (cols,), weight.to(t), norm_bias.to(t), 1e-5))
    if not gathered:
        near(given["sum"], total)


@pytest.mark.parametrize("cols", [768, 35])
@TYPES
def test_add_norm_of_a_mean_much_larger_than_the_spread(
    memory: Memory, cols: int, dtype: torch.dtype
) -> None:
    """The mean of the squares less the square of the mean would be noise. One row is NaN."""
    update = memory.put((torch.randn(4, cols) + 300).to(dtype))
    residual = torch.zeros(4, cols, dtype=dtype)
    residual[2, 5] = NAN
    residual = memory.put(residual)
    weight, bias = (memory.put(torch.randn(cols).to(dtype)) for _ in range(2))
    normed = memory.room([4, cols], dtype)
    norm = {"norm_weight": weight, "norm_bias": bias, "normed": normed}
    memory.launch(AddNorm(type=dtype, update=update, residual=residual, **norm, rows=4, cols=cols, eps=1e-12))
    # a float32 of 300 is off by up to 2^-16, and so is the mean
    near(
        normed,
        lambda t: F.layer_norm((update + residual).to(t), (cols,), weight.to(t), bias.to(t), 1e-12),
        floor=2**-15,
    )


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (3, 5), (4, 8), (5, 136), (13, 1032), (6, 3072), (5, 4097)]
)
@TYPES
def test_bias_gelu(memory: Memory, rows: int, cols: int, dtype: torch.dtype) -> None:
    x = lines(rows, cols, dtype, 3)
    if cols > 8:
        x[-1, -5:] = torch.tensor([NAN, INF, -INF, 1e30, -1e30])
    bias = memory.put(torch.randn(cols).to(dtype))
    out = memory.put(x, written=True)
    memory.launch(BiasGelu(type=dtype, bias=bias, x=out, rows=rows, cols=cols))
    far = x.abs() >= 1e30
    x[x == -INF] = -1e30  # of which torch makes NaN: zero times infinity
    assert torch.equal(out[far], x[far].clamp(min=0))
    out[far] = 0
    near(out, lambda t: F.gelu(x.to(t) + bias.to(t)).masked_fill(far, 0))


@places(Place.LAST)
def test_gelu_everywhere(memory: Memory) -> None:
    x = torch.linspace(-20, 20, 100001)
    out = memory.put(x, written=True)
    bias = memory.put(torch.zeros(100001))
    memory.launch(BiasGelu(type=torch.float32, bias=bias, x=out, rows=1, cols=100001))
    # a unit in the last place
    assert ((out - F.gelu(x.double())).abs() <= 2**-23 * x.double().abs().clamp(min=1)).all()


STATES = {  # heads, width, queries and states of every group
    "uneven": (3, 5, [1, 0, 4, 1], [9, 2, 1, 3]),
    "decoder": (12, 768, [1] * 5, [9] * 5),
    "13-heads": (13, 40, [2, 3], [17, 8]),
    "40-heads": (40, 8, [2, 3], [17, 8]),
    "image": (4, 768, [1], [577]),
    "wide": (2, 2056, [1, 2], [13, 1]),
    "one": (1, 1, [1], [4]),
    "1024-columns": (12, 1024, [1, 2], [40, 18]),
    "1032-columns": (3, 1032, [1], [17]),
    "more-states-than-room": (5, 24, [1], [1500]),
    "many-rows": (9, 16, [1] * 350, [3] * 348 + [200, 5]),
}


def attended_states(
    query: Tensor, states: Tensor, queries: list[int], counts: list[int], scale: float
) -> Tensor:
    """query [heads, rows, width], states [all states, width]: [heads, rows, width]."""
    out = []
    for q, s in zip(query.split(queries, 1), states.split(counts), strict=True):
        out.append((q @ s.T * scale).softmax(-1) @ s)
    return torch.cat(out, 1)


def attend_states(
    memory: Memory, query: Tensor, states: Tensor, queries: list[int], counts: list[int], scale: float
) -> None:
    """Run the kernel and compare."""
    heads, rows, width = query.shape
    out = memory.room(query.shape, query.dtype)
    marks = {"query_starts": memory.put(starts(queries)), "state_starts": memory.put(starts(counts))}
    memory.launch(
        AttendStates(
            type=query.dtype, query=memory.put(query), states=memory.put(states), out=out, **marks,
            rows=rows, groups=len(queries), width=width, heads=heads, scale=scale,
        )
    )  # fmt: skip
    near(out, lambda t: attended_states(query.to(t), states.to(t), queries, counts, scale))


@pytest.mark.parametrize("name", STATES)
@TYPES
def test_attend_states(memory: Memory, name: str, dtype: torch.dtype) -> None:
    heads, width, queries, counts = STATES[name]
    query = torch.randn(heads, sum(queries), width).to(dtype)
    states = torch.randn(sum(counts), width).to(dtype)
    attend_states(memory, query, states, queries, counts, 1.5 / math.sqrt(width))


@pytest.mark.parametrize(("heads", "width", "many"), [(3, 64, 9), (2, 16, 1100), (2, 7, 1100)])
@TYPES
def test_attend_states_that_are_not_finite(
    memory: Memory, heads: int, width: int, many: int, dtype: torch.dtype
) -> None:
    queries, counts = [2, 1, 3, 1], [4, many, 5, many]
    query, states = torch.randn(heads, 7, width).to(dtype), torch.randn(sum(counts), width).to(dtype)
    states[4 + 3, 1] = NAN  # group 1
    query[1, 4, 0] = NAN  # one head of a row of group 2
    states[-many:-2] = 0  # group 3: all its scores but two are -infinity
    states[-many:-2, 0] = -INF
    query[:, 6] = 1
    attend_states(memory, query, states, queries, counts, 0.2)


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(1, [1]), (3, [37]), (5, [4096, 4096, 5]), (9, [3001, 2999, 400]), (2, [30524])],
)
@TYPES
def test_fold_logits(memory: Memory, rows: int, steps: list[int], dtype: torch.dtype) -> None:
    folded(memory, torch.randn(rows, sum(steps)) * 4, torch.randn(sum(steps)).to(dtype), steps)


@places(Place.ALIGNED, Place.ODD)
@pytest.mark.parametrize(("rows", "steps"), [(4099, [16, 20])])
@TYPES
def test_fold_logits_of_many_rows(memory: Memory, rows: int, steps: list[int], dtype: torch.dtype) -> None:
    folded(memory, torch.randn(rows, sum(steps)) * 4, torch.randn(sum(steps)).to(dtype), steps)


def folded(memory: Memory, values: Tensor, bias: Tensor, steps: list[int]) -> None:
    """Run the kernel block after block of the vocabulary, and compare."""
    rows, vocabulary = values.shape
    chosen = 1 + rows % 3
    tokens = torch.randint(0, vocabulary, (rows, chosen))
    tokens[0, 0] = vocabulary - 1
    logits, log_sum_exp = fold(memory, values, bias, tokens, steps)
    full = values + bias.float()
    assert torch.equal(logits, full.gather(1, tokens).double())

    def summed(t: torch.dtype) -> Tensor:
        logits = values.to(t) + bias.to(t)
        largest = logits.amax(1, keepdim=True)
        return (logits - largest).exp().sum(1).double().log() + largest[:, 0].double()

    near(log_sum_exp, summed)


def fold(
    memory: Memory, values: Tensor, bias: Tensor, tokens: Tensor, steps: list[int]
) -> tuple[Tensor, Tensor]:
    rows, vocabulary = values.shape
    running = {name: memory.room([rows], torch.float32) for name in ("maximum", "sum")}
    logits, log_sum_exp = memory.room(tokens.shape, torch.float64), memory.room([rows], torch.float64)
    given = {"bias": memory.put(bias), "tokens": memory.put(tokens), **running}
    for first, block in zip(itertools.accumulate([0, *steps]), values.split(steps, 1), strict=False):
        memory.launch(
            FoldLogits(
                type=bias.dtype, values=memory.put(block.contiguous()), **given, first_word=first,
                words=block.shape[1], rows=rows, chosen=tokens.shape[1], vocabulary=vocabulary,
                logits=logits, log_sum_exp=log_sum_exp,
            )
        )  # fmt: skip
    return logits, log_sum_exp


@pytest.mark.parametrize("steps", [[12], [4, 4, 4], [5, 1, 6]], ids=str)
@TYPES
@places(Place.LAST, Place.ODD)
def test_fold_logits_that_are_not_finite(memory: Memory, steps: list[int], dtype: torch.dtype) -> None:
    rows = []
    for special in itertools.product([0.5, INF, -INF, NAN, 200.0, -200.0], repeat=3):
        rows.append([0.5] * 12)
        for place, value in zip((1, 4, 11), special, strict=True):
            rows[-1][place] = value
    rows += [[x] * 12 for x in (INF, -INF, NAN, 3e38, -3e38)]
    rows += [[-INF] * 8 + [1.0] * 4, [-INF] * 11 + [NAN], [3e38] * 4 + [-INF] * 8]
    values, bias, tokens = (
        torch.tensor(rows),
        torch.zeros(12, dtype=dtype),
        torch.randint(0, 12, (len(rows), 2)),
    )
    bias[3] = 0.25
    tokens[0] = torch.tensor([12, -1])  # no words
    logits, log_sum_exp = fold(memory, values, bias, tokens, steps)
    full = values + bias.float()
    largest = full.amax(1, keepdim=True)
    largest.masked_fill_(largest.isinf(), 0)
    expected = (full - largest).exp().sum(1).double().log() + largest[:, 0].double()
    torch.testing.assert_close(log_sum_exp, expected, equal_nan=True, rtol=2**-20, atol=2**-20)
    assert logits[0].isnan().all()
    expected = full[1:].gather(1, tokens[1:]).double()
    torch.testing.assert_close(logits[1:], expected, equal_nan=True, rtol=0, atol=0)
