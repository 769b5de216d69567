"""The CUDA kernels' launchers, called with bare pointers as csrc/cuda/kernels.h has them and played by the
emulator, and memory for them in which nothing outside of what they are given can be touched unseen."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from ctypes import c_bool, c_float, c_int, c_int64, c_size_t, c_void_p
from enum import Enum
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from native_build import built
from torch import Tensor

ORDERS = {"forward": 0, "backward": 1, "shuffled": 5}
"""In which a block's threads take turns."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_NOTHING = 0
"""What may be done with a page: C calls it PROT_NONE."""
_NO_RESERVE = 0x4000
"""Linux sets no memory aside for a mapping; Python has no name for it."""
_LOAD = 16
"""Bytes that a kernel reads at once where it can."""


def _fields(*parts: tuple[Any, str]) -> list[tuple[str, Any]]:
    return [(name, kind) for kind, names in parts for name in names.split()]


class Arguments(ctypes.Structure):
    """Of a launcher. Tensors are given for pointers and a dtype for the type; what is not given is null."""

    launcher: ClassVar[str]

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            assert hasattr(self, name), name
            setattr(self, name, value.data_ptr() if isinstance(value, Tensor) else _TYPES.get(value, value))


class Attention(Arguments):
    launcher = "attention"
    _fields_ = _fields(
        (c_int, "type"),
        (c_void_p, "query key value out"),
        (c_int64, "query_stride key_stride value_stride out_stride"),
        (c_void_p, "query_starts key_starts prefixes"),
        (c_int64, "rows groups"),
        (c_int, "heads head_size"),
        (c_float, "scale"),
        (c_bool, "causal"),
    )


class AttendStates(Arguments):
    launcher = "attend_states"
    _fields_ = _fields(
        (c_int, "type"),
        (c_void_p, "query states out query_starts state_starts"),
        (c_int64, "rows groups width"),
        (c_int, "heads"),
        (c_float, "scale"),
    )


class AddNorm(Arguments):
    launcher = "add_norm"
    _fields_ = _fields(
        (c_int, "type"),
        (c_void_p, "update bias residual residual_rows update_rows norm_weight norm_bias normed sum"),
        (c_int64, "rows cols"),
        (c_float, "eps"),
    )


class BiasGelu(Arguments):
    launcher = "bias_gelu"
    _fields_ = _fields((c_int, "type"), (c_void_p, "bias x"), (c_int64, "rows cols"))


class FoldLogits(Arguments):
    launcher = "fold_logits"
    _fields_ = _fields(
        (c_int, "type"),
        (c_void_p, "values bias tokens"),
        (c_int64, "first_word words rows chosen vocabulary"),
        (c_void_p, "maximum sum logits log_sum_exp"),
    )


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(built("emulated") / "tests" / "cuda_emulator" / "libblip_trace_emulated.so"))


@cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def launched(arguments: Arguments, order: int = 0, alone: bool = True) -> bool:
    """Whether a kernel ran to its end and touched nothing that it may not; standard error says why not.
    `alone`: in a process of its own, which then ends in place of this one."""
    _library().blip_trace_emulator_set_order(order)
    run = getattr(_library(), f"blip_trace_emulated_{arguments.launcher}")
    status: int = run(ctypes.byref(arguments), c_size_t(ctypes.sizeof(arguments)), c_bool(alone))
    _library().blip_trace_emulator_set_order(0)
    return status == 0


class Place(Enum):
    """Where a matrix lies in pages that others surround which cannot be touched."""

    ALIGNED = "aligned"  # as near to the end as 16 divides its address
    LAST = "last"  # its last byte is the page's last
    FIRST = "first"  # its first byte is the page's first
    ODD = "odd"  # an element behind the page's first byte: 16 does not divide its address


PLACES = [pytest.param(place, id=place.value) for place in Place]


def places(*wanted: Place) -> pytest.MarkDecorator:
    """For tests whose memory is to lie in these places only."""
    return pytest.mark.parametrize("memory", [PLACES[list(Place).index(w)] for w in wanted], indirect=True)


