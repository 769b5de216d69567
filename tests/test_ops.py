"""The compiled ops against `reference.py`: every op, shape of trouble, type and instruction set."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from blip_trace import doctor, ops, reference

extension = ops.extension()
CAPABILITIES = extension.available_cpu_capabilities() if extension else ["none"]
TYPES = [
    pytest.param(dtype, way, id=f"{dtype}-{way}".removeprefix("torch."))
    for dtype, ways in {torch.float32: ("torch", "own"), torch.bfloat16: ("torch", "own", "widened")}.items()
    for way in ways
]
Make = Callable[[], tuple[Any, ...]]
CASES: list[tuple[str, str, Make]] = []


def case(op: str, name: str) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        CASES.append((op, name, make))
        return make

    return add


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts(lengths: list[int]) -> Tensor:
    return int32([0, *itertools.accumulate(lengths)])


def matrix(rows: int, cols: int, spread: float = 1.0) -> Tensor:
    return torch.randn(rows, cols) * spread


def layer(rows: int, depth: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    return matrix(rows, depth), matrix(cols, depth, depth**-0.5), torch.randn(cols)


for rows, depth, cols in [(1, 16, 16), (7, 33, 45), (63, 96, 130)]:
    size = f"{rows}x{depth}x{cols}"
    case("linear", size)(lambda a=(rows, depth, cols): layer(*a))
    case("linear_gelu", size)(lambda a=(rows, depth, cols): layer(*a))

    @case("linear_add_norm", size)
    def _plain(a: tuple[int, int, int] = (rows, depth, cols)) -> tuple[Any, ...]:
        norm = (torch.randn(a[2]), torch.randn(a[2]))
        return (*layer(*a), matrix(a[0], a[2]), None, None, *norm, 1e-5, True)

    @case("token_logits", size)
    def _logits(a: tuple[int, int, int] = (rows, depth, cols)) -> tuple[Any, ...]:
        return (*layer(*a), torch.randint(0, a[2], (a[0], 1 + a[0] % 3)))


@case("linear", "no-bias-no-rows")
def _no_rows() -> tuple[Any, ...]:
    return matrix(0, 24), matrix(10, 24), None


@case("linear", "strided")
def _strided() -> tuple[Any, ...]:
    return matrix(24, 5).t(), matrix(24, 10, 0.2).t(), None


@case("linear_gelu", "wide-range")
def _gelu_range() -> tuple[Any, ...]:
    x = torch.linspace(-60, 60, 999)[:, None]
    return x, torch.ones(1, 1), torch.zeros(1)


@case("linear_add_norm", "fork-and-restore")
def _fork() -> tuple[Any, ...]:
    residual_rows, update_rows = int32([0, 1, 2, 0, 6, 2, 5]), int32([0, 1, 2, 3, 1, 2, 3])
    x, weight, _ = layer(4, 20, 35)
    norm = (torch.randn(35), torch.randn(35))
    return x, weight, None, matrix(7, 35), residual_rows, update_rows, *norm, 1e-12, False


@case("linear_add_norm", "only-updates-gathered")
def _gather_updates() -> tuple[Any, ...]:
    norm = (torch.randn(35), torch.randn(35))
    return *layer(4, 20, 35), matrix(3, 35), None, int32([3, 3, 0]), *norm, 1e-5, True


@case("token_logits", "several-blocks")
def _blocks() -> tuple[Any, ...]:
    return *layer(9, 24, 8192 * 2 + 37), torch.tensor([[0, 8191, 8192]] * 8 + [[16420, 16384, 5]])


for name, heads, size_of_head, lengths in [
    ("mixed", 3, 5, [1, 9, 0, 7, 130]),
    ("short", 4, 32, [8] * 5),
    ("long", 2, 64, [200, 577]),
    ("just-below-a-tile", 2, 16, [15, 16, 31, 32, 63, 64, 127, 128]),
    ("many-heads", 264, 16, [132]),
    ("none", 2, 8, []),
]:
    for causal in (False, True):

        @case("self_attention", f"{name}{'-causal' * causal}")
        def _self(a: Any = (heads, size_of_head, lengths, causal)) -> tuple[Any, ...]:
            heads, size, lengths, causal = a
            return matrix(sum(lengths), 3 * heads * size), starts(lengths), None, heads, causal


for name, heads, size_of_head, lengths, prefixes in [
    # the first run's beginning before three others, nothing before the fifth
    ("shared-beginnings", 3, 5, [9, 1, 4, 8, 9], [(0, 0), (0, 8), (0, 5), (0, 1), (0, 0)]),
    ("long-beginning", 2, 32, [577, 3, 0], [(0, 0), (0, 574), (0, 12)]),
    ("long-runs", 2, 64, [600, 580], [(0, 0), (0, 20)]),
]:
    for causal in (False, True):

        @case("self_attention", f"{name}{'-causal' * causal}")
        def _shared(a: Any = (heads, size_of_head, lengths, prefixes, causal)) -> tuple[Any, ...]:
            heads, size, lengths, prefixes, causal = a
            before = torch.tensor(prefixes, dtype=torch.int32)
            return matrix(sum(lengths), 3 * heads * size), starts(lengths), before, heads, causal


for name, heads, size_of_head, width, queries, states in [
    ("mixed", 3, 5, 19, [1, 0, 9, 130, 2], [9, 3, 77, 65, 1]),
    ("absorbed", 4, 32, 128, [1] * 20, [9] * 20),
    ("folded", 2, 64, 96, [9, 300], [577, 577]),
    ("clean-run", 4, 64, 256, [9], [577]),
    ("just-below-a-tile", 2, 16, 24, [70, 40, 1, 2], [15, 31, 63, 127]),
]:

    @case("cross_attention", name)
    def _cross(a: Any = (heads, size_of_head, width, queries, states)) -> tuple[Any, ...]:
        heads, size, width, queries, states = a
        channels = heads * size
        query, states_of_all = matrix(sum(queries), channels), matrix(sum(states), width)
        weights = [matrix(channels, width, width**-0.5) for _ in range(2)]
        return query, states_of_all, *weights, starts(queries), starts(states), heads


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def call(backend: ops.OpSet, op: str, args: list[Any]) -> tuple[Tensor, ...]:
    out = getattr(backend, op)(*args)
    return (out,) if isinstance(out, Tensor) else out


def assert_as_near_as_the_reference(result: tuple[Tensor, ...], op: str, args: list[Any]) -> None:
    """To float64: twice as far off at most as plain torch is in the type of the arguments."""
    exact = call(reference, op, cast(tuple(args), torch.float64))
    plain = call(reference, op, args)
    assert len(result) == len(exact)
    for r, p, e in zip(result, plain, exact, strict=True):
        assert (r.dtype, r.shape) == (p.dtype, p.shape)
        assert not r.isnan().any()
        if r.numel():
            largest = e.abs().max().item()
            allowed = 2 * (p.double() - e).abs().max().item() + 3e-7 * max(1.0, largest)
            assert (r.double() - e).abs().max().item() <= allowed


@pytest.fixture
def native() -> Iterator[ops.OpSet]:
    """The compiled ops; memory that they allocate is full of NaN, and choices made are taken back."""
    if extension is None:
        pytest.fail(f"the extension is not there: {ops.native_unavailable_reason()}")
    chosen, threads = extension.cpu_capability(), torch.get_num_threads()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield ops.get_ops("native")
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    extension.set_cpu_capability(chosen)
    extension.force_products(None)


every_case = pytest.mark.parametrize(
    ("op", "make"), [pytest.param(op, make, id=f"{op}-{name}") for op, name, make in CASES]
)


@every_case
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "way"), TYPES)
def test_as_near_to_float64_as_the_reference(
    native: ops.OpSet, op: str, make: Make, capability: str, dtype: torch.dtype, way: str
) -> None:
    extension.set_cpu_capability(capability)
    extension.force_products(way)
    args = cast(make(), dtype)
    assert_as_near_as_the_reference(call(native, op, args), op, args)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_number_of_threads_does_not_matter(
    native: ops.OpSet, op: str, make: Make, dtype: torch.dtype
) -> None:
    args = cast(make(), dtype)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(call(native, op, args))
    for one, two in zip(*results, strict=True):
        # torch's matrix product may divide its sums differently; everything else is the same to the bit.
        torch.testing.assert_close(one, two, rtol=1e-5 if dtype == torch.float32 else 1.6e-2, atol=1e-5)


@every_case
def test_nan_goes_through(native: ops.OpSet, op: str, make: Make) -> None:
    for capability in CAPABILITIES:
        extension.set_cpu_capability(capability)
        args = cast(make(), torch.float32)
        if args[0].shape[0] == 0:
            continue  # no row to poison
        args[0] = args[0].clone()
        args[0][0] = float("nan")
        for out, expected in zip(call(native, op, args), call(reference, op, args), strict=True):
            assert torch.equal(out.isnan(), expected.isnan())


@pytest.mark.parametrize("argument", [1, 2, 3, 4])
def test_nan_in_states_and_weights_goes_through_cross_attention(native: ops.OpSet, argument: int) -> None:
    for queries, states in ([1, 2], [9, 4]), ([100], [9]):
        args: list[Any] = [matrix(sum(queries), 12), matrix(sum(states), 20), matrix(12, 20), matrix(12, 20)]
        args += [starts(queries), starts(states), 3]
        args[argument - 1][0, 0] = float("nan")
        out, expected = native.cross_attention(*args), reference.cross_attention(*args)
        # Absorbed, a NaN state may reach further: it is in the weighted sum before a head's columns are cut.
        assert out[expected.isnan()].isnan().all()


@every_case
def test_opcheck(native: ops.OpSet, op: str, make: Make) -> None:
    args = make()
    if all(not isinstance(a, Tensor) or a.numel() for a in args):
        torch.use_deterministic_algorithms(False)
        torch.library.opcheck(getattr(torch.ops.blip_trace, op).default, args)


class SeenOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_native_ops_are_the_compiled_ones(native: ops.OpSet) -> None:
    with SeenOps() as seen:
        for op, _, make in CASES:
            getattr(native, op)(*make())
    assert {op for op, _, _ in CASES} == {
        name.removeprefix("blip_trace::") for name in seen.names if name.startswith("blip_trace::")
    }
    assert sorted(vars(native)) == sorted({op for op, _, _ in CASES})


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        (
            "linear",
            {0: torch.randn(7, 33, dtype=torch.float64)},
            "takes float32 or bfloat16, and x is Double",
        ),
        ("linear", {1: matrix(45, 33).bfloat16()}, "weight is BFloat16, but the input is Float"),
        ("linear", {1: matrix(45, 32)}, r"weight must have shape \[45, 33\], but it is \[45, 32\]"),
        ("linear", {0: torch.randn(33)}, "x must have two dimensions"),
        ("linear_gelu", {2: torch.randn(44)}, r"bias must have shape \[45\]"),
        ("linear_add_norm", {4: int32([0, 7]), 5: int32([0, 0])}, r"residual_rows\[1\] is 7, out of range"),
        ("linear_add_norm", {4: int32([0, 1]), 5: int32([-1, 0])}, r"update_rows\[0\] is -1, out of range"),
        ("linear_add_norm", {5: int32([0, 1])}, "7 rows of the residual stream meet 2 updates"),
        ("linear_add_norm", {4: torch.arange(7)}, "residual_rows must be a contiguous vector of int32"),
        ("self_attention", {1: int32([0, 5])}, "starts must run from 0 to 147, but it runs from 0 to 5"),
        ("self_attention", {1: int32([0, 9, 5, 147])}, "starts must not fall, but 9 is followed by 5"),
        ("self_attention", {3: 4}, "does not hold queries, keys and values of 4 heads"),
        ("self_attention", {2: int32([0, 5])}, r"prefixes must be contiguous int32 \[5, 2\]"),
        ("self_attention", {2: int32([0, 0] * 4 + [147, 1]).view(5, 2)}, "1 rows from 147 on, is not within"),
        ("self_attention", {2: int32([0, 0] * 4 + [-1, 1]).view(5, 2)}, "1 rows from -1 on, is not within"),
        ("cross_attention", {5: int32([0, 0, 5, 9, 10, 155])}, "group 0 has query rows but no states"),
        ("cross_attention", {5: int32([0, 155])}, "query_starts marks 5 groups and state_starts 1"),
        ("token_logits", {3: torch.full((7, 1), 45)}, "token 45 is out of range for a vocabulary of 45"),
        ("token_logits", {3: torch.zeros(7)}, "tokens must be int64"),
    ],
)
def test_what_is_refused(native: ops.OpSet, op: str, change: dict[int, Any], message: str) -> None:
    wanted = "mixed" if "attention" in op else "7x33x45"
    make = next(make for o, name, make in CASES if (o, name) == (op, wanted))
    args = [change.get(i, a) for i, a in enumerate(make())]
    with pytest.raises((ValueError, IndexError), match=message):
        getattr(native, op)(*args)


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", missing)
    module, reason = ops._load()
    monkeypatch.undo()
    monkeypatch.setattr(ops, "_C", module)
    monkeypatch.setattr(ops, "_load_error", reason)
    with pytest.raises(ops.BackendUnavailableError, match=r"_C is missing; build it with `make`") as error:
        ops.get_ops("native")
    assert "\n" not in str(error.value)
    assert ops.get_ops("reference") is reference
    assert doctor.report()["backends"]["native (CPU)"] == str(error.value)


def test_extension_for_another_torch_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def build_info() -> dict[str, str]:
            return {"torch": "2.9.0"}

    monkeypatch.setattr(ops, "_C", Other())
    with pytest.raises(ops.BackendUnavailableError, match=r"built against torch 2\.9\.0, and this is torch"):
        ops.get_ops("native")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="'native', 'triton' and 'reference'"):
        ops.get_ops("cuda")


def test_kernels_are_compiled_for_torch_s_threads() -> None:
    # at::parallel_for is a plain loop in a build without OpenMP, and nothing but time would tell
    assert extension is not None
    assert extension.build_info()["threads"] == (
        "OpenMP" if "OpenMP" in torch.__config__.parallel_info() else "none"
    )
