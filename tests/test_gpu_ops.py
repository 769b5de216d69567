"""The ops on a GPU, bindings and kernels, against `reference.py`; without one, the CUDA sources played by the
emulator in tests/cuda_emulator. Triton's kernels are interpreted in test_triton_ops.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_machines import EMULATED, MACHINES, Machine, machine
from test_ops import (
    CASES,
    Make,
    assert_as_near_as_the_reference,
    call,
    cast,
    every_case,
    int32,
    matrix,
    starts,
)
from torch import Tensor

from blip_trace import reference

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ORDERS = {"forward": 0, "backward": 1, "shuffled": 2}


@pytest.fixture(params=MACHINES)
def gpu(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine; memory that ops allocate on it is full of NaN."""
    found = machine(request.param)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=found.device).isnan().all()
    yield found
    torch.use_deterministic_algorithms(False)
    if found.set_order is not None:
        found.set_order(0)


def done(gpu: Machine, op: str, args: list[Any]) -> tuple[Tensor, ...]:
    """What an op gives, on the CPU."""
    return tuple(out.cpu() for out in call(gpu.ops, op, gpu.put(args)))


@every_case
@TYPES
def test_as_near_to_float64_as_the_reference(gpu: Machine, op: str, make: Make, dtype: torch.dtype) -> None:
    args = cast(make(), dtype)
    assert_as_near_as_the_reference(done(gpu, op, args), op, args)


@pytest.mark.without_gpu  # which chooses the order itself
@every_case
@TYPES
@pytest.mark.parametrize("gpu", [EMULATED], indirect=True)
def test_the_order_of_threads_does_not_matter(gpu: Machine, op: str, make: Make, dtype: torch.dtype) -> None:
    """A kernel in which a barrier is missing gives other numbers where threads run in another order."""
    assert gpu.set_order is not None
    args = cast(make(), dtype)
    found = []
    for order in ORDERS.values():
        gpu.set_order(order)
        found.append(done(gpu, op, args))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=0)


@every_case
@TYPES
def test_nan_goes_through(gpu: Machine, op: str, make: Make, dtype: torch.dtype) -> None:
    args = cast(make(), dtype)
    if args[0].shape[0] == 0:
        return  # no row to poison
    args[0] = args[0].clone()
    args[0][0] = float("nan")
    for out, expected in zip(done(gpu, op, args), call(reference, op, args), strict=True):
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("states", [[5, 7, 6], [70, 130, 64]], ids=["few", "many"])
@pytest.mark.parametrize("queries", [[3, 1, 2], [40, 65, 100]], ids=["short", "long"])
@TYPES
def test_a_group_s_nan_stays_in_it(
    gpu: Machine, queries: list[int], states: list[int], dtype: torch.dtype
) -> None:
    """Tiles end where groups end: what lies behind is multiplied by zero, and zero times NaN is NaN."""
    args: list[Any] = [matrix(sum(queries), 32), matrix(sum(states), 48), matrix(32, 48), matrix(32, 48)]
    args = cast((*args, starts(queries), starts(states), 2), dtype)
    args[1][states[0] : states[0] + states[1]] = float("nan")
    (out,) = done(gpu, "cross_attention", args)
    ill = torch.zeros(sum(queries), dtype=torch.bool)
    ill[queries[0] : queries[0] + queries[1]] = True
    assert torch.equal(out.isnan().all(1), ill)
    assert torch.equal(out.isnan().any(1), ill)

    qkv = cast((matrix(sum(queries), 96),), dtype)[0]
    qkv[ill] = float("nan")
    (out,) = done(gpu, "self_attention", [qkv, starts(queries), None, 2, True])
    assert torch.equal(out.isnan().any(1), ill)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear", {0: torch.randn(7, 33, dtype=torch.float64)}, "takes float32 or bfloat16"),
        ("linear_gelu", {2: torch.randn(44)}, r"bias must have shape \[45\]"),
        ("linear_add_norm", {5: int32([0, 1])}, "7 rows of the residual stream meet 2 updates"),
        ("linear_add_norm", {4: torch.arange(7)}, "residual_rows must be a contiguous vector of int32"),
        ("self_attention", {3: 4}, "does not hold queries, keys and values of 4 heads"),
        ("self_attention", {2: int32([0, 5])}, r"prefixes must be contiguous int32 \[5, 2\]"),
        ("cross_attention", {5: int32([0, 155])}, "query_starts marks 5 groups and state_starts 1"),
        ("token_logits", {3: torch.zeros(7)}, "tokens must be int64"),
    ],
)
def test_what_is_refused(gpu: Machine, op: str, change: dict[int, Any], message: str) -> None:
    wanted = "mixed" if "attention" in op else "7x33x45"
    make = next(make for o, name, make in CASES if (o, name) == (op, wanted))
    args = [change.get(i, a) for i, a in enumerate(make())]
    with pytest.raises(ValueError, match=message):
        done(gpu, op, args)


def test_heads_that_are_too_large(gpu: Machine) -> None:
    with pytest.raises(ValueError, match="heads of 160 channels are too large"):
        done(gpu, "self_attention", [matrix(3, 480), starts([3]), None, 1, False])
