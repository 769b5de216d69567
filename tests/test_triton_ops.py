"""The Triton kernels against `reference.py`: on a GPU, or in Triton's interpreter, where
test_triton_interpreted.py runs this file. That one multiplies bfloat16 wrongly, so float16 stands for it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from test_ops import CASES, Make, call, cast, int32, layer, matrix, starts
from torch import Tensor

from blip_trace import kernels, ops, reference

CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    assert os.environ.get("FAIL_WITHOUT_CUDA") != "1", "there is no GPU"
    pytest.skip("no GPU: test_triton_interpreted.py runs this file", allow_module_level=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode asks for on a GPU

DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
TYPES = [torch.float32, torch.bfloat16, torch.float16] if CUDA else [torch.float32, torch.float16]
_group_of = kernels.attention._group_of
OPS = sorted({op for op, _, _ in CASES})
MODULES = {
    name: importlib.import_module(f"blip_trace.kernels.{name}") for name in [*OPS, "attention", "product"]
}


def attention_case(heads: int, size: int, lengths: list[int], prefixes: Any, causal: bool) -> tuple[Any, ...]:
    before = None if prefixes is None else torch.tensor(prefixes, dtype=torch.int32)
    return matrix(sum(lengths), 3 * heads * size), starts(lengths), before, heads, causal


def cross_case(heads: int, size: int, width: int, queries: list[int], states: list[int]) -> tuple[Any, ...]:
    channels = heads * size
    weights = [matrix(channels, width, width**-0.5) for _ in range(2)]
    return (
        matrix(sum(queries), channels),
        matrix(sum(states), width),
        *weights,
        starts(queries),
        starts(states),
        heads,
    )


def gathered(rows: int, cols: int) -> tuple[Any, ...]:
    picks = [torch.randint(0, n, (rows,), dtype=torch.int32) for n in (7, 4)]
    return *layer(4, 20, cols), matrix(7, cols), *picks, torch.randn(cols), torch.randn(cols), 1e-12, True


# The interpreter takes a hundredth of a second for a program's step: there these stand for the large cases.
LARGE = {"several-blocks", "long", "long-causal", "long-beginning", "long-beginning-causal", "long-runs"}
LARGE |= {"long-runs-causal", "folded"}
OWN: list[tuple[str, str, Make]] = [
    ("token_logits", "two-blocks", lambda: (*layer(19, 24, 200), torch.randint(0, 200, (19, 4)))),
    ("self_attention", "few", lambda: attention_case(2, 5, [3, 0, 18, 1], None, False)),
    ("self_attention", "few-before", lambda: attention_case(1, 9, [9, 2, 3], [(0, 0), (0, 7), (0, 0)], True)),
    ("self_attention", "577", lambda: attention_case(1, 64, [577], None, False)),
    ("self_attention", "130-causal", lambda: attention_case(1, 64, [2, 130], None, True)),
    ("self_attention", "577-before", lambda: attention_case(1, 32, [577, 3], [(0, 0), (0, 574)], True)),
    ("self_attention", "before-long", lambda: attention_case(1, 64, [100, 95], [(0, 0), (3, 20)], True)),
    ("cross_attention", "few", lambda: cross_case(2, 5, 12, [1, 0, 20], [9, 4, 2])),
    ("cross_attention", "577", lambda: cross_case(2, 64, 48, [9, 70], [577, 31])),
    ("linear_add_norm", "wide", lambda: gathered(5, 2049)),
    ("linear_gelu", "wide", lambda: layer(150, 40, 300)),
]
RUN = [c for c in CASES if CUDA or c[1] not in LARGE] + OWN
SMALL = [c for c in RUN if "attention" not in c[0] or c[1].startswith(("few", "shared", "short-causal"))]


def cases(of: list[tuple[str, str, Make]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("op", "make"), [pytest.param(op, make, id=f"{op}-{n}") for op, n, make in of]
    )


types = pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def on_device(args: Any, device: str = DEVICE) -> list[Any]:
    return [a.to(device) if isinstance(a, Tensor) else a for a in args]


def assert_near(result: tuple[Tensor, ...], op: str, args: list[Any]) -> None:
    """No further from float64 than twice what plain torch in the same type is."""
    exact = call(reference, op, cast(tuple(args), torch.float64))
    plain = call(reference, op, args)
    assert len(result) == len(exact)
    for r, p, e in zip(result, plain, exact, strict=True):
        assert (r.dtype, r.shape, r.device) == (p.dtype, p.shape, p.device)
        if r.numel():
            largest = e.abs().max().item()
            allowed = 2 * (p.double() - e).abs().max().item() + 3e-7 * max(1.0, largest)
            assert largest > 20 * allowed
            assert (r.double() - e).abs().max().item() <= allowed  # no NaN either


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Memory that is allocated is full of NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@types
@cases(RUN)
def test_as_near_to_float64_as_the_reference(op: str, make: Make, dtype: torch.dtype) -> None:
    args = cast(tuple(on_device(make())), dtype)
    assert_near(call(kernels, op, args), op, args)


@types
@pytest.mark.parametrize("busy", [1, 96])
@pytest.mark.parametrize("size", [(1, 16, 16), (7, 33, 45), (63, 96, 130), (150, 40, 300)], ids=str)
def test_the_fused_product(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int, int], busy: int, dtype: torch.dtype
) -> None:
    # float32 goes to torch, but it is what checks the kernel closely; few programs make the tiles large
    monkeypatch.setattr(MODULES["product"], "_BUSY", busy)
    args = cast(tuple(on_device(layer(*size))), dtype)
    assert_near((MODULES["linear_gelu"]._fused(*args),), "linear_gelu", args)


@pytest.mark.parametrize(
    "blocks",
    [(16, 16, 1, 2), (16, 64, 2, 3), (32, 32, 4, 2), (64, 32, 4, 2), (64, 64, 4, 2), (128, 64, 8, 3)],
    ids=str,
)
def test_all_ways_to_cut_up_rows_and_keys(monkeypatch: pytest.MonkeyPatch, blocks: tuple[int, ...]) -> None:
    monkeypatch.setattr(MODULES["attention"], "_blocks", lambda *_: blocks)
    prefixes = [(0, 0), (0, 8), (0, 0), (1, 40), (2, 1), (20, 100)]
    for op, make in [
        ("self_attention", lambda: attention_case(2, 5, [9, 1, 0, 130, 7, 64], None, False)),
        ("self_attention", lambda: attention_case(1, 16, [9, 1, 0, 130, 7, 64], prefixes, False)),
        ("self_attention", lambda: attention_case(1, 16, [9, 1, 0, 130, 7, 64], prefixes, True)),
        ("cross_attention", lambda: cross_case(2, 16, 19, [0, 1, 33, 0, 130, 2], [5, 9, 3, 0, 65, 1])),
    ]:
        args = cast(tuple(on_device(make())), HALF)
        assert_near(call(kernels, op, args), op, args)


@triton.jit
def _groups_kernel(tiles, marks, found, groups, BLOCK_ROWS: tl.constexpr):
    i = tl.program_id(0)
    tl.store(found + i, _group_of(tl.load(tiles + i), marks, groups, BLOCK_ROWS))


@pytest.mark.parametrize("groups", [1, 2, 127, 128, 129, 20_000])
@pytest.mark.parametrize("block", [16, 128])
def test_tiles_hold_every_row_once(groups: int, block: int) -> None:
    lengths = torch.randint(0, 40, (groups,))
    lengths[torch.rand(groups) < 0.5] = 0
    lengths[torch.randint(0, groups, (3,))] = 300
    marks = starts(lengths.tolist())
    # A tile is known by its group and by how many of the group's come before it.
    owner = torch.repeat_interleave(torch.arange(groups), (lengths + block - 1) // block)
    before = torch.arange(len(owner)) - torch.searchsorted(owner, owner)
    tiles = marks[owner] // block + owner + before
    assert len(tiles.unique()) == len(tiles) > 0
    assert tiles.max() < marks[-1] // block + groups  # the grid

    chosen = torch.randint(0, len(tiles), (30,))
    found = torch.full((30,), -1, dtype=torch.int32, device=DEVICE)
    _groups_kernel[(30,)](*on_device((tiles[chosen].int(), marks)), found, groups, BLOCK_ROWS=block)
    assert found.tolist() == owner[chosen].tolist()


@pytest.mark.parametrize("causal", [False, True])
@types
def test_rows_of_other_runs_are_not_read(causal: bool, dtype: torch.dtype) -> None:
    lengths, prefixes = [9, 1, 0, 33, 17], [(0, 0), (0, 8), (0, 0), (2, 5), (10, 30)]
    args = cast(tuple(on_device(attention_case(1, 16, lengths, prefixes, causal))), dtype)
    qkv, marks = args[0], args[1].tolist()
    whole = kernels.self_attention(*args)
    for run, (first, count) in enumerate(prefixes):
        own = slice(marks[run], marks[run + 1])
        hidden = torch.full_like(qkv, float("nan"))
        hidden[first : first + count] = qkv[first : first + count]
        hidden[own] = qkv[own]
        assert torch.equal(kernels.self_attention(hidden, *args[1:])[own], whole[own])
        assert whole[own].isfinite().all()


@types
def test_states_of_other_groups_are_not_read(dtype: torch.dtype) -> None:
    args = cast(tuple(on_device(cross_case(2, 16, 24, [3, 0, 20, 1], [9, 7, 33, 1]))), dtype)
    whole = kernels.cross_attention(*args)
    for own, seen in zip(
        *(list(zip(m.tolist(), m.tolist()[1:], strict=False)) for m in args[4:6]), strict=True
    ):
        query, states = (torch.full_like(x, float("nan")) for x in args[:2])
        query[slice(*own)], states[slice(*seen)] = args[0][slice(*own)], args[1][slice(*seen)]
        result = kernels.cross_attention(query, states, *args[2:])
        # torch's product may not be the same to the bit beside other rows
        torch.testing.assert_close(result[slice(*own)], whole[slice(*own)], rtol=2e-3, atol=1e-5)


@cases(SMALL)
def test_strided_arguments(op: str, make: Make) -> None:
    args = on_device(make())
    # Columns of a matrix twice as wide, and every other element of a vector.
    strided = [
        torch.stack((a, a + 1), -1)[..., 0] if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in args
    ]
    for one, two in zip(call(kernels, op, strided), call(kernels, op, args), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@cases(SMALL)
@pytest.mark.parametrize("argument", [0, 1])
def test_nan_goes_through(op: str, make: Make, argument: int) -> None:
    args = cast(tuple(on_device(make())), HALF)
    if args[0].shape[0] == 0 or not args[argument].is_floating_point():
        return  # no row to poison
    args[argument] = args[argument].clone()
    args[argument][-1] = float("nan")
    for out, expected in zip(call(kernels, op, args), call(reference, op, args), strict=True):
        assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        pytest.param(slice(0, 64), float("-inf"), id="a-block"),
        pytest.param(slice(0, 149), float("-inf"), id="all-but-one"),
        pytest.param(slice(0, 150), float("-inf"), id="all"),
        pytest.param(slice(70, 71), float("inf"), id="one-above"),
        pytest.param(slice(149, 150), float("nan"), id="one-nan"),
    ],
)
def test_infinite_logits(where: slice, value: float) -> None:
    args = on_device((*layer(6, 24, 150), torch.tensor([[0, 149], [70, 71]] * 3)))
    args[2][where] = value
    for out, expected in zip(kernels.token_logits(*args), reference.token_logits(*args), strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@cases([c for c in SMALL if c[1] in ("7x33x45", "fork-and-restore", "few", "few-before")])
def test_opcheck(op: str, make: Make) -> None:
    ops.get_ops("triton", torch.device(DEVICE))  # which says what results look like
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(getattr(torch.ops.blip_trace_triton, op).default, tuple(on_device(make())))


class Recorder:
    """Stands for a kernel: keeps what it would be launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launches.append((grid, args, options))

        return launch


