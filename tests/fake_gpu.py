"""A GPU that computes nothing: its tensors have shapes, types and a device, and no values.

What runs on it proves that every tensor is where it is needed, for an op whose tensors are on two devices
fails, and that nothing waits for the device unseen, for there is no value to wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from blip_trace import Tracer, checks, devices, head, measuring

GPU = torch.device("cuda", 0)


class _Redirected(TorchFunctionMode):
    """Lets a fake device do what mentions it or its tensors, and all else be done as always."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self.pinned = WeakTensorKeyDictionary()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = tree_leaves((args, kwargs or {}))
        there = any(isinstance(x, FakeTensor) for x in given)
        named = any(isinstance(x, torch.device | str) and str(x).startswith("cuda") for x in given)
        if not (there or named):
            return self._here(func, args, dict(kwargs or {}))
        if there and func is Tensor.__bool__:
            self.waits.append("bool")
            return True
        if there and func is Tensor.__float__:
            self.waits.append("float")
            return 1.0
        with self.fake:
            if func is Tensor.__getitem__:
                return self._picked(*args)
            if func is Tensor.__setitem__:
                self._put(*args)
                return None
            if func is torch.tensor:
                self.waits.append("numbers of this process")
            if func is Tensor.to and named and not there:
                if args[0] not in self.pinned or not (kwargs or {}).get("non_blocking"):
                    self.waits.append("what is sent")
                dtype = next((x for x in given if isinstance(x, torch.dtype)), args[0].dtype)
                return torch.empty(args[0].shape, dtype=dtype, device=GPU)
            return func(*args, **(kwargs or {}))

    def _here(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """On the CPU; memory that a GPU could read by itself is only noted, for there is no driver."""
        if not kwargs.pop("pin_memory", False):
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        self.pinned[made] = True
        return made

    def _put(self, whole: Tensor, places: Any, values: Any) -> None:
        if isinstance(values, Tensor):
            values = values.expand_as(self._picked(whole, places))
            if values.device != whole.device:
                raise RuntimeError(f"values on {values.device} are put into a tensor on {whole.device}")

    def _picked(self, whole: Tensor, places: Any) -> Tensor:
        """What indexing returns. torch's own would look for the device's driver."""
        for index in tree_leaves(places):
            if isinstance(index, Tensor) and index.device != whole.device:
                self.waits.append("row numbers on the CPU")

        def shape_of(x: Any) -> Any:
            # row numbers beyond the end fail on the GPU too, but here there are no values to look at
            return torch.empty(x.shape, dtype=x.dtype, device="meta") if isinstance(x, Tensor) else x

        shape = shape_of(whole)[tree_map(shape_of, places)].shape
        return torch.empty(shape, dtype=whole.dtype, device=whole.device)


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A machine with such a GPU; the list says what waited for it, but for what was fetched on purpose."""

    def fetch(values: Tensor) -> Callable[[], Tensor]:
        if not isinstance(values, FakeTensor):
            return devices.fetch(values)
        return lambda: torch.ones(values.shape, dtype=values.dtype)

    for module in (checks, head, measuring):
        monkeypatch.setattr(module, "fetch", fetch)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**34, 2**35))
    with _Redirected() as mode:
        yield mode.waits


def onto_gpu(node: Any) -> Any:
    """A Program with its weights on the GPU."""
    if isinstance(node, Tensor):
        return torch.empty(node.shape, dtype=node.dtype, device=GPU)
    if is_dataclass(node):
        return replace(node, **{own.name: onto_gpu(getattr(node, own.name)) for own in fields(node)})  # type: ignore[type-var]
    return tuple(map(onto_gpu, node)) if isinstance(node, tuple) else node


class GpuTracer(Tracer):
    """A tracer whose weights are there."""

    device = property(lambda self: GPU)  # type: ignore[assignment]
    _graphs = None

    def __init__(self, model: Any, processor: Any, backend: str = "native") -> None:
        whole = Tracer(model, processor, backend="reference")
        self.__dict__ |= whole.__dict__
        self.__dict__["program"] = onto_gpu(whole.program)
        self.backend = backend
        self._preparer = type(whole._preparer)(self.program, self.inputs)
        self._assembler = type(whole._assembler)(self.program, self.inputs)
