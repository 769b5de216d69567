"""The compiled ops, `torch.ops.blip_trace.*`: loading, fakes, and the set of ops that the engine calls.

What each op computes is said, with shapes, by its twin of the same name in `reference.py`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import reference

CPU = torch.device("cpu")
_NOT_HERE = "The `native` backend does not work here:"
_HOW_TO_BUILD = "build it with `make`, or with `pip install --no-build-isolation -e .`"


class BackendUnavailableError(RuntimeError):
    """A backend was asked for that does not work in this installation; the message says how to get it."""


class OpSet(Protocol):
    """What a backend implements. `reference.py` has the meaning of every op."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor: ...

    def linear_add_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        residual_rows: Tensor | None,
        update_rows: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        return_sum: bool,
    ) -> tuple[Tensor, Tensor]: ...

    def self_attention(
        self, qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool
    ) -> Tensor: ...

    def cross_attention(
        self,
        query: Tensor,
        states: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        query_starts: Tensor,
        state_starts: Tensor,
        heads: int,
    ) -> Tensor: ...

    def token_logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]: ...


def get_ops(name: str, device: torch.device = CPU) -> OpSet:
    """The ops of a backend, for tensors on a device: "reference" (plain torch), "native" (this package's
    compiled extension) or "triton". Raises `BackendUnavailableError` where it does not work here."""
    if name == "reference":
        return reference
    if name == "native":
        if reason := native_unavailable_reason(device):
            raise BackendUnavailableError(reason)
        return cast(OpSet, _native_ops())
    if name == "triton":
        if reason := triton_unavailable_reason(device):
            raise BackendUnavailableError(reason)
        return _triton_ops()
    raise ValueError(f"There is no backend {name!r}; there are 'native', 'triton' and 'reference'.")


def choose_backend(name: str, device: torch.device) -> str:
    """The backend of this name; of "auto" native where it works, else, with a warning, reference. Raises as
    `get_ops` does."""
    if name != "auto":
        get_ops(name, device)
        return name
    reason = native_unavailable_reason(device)
    if reason is None:
        return "native"
    warnings.warn(f"tracing with the slower reference backend: {reason}", stacklevel=4)
    return "reference"


def native_unavailable_reason(device: torch.device = CPU) -> str | None:
    """One sentence on why the `native` backend does not work on this device and how to get it; None if it
    does."""
    if _C is None:
        return _load_error
    built, running = str(_C.build_info()["torch"]), str(torch.__version__)
    if built != running:
        return (
            f"{_NOT_HERE} the extension was built against torch {built}, and this is torch {running}; "
            f"re{_HOW_TO_BUILD}."
        )
    return _load_cuda() if device.type == "cuda" else None


def triton_unavailable_reason(device: torch.device = CPU) -> str | None:
    """The same of the `triton` backend. Without a GPU its kernels run in Triton's interpreter alone, which is
    for tests."""
    if importlib.util.find_spec("triton") is None:
        return "The `triton` backend does not work here: install it with `pip install triton`."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "The `triton` backend needs a GPU; TRITON_INTERPRET=1, set before the program starts, runs its "
            "kernels on the CPU, slowly."
        )
    return None


def extension() -> ModuleType | None:
    """The extension module `blip_trace._C`: facts on the build and the processor. None if it is missing."""
    return _C


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("blip_trace._C"), ""
    except ModuleNotFoundError:
        return None, f"{_NOT_HERE} the compiled extension blip_trace._C is missing; {_HOW_TO_BUILD}."
    except ImportError as error:
        return None, (
            f"{_NOT_HERE} blip_trace._C does not load ({error}), most likely because it was built against "
            f"a torch other than this {torch.__version__}; re{_HOW_TO_BUILD}."
        )


@functools.cache
def _load_cuda() -> str | None:
    """Load the CUDA kernels of the native ops; one sentence on why that cannot be done, None if it is."""
    library = Path(__file__).with_name("_cuda.so")
    if not library.is_file():
        return (
            f"{_NOT_HERE} on a GPU: the library blip_trace/_cuda.so is missing; with nvcc and a torch that "
            f"has CUDA, {_HOW_TO_BUILD}."
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{_NOT_HERE} on a GPU: blip_trace/_cuda.so does not load ({error}); re{_HOW_TO_BUILD}."
    return None


class _NativeOps:
    """The registered ops, each resolved once: a call is then a dictionary look-up and a dispatch."""

    def __init__(self) -> None:
        ops: Any = torch.ops.blip_trace
        self.linear = ops.linear.default
        self.linear_gelu = ops.linear_gelu.default
        self.linear_add_norm = ops.linear_add_norm.default
        self.self_attention = ops.self_attention.default
        self.cross_attention = ops.cross_attention.default
        self.token_logits = ops.token_logits.default


@functools.cache
def _native_ops() -> _NativeOps:
    return _NativeOps()


@functools.cache
def _triton_ops() -> OpSet:
    found = cast(OpSet, importlib.import_module("blip_trace.kernels"))
    _register_fakes("blip_trace_triton")
    return found


def _check_device(x: Tensor, *others: Tensor | None) -> None:
    """What the bindings check too, for a fake has nothing else that fails where a tensor was left behind."""
    for other in others:
        torch._check(
            other is None or other.device == x.device,
            lambda: f"an op of blip_trace was given tensors on {x.device} and on another device",
        )


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check_device(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    residual_rows: Tensor | None,
    update_rows: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    _check_device(x, weight, bias, residual, residual_rows, update_rows, norm_weight, norm_bias)
    rows = residual.shape[0] if residual_rows is None else residual_rows.shape[0]
    normed = x.new_empty(rows, weight.shape[0])
    return normed, torch.empty_like(normed) if return_sum else x.new_empty(0)


def _fake_self_attention(
    qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool
) -> Tensor:
    _check_device(qkv, starts, prefixes)
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def _fake_cross_attention(
    query: Tensor,
    states: Tensor,
    key_weight: Tensor,
    value_weight: Tensor,
    query_starts: Tensor,
    state_starts: Tensor,
    heads: int,
) -> Tensor:
    _check_device(query, states, key_weight, value_weight, query_starts, state_starts)
    return query.new_empty(query.shape)


def _fake_token_logits(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    _check_device(hidden, weight, bias, tokens)
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, tokens.shape[1], dtype=torch.float64),
        hidden.new_empty(rows, dtype=torch.float64),
    )


def _register_fakes(namespace: str) -> None:
    """Say what the results of a backend's ops look like, for whoever asks without computing them."""
    fakes: dict[str, Callable[..., Any]] = {
        "linear": _fake_linear,
        "linear_gelu": _fake_linear,
        "linear_add_norm": _fake_linear_add_norm,
        "self_attention": _fake_self_attention,
        "cross_attention": _fake_cross_attention,
        "token_logits": _fake_token_logits,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)


_C, _load_error = _load()
if _C is not None:
    _register_fakes("blip_trace")