class _Buffer:
    """Values in a mapping of their own: between two pages that cannot be touched, and amid NaN."""

    def __init__(self, values: Tensor, place: Place, extra: int, written: bool) -> None:
        *rows, cols = values.shape
        self._dtype, self._shape = values.dtype, values.shape
        self._stride = [s + extra for s in values.contiguous().stride()[:-1]] + [1]
        element, page = values.element_size(), mmap.PAGESIZE
        self._count = values.numel() + (rows[0] - 1) * extra if rows else cols
        size = self._count * element
        pages = -(-(size + element) // page) * page
        first = {
            Place.ALIGNED: (pages - size) // _LOAD * _LOAD,
            Place.LAST: pages - size,
            Place.FIRST: 0,
            Place.ODD: element,
        }
        self._first = first[place] // element
        whole = torch.frombuffer(mmap.mmap(-1, pages + 2 * page), dtype=torch.uint8)
        self.bytes, self.written = whole[page:-page], written
        self.bytes.fill_(255)
        self.values = self._in(self.bytes)
        self.values.copy_(values)
        _allow(whole[:page], _NOTHING)
        _allow(whole[-page:], _NOTHING)
        if not written:
            _allow(self.bytes, mmap.PROT_READ)

    def _in(self, of_bytes: Tensor) -> Tensor:
        elements = of_bytes.view(self._dtype)[self._first : self._first + self._count]
        return elements.as_strided(self._shape, self._stride)

    def untouched_around(self) -> bool:
        """Whether nothing was written beside the values."""
        around = self.bytes.clone()
        self._in(around).view(torch.uint8).fill_(255)
        return bool((around == 255).all())


def _allow(pages: Tensor, access: int) -> None:
    if _system().mprotect(c_void_p(pages.data_ptr()), c_size_t(pages.numel()), access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Memory:
    """What a launch reads and writes, every matrix in the same place of pages of its own, but the one of this
    number in place `odd`."""

    def __init__(self, place: Place, odd: int | None = None) -> None:
        self.place, self._odd = place, odd
        # In one kernels load 16 bytes at once and in one they cannot: elsewhere they do as in these two.
        every = place in (Place.ALIGNED, Place.ODD)
        self._orders = ORDERS if every else {"forward": 0}
        self._buffers: list[_Buffer] = []

    def put(self, values: Tensor, extra: int = 0, written: bool = False) -> Tensor:
        """Values as the kernel is to find them. From one row to the next are `extra` elements, of NaN. A
        kernel can write only what is to be `written`, and so can a test."""
        place = Place.ODD if len(self._buffers) == self._odd else self.place
        self._buffers.append(_Buffer(values, place, extra, written))
        return self._buffers[-1].values

    def room(self, shape: Sequence[int], dtype: torch.dtype, extra: int = 0) -> Tensor:
        """For results: full of NaN."""
        return self.put(torch.full(tuple(shape), float("nan"), dtype=dtype), extra, written=True)

    def launch(self, arguments: Arguments) -> None:
        """Run a kernel. It must write only where it may and, in every order of threads, the same."""
        written = [buffer for buffer in self._buffers if buffer.written]
        before = [buffer.bytes.clone() for buffer in written]
        found = []
        for name, order in self._orders.items():
            for buffer, was in zip(written, before, strict=True):
                buffer.bytes.copy_(was)
            # In a process of its own only once, for that takes long: in no order does it read elsewhere.
            assert launched(arguments, order, alone=not found), f"{name}: standard error says why"
            assert all(buffer.untouched_around() for buffer in written), "something is written beside results"
            found.append([buffer.bytes.clone() for buffer in written])
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                assert torch.equal(one, two), f"{arguments.launcher} depends on the order of threads"


def far_apart(rows: int, cols: int, stride: int, dtype: torch.dtype) -> Tensor:
    """A matrix of zeros [rows, cols] of any stride: what nobody touches takes no memory."""
    count = (rows - 1) * stride + cols
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _NO_RESERVE
    mapped = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    return torch.frombuffer(mapped, dtype=dtype).as_strided((rows, cols), (stride, 1))


def near(result: Tensor, compute: Callable[[torch.dtype], Tensor], floor: float = 3e-7) -> None:
    """That a result is as near to float64 as plain torch is, which takes its sums in float32. Where they are
    infinite or NaN, so is the result. `floor`: the least error allowed, for numbers near 1."""
    plain, exact = compute(torch.float32).to(result.dtype), compute(torch.float64)
    finite = exact.isfinite()
    torch.testing.assert_close(result[~finite].double(), exact[~finite], equal_nan=True)
    result, plain, exact = result[finite].double(), plain[finite].double(), exact[finite]
    largest = exact.abs().max().item()
    allowed = 2 * (plain - exact).abs().max().item() + floor * max(1.0, largest)
    error = (result - exact).abs().max().item()
    assert error <= allowed, f"an error of {error}, and {allowed} is allowed"
    enough = 20 * allowed
    assert largest > enough, "zeros would do"
    assert exact.numel() < 9 or exact.std() > enough, "the mean would do"
