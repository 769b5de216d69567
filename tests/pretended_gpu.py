"""A GPU that is a part of this process: its tensors say that they are on cuda:0, and the CPU computes them.

What runs on it proves that every tensor is where it is needed, for an op whose tensors are on two devices
fails; that nothing waits for the device unseen, for every way to wait is noted; that what is fetched is
waited for before it is read, for until then it is wrong; and that the numbers are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from blip_trace import ops, tracer
from blip_trace.graphs import Graphs

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
aten = torch.ops.aten

WAITED_FOR = {
    aten._local_scalar_dense.default: "a value",
    aten.is_nonzero.default: "a value",
    aten.nonzero.default: "which are not zero",
    aten.masked_select.default: "which are chosen",
    aten._unique2.default: "which are distinct",
    aten.repeat_interleave.Tensor: "how many there are",
}
"""Ops whose results, or the sizes of these, are not known before the device has come to them."""

COPIED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default, aten.copy_.default}
"""Ops that take tensors of the CPU too, and copy them first."""

MADE_HERE = {torch.tensor, torch.as_tensor, torch.asarray}
"""What is made from this process's numbers and then sent."""


class OnGpu(Tensor):
    """A tensor there, of these numbers."""

    numbers: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnGpu:
        with torch.inference_mode(False):  # views of what was made outside of it are none of its tensors
            made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype
            )
        made.numbers = numbers.detach()
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        if any(not isinstance(x, OnGpu) and x.dim() for x in given):
            if func not in COPIED:
                raise RuntimeError(f"{func} of tensors on two devices")
            Machine.note("a copy")
        if func in WAITED_FOR:
            Machine.note(WAITED_FOR[func])
        if func is aten.index.Tensor and any(x.dtype == torch.bool for x in given[1:]):
            Machine.note("which are chosen")
        owners = {id(x.numbers): x for x in given if isinstance(x, OnGpu)}

        def there(made: Any) -> Any:
            if not isinstance(made, Tensor):
                return made
            return owners[id(made)] if id(made) in owners else OnGpu(made)  # in place: it as it came

        return tree_map(there, func(*_numbers(args), **_numbers(kwargs or {})))


def _numbers(node: Any) -> Any:
    """Arguments as the CPU takes them."""
    return tree_map(lambda x: x.numbers if isinstance(x, OnGpu) else x, node)


class Machine(TorchFunctionMode):
    """Has such a GPU. `waits`: how this process waited for it, but for what was fetched on purpose."""

    active: Machine | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._pinned = WeakTensorKeyDictionary()
        self._coming: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def note(cls, how: str) -> None:
        """That it was waited for."""
        assert cls.active is not None, "the GPU is not there any more"
        cls.active.waits.append(how)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if args and isinstance(args[0], OnGpu):
            if func is Tensor.tolist:
                self.waits.append("values")
                return args[0].numbers.tolist()
            if func is Tensor.new_tensor:
                self.waits.append("what is sent")
                return OnGpu(args[0].numbers.new_tensor(*args[1:], **{**kwargs, "device": CPU}))
            if func is Tensor.data_ptr:
                return args[0].numbers.data_ptr()
            if func in (Tensor.numpy, Tensor.__array__):
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if func in MADE_HERE:
                self.waits.append("what is sent")
            return OnGpu(func(*_numbers(args), **{**kwargs, "device": CPU}))
        pinned = kwargs.pop("pin_memory", False)
        made = func(*args, **kwargs)
        if pinned:
            self._pinned[made] = True
        return made

    def _moved(self, func: Callable[..., Any], given: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What `to` does."""
        waiting = not kwargs.pop("non_blocking", False)
        like = [x for x in args if isinstance(x, Tensor)]
        named = [x for x in (*args, kwargs.pop("device", None)) if isinstance(x, torch.device | str)]
        where = torch.device(named[0]) if named else like[0].device if like else given.device
        where = {Tensor.cpu: CPU, Tensor.cuda: GPU}.get(func, where)
        dtypes = [x for x in (*args, kwargs.pop("dtype", None)) if isinstance(x, torch.dtype)]
        dtype = dtypes[0] if dtypes else like[0].dtype if like else given.dtype
        if where.type == given.device.type:
            return given if dtype == given.dtype else aten._to_copy(given, dtype=dtype)
        if where.type == "cuda":
            if waiting or given not in self._pinned:
                self.waits.append("what is sent")
            return OnGpu(given.detach().clone().to(dtype))
        assert isinstance(given, OnGpu)
        numbers = given.numbers.to(dtype, copy=True)
        if waiting:
            self.waits.append("what is fetched")
            return numbers
        self._coming.append((wrong(numbers), numbers))
        return self._coming[-1][0]

    def arriving(self) -> list[tuple[Tensor, Tensor]]:
        """What was asked for since the last call."""
        coming, self._coming = self._coming, []
        return coming


def wrong(numbers: Tensor) -> Tensor:
    """As many numbers that differ."""
    if numbers.dtype == torch.bool:
        return ~numbers
    return torch.full_like(numbers, float("nan") if numbers.is_floating_point() else -(2**31))


class Event:
    """When it was waited for, what was fetched before it was recorded is there."""

    def __init__(self) -> None:
        self._coming: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: Any) -> None:
        """Behind what was asked for until now."""
        assert Machine.active is not None
        self._coming = Machine.active.arriving()

    def synchronize(self) -> None:
        """Wait for it."""
        for host, numbers in self._coming:
            host.copy_(numbers)


@dataclass
class Replay:
    """What stands in for a CUDA graph: the function is called again, on the tensors that were recorded."""

    function: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    calls: int = 0

    def replay(self) -> None:
        self.calls += 1
        self.output.copy_(self.function(*self.inputs))


class RecordedGraphs(Graphs):
    """Graphs without CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Replay] = []

    def _capture(self, function: Any, inputs: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        output = torch.full_like(function(*inputs), float("nan"))
        self.made.append(Replay(function, inputs, output))
        return self.made[-1], output


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine that has one."""
    machine = Machine()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**35))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(ops, "native_unavailable_reason", lambda device=None: None)
    monkeypatch.setattr(tracer, "Graphs", RecordedGraphs)
    monkeypatch.setattr(Machine, "active", machine)
    # weights there are other tensors than those that were here
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with machine:
            yield machine
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