@cases(CASES)
def test_nothing_is_read_on_the_host(monkeypatch: pytest.MonkeyPatch, op: str, make: Make) -> None:
    # Tensors on the meta device have no values: reading one, in any way, is an error.
    recorder = Recorder()
    for module in MODULES.values():
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, recorder)
    args = cast(tuple(on_device(make(), "meta")), HALF)
    result = getattr(MODULES[op], f"_{op}")(*args)
    expected = call(reference, op, cast(make(), torch.float32))
    for r, e in zip((result,) if isinstance(result, Tensor) else result, expected, strict=True):
        assert r.shape == e.shape
    launches = {"linear": 0, "token_logits": 2}.get(op, 1) if args[0].shape[0] else 0
    assert len(recorder.launches) == launches
    for grid, _, _ in recorder.launches:
        assert all(isinstance(n, int) and n > 0 for n in grid)
    if op.endswith("attention") and launches:
        with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
            getattr(reference, op)(*args)  # which does read


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need a GPU")
def test_one_capture_serves_all_lengths() -> None:
    args = cast(tuple(on_device(attention_case(2, 64, [200, 200, 200], None, True))), HALF)
    kernels.self_attention(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.self_attention(*args)
    for lengths in ([1, 598, 1], [0, 0, 600], [300, 7, 293]):
        args[1].copy_(starts(lengths))
        graph.replay()
        assert_near((out,), "self_attention", args)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("linear", {0: torch.randn(7, 33).double()}, "takes float32, bfloat16 or float16, and x is float64"),
        ("linear", {1: matrix(45, 33).bfloat16()}, "weight is bfloat16, but the input is float32"),
        ("linear", {1: matrix(45, 32)}, r"weight must have shape \[45, 33\], but it is \[45, 32\]"),
        ("linear", {0: torch.randn(33)}, "x must have two dimensions"),
        ("linear_gelu", {2: torch.randn(44)}, r"bias must have shape \[45\]"),
        ("linear_add_norm", {5: int32([0, 1])}, "7 rows of the residual stream meet 2 updates"),
        ("linear_add_norm", {4: torch.arange(7)}, "residual_rows must be a contiguous vector of int32"),
        ("linear_add_norm", {4: int32([0] * 14)[::2]}, "residual_rows must be a contiguous vector of int32"),
        ("self_attention", {1: int32([])}, "starts must be a contiguous vector of int32 that is not empty"),
        ("self_attention", {3: 4}, "does not hold queries, keys and values of 4 heads"),
        ("self_attention", {2: int32([0, 5])}, r"prefixes must be contiguous int32 \[5, 2\]"),
        ("cross_attention", {5: int32([0, 155])}, "query_starts marks 5 groups and state_starts 1"),
        ("cross_attention", {6: 2}, "a query of width 15 does not divide into 2 heads"),
        ("token_logits", {3: torch.zeros(7)}, "tokens must be int64"),
    ],
)
def test_what_is_refused(op: str, change: dict[int, Any], message: str) -> None:
    wanted = "mixed" if "attention" in op else "7x33x45"
    make = next(make for o, name, make in CASES if (o, name) == (op, wanted))
    args = on_device(change.get(i, a) for i, a in enumerate(make()))
    with pytest.raises(ValueError, match=message):
        getattr(kernels, op)(*args)


def test_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match="starts is on cpu, but the input is on meta"):
        MODULES["self_attention"]._self_attention(
            torch.empty(3, 6, device="meta"), starts([3]), None, 1, False
        )


def test_the_CPU_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("blip_trace.kernels.checks"), "_INTERPRETED", False)
    with pytest.raises(ValueError, match="linear runs on a GPU, and x is on the CPU"):
        kernels.linear(matrix(2, 3), matrix(4, 3), None)
