"""The CUDA kernels themselves, on the emulator with bare pointers: widths and addresses that 16 does not
divide, the last byte that may be read, sizes on both sides of every choice of a kernel, what is not finite.
The ops made of them are tested in test_gpu_ops.py, the kernels of attention in test_cuda_attention.py."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_pointers import (
    PLACES,
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
    near,
    places,
)
from test_gpu_ops import TYPES
from test_ops import int32
from torch import Tensor

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PLACES)
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


def lines(rows: int, cols: int, dtype: torch.dtype, spread: float = 1.0) -> Tensor:
    return (torch.randn(rows, cols) * spread + 0.5).to(dtype)


WIDTHS = [1, 5, 35, 256, 264, 512, 520, 768, 776, 1000, 1024, 1032, 2048, 2056, 4096, 4104, 5001]


def add_norm(memory: Memory, rows: int, cols: int, gathered: bool, dtype: torch.dtype) -> None:
    """Run the kernel, in order with a bias and the sum or gathered without, and compare."""
    updates, stream = (max(1, rows // 2), rows + 2) if gathered else (rows, rows)
    update = memory.put(lines(updates, cols, dtype))
    residual = memory.put(lines(stream, cols, dtype, 2))
    weight, norm_bias = (memory.put(torch.randn(cols).to(dtype)) for _ in range(2))
    normed = memory.room([rows, cols], dtype)
    given: dict[str, Tensor]
    if gathered:
        of = {"residual_rows": stream, "update_rows": updates}
        given = {name: memory.put(torch.randint(0, n, (rows,), dtype=torch.int32)) for name, n in of.items()}
    else:
        given = {"bias": memory.put(torch.randn(cols).to(dtype)), "sum": memory.room([rows, cols], dtype)}
    same: dict[str, Any] = {"rows": rows, "cols": cols, "eps": 0.1, "type": dtype}
    norm = {"norm_weight": weight, "norm_bias": norm_bias, "normed": normed}
    memory.launch(AddNorm(update=update, residual=residual, **norm, **given, **same))

    def total(t: torch.dtype) -> Tensor:
        if gathered:
            return update.to(t)[given["update_rows"].long()] + residual.to(t)[given["residual_rows"].long()]
        return update.to(t) + given["bias"].to(t) + residual.to(t)

    near(normed, lambda t: F.layer_norm(total(t), (cols,), weight.to(t), norm_bias.to(t), 0.1))
    if not gathered:
        near(given["sum"], total)


@pytest.mark.parametrize(("rows", "cols"), [(9 if 1 < cols < 768 else 3, cols) for cols in WIDTHS])
@pytest.mark.parametrize("gathered", [False, True], ids=["in-order", "gathered"])
@TYPES
def test_add_norm(memory: Memory, rows: int, cols: int, gathered: bool, dtype: torch.dtype) -> None:
    add_norm(memory, rows, cols, gathered, dtype)


@pytest.mark.parametrize("odd", range(7))
@TYPES
def test_add_norm_of_one_odd_address(odd: int, dtype: torch.dtype) -> None:
    add_norm(Memory(Place.ALIGNED, odd), 3, 264, False, dtype)


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


def test_add_norm_of_rows_far_behind() -> None:
    """Elements that 32 bits do not count."""
    rows, many = 5, 2**28 + 5
    update, residual = (far_apart(many, 8, 8, torch.float32) for _ in range(2))
    taken = int32([many - 1, 3, many - 2, many - 1, 2**27])
    for x in update, residual:
        x[taken.long()] = torch.randn(rows, 8)
    weight, bias = torch.rand(8) + 1, torch.randn(8)
    normed = far_apart(rows, 8, 8, torch.float32)
    gathered = {"residual_rows": taken, "update_rows": taken}
    norm = {"norm_weight": weight, "norm_bias": bias, "normed": normed, "rows": rows, "cols": 8, "eps": 1e-5}
    assert launched(AddNorm(type=torch.float32, update=update, residual=residual, **gathered, **norm))

    def expected(t: torch.dtype) -> Tensor:
        total = update[taken.long()].to(t) + residual[taken.long()].to(t)
        return F.layer_norm(total, (8,), weight.to(t), bias.to(t), 1e-5)

    near(normed, expected)


def bias_gelu(memory: Memory, rows: int, cols: int, dtype: torch.dtype) -> None:
    """Run the kernel, where there is room for it with what is not finite, and compare."""
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


@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (3, 5), (4, 8), (5, 136), (13, 1032), (6, 3072), (5, 4097)]
)
@TYPES
def test_bias_gelu(memory: Memory, rows: int, cols: int, dtype: torch.dtype) -> None:
    bias_gelu(memory, rows, cols, dtype)


@pytest.mark.parametrize("odd", range(2))
@TYPES
def test_bias_gelu_of_one_odd_address(odd: int, dtype: torch.dtype) -> None:
    bias_gelu(Memory(Place.ALIGNED, odd), 3, 136, dtype)


@places(Place.LAST)
def test_gelu_everywhere(memory: Memory) -> None:
    x = torch.linspace(-20, 20, 100001)
    out = memory.put(x, written=True)
    bias = memory.put(torch.zeros(100001))
    memory.launch(BiasGelu(type=torch.float32, bias=bias, x=out, rows=1, cols=100001))
    # a unit in the last place
    assert ((out - F.gelu(x.double())).abs() <= 2**-23 * x.double().abs().clamp(min=1)).all()


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
    # of a token that is no word the logit is NaN, so that room for it is full of something else
    logits = memory.put(torch.full(tokens.shape, 7.0, dtype=torch.float64), written=True)
    log_sum_exp = memory.room([rows], torch.float64)
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


@pytest.mark.parametrize(
    ("rows", "steps"),
    [(1, [1]), (3, [37]), (5, [4096, 4096, 5]), (9, [3001, 2999, 400]), (2, [30524])],
)
@TYPES
def test_fold_logits(memory: Memory, rows: int, steps: list[int], dtype: torch.dtype) -> None:
    folded(memory, torch.randn(rows, sum(steps)) * 4, torch.randn(sum(steps)).to(dtype), steps)


@places(Place.ALIGNED, Place.ODD)
@TYPES
def test_fold_logits_of_many_rows(memory: Memory, dtype: torch.dtype) -> None:
    folded(memory, torch.randn(4099, 20) * 4, torch.randn(20).to(dtype), [20])


@pytest.mark.parametrize("odd", range(7))
@TYPES
def test_fold_logits_of_one_odd_address(odd: int, dtype: torch.dtype) -> None:
    folded(Memory(Place.ALIGNED, odd), torch.randn(3, 40) * 4, torch.randn(40).to(dtype), [40])


@pytest.mark.parametrize("steps", [[12], [4, 4, 4], [5, 1, 6]], ids=str)
@TYPES
@places(Place.LAST, Place.ODD)
def test_fold_logits_that_are_not_finite(memory: Memory, steps: list[int], dtype: torch.dtype) -> None:
    rows = []
    for special in itertools.product([0.5, INF, -INF, NAN, 200.0], repeat=3):
        rows.append([0.5] * 12)
        for place, value in zip((1, 4, 11), special, strict=True):
            rows[-1][place] = value
    rows += [[x] * 12 for x in (INF, -INF, NAN, 3e38, -3e38)]
    rows += [[-INF] * 8 + [1.0] * 4, [-INF] * 11 + [NAN], [3e38] * 4 + [-INF] * 8]
    values, bias = torch.tensor(rows), torch.zeros(12, dtype=dtype)
    tokens = torch.randint(0, 12, (len(rows), 2))
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


@pytest.mark.parametrize(
    "arguments",
    [
        AddNorm(cols=5),
        BiasGelu(cols=4),
        AttendStates(width=3, heads=2),
        Attention(heads=2, head_size=8),
        FoldLogits(words=3, vocabulary=3, chosen=1),
    ],
    ids=lambda arguments: arguments.launcher,
)
@TYPES
def test_nothing_to_do(arguments: Arguments, dtype: torch.dtype) -> None:
    """No pointer is looked at, and no launch is made: CUDA refuses one of no blocks."""
    arguments.type = int(dtype == torch.bfloat16)
    assert launched(arguments)


def test_memory_shows_what_a_kernel_must_not_do(capfd: pytest.CaptureFixture[str]) -> None:
    """Reading behind the end or before the beginning, writing to what is to be read; and in the same page,
    where nothing ends it, writing beside the results."""

    def gelu(memory: Memory, rows: int, cols: int, written: bool = True) -> BiasGelu:
        x, bias = memory.put(torch.randn(3, 8), written=written), memory.put(torch.randn(8))
        return BiasGelu(type=torch.float32, bias=bias, x=x, rows=rows, cols=cols)

    def norm(memory: Memory, row: int) -> AddNorm:
        x, taken = memory.put(torch.randn(1, 8)), memory.put(int32([row]))
        own = {"norm_weight": x, "norm_bias": x, "normed": memory.room([1, 8], torch.float32)}
        return AddNorm(type=torch.float32, update=x, residual=x, update_rows=taken, rows=1, cols=8, **own)

    aligned, last, first, odd = (Memory(place) for place in Place)
    assert launched(gelu(last, 3, 8))
    assert launched(norm(first, 0))
    for wrong in gelu(aligned, 4, 8), gelu(last, 3, 9), gelu(last, 3, 8, False), norm(first, -1):
        capfd.readouterr()
        assert not launched(wrong)
        assert "touches memory that is not for it" in capfd.readouterr().err
    with pytest.raises(AssertionError, match="beside"):
        odd.launch(gelu(odd, 4, 8))
