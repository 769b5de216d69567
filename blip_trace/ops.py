"""The compiled ops, `torch.ops.blip_trace.*`: loading, fakes, and the set of ops that the engine calls.

What each op computes is said, with shapes, by its twin of the same name in `reference.py`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from . import reference

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


def get_ops(name: str) -> OpSet:
    """The ops of a backend: "reference" (plain torch) or "native" (this package's compiled extension)."""
    if name == "reference":
        return reference
    if name == "native":
        if reason := native_unavailable_reason():
            raise BackendUnavailableError(reason)
        return cast(OpSet, _native_ops())
    raise ValueError(f"There is no backend {name!r}; there are 'native' and 'reference'.")


def native_unavailable_reason() -> str | None:
    """One sentence on why the `native` backend does not work here and how to get it; None if it does."""
    if _C is None:
        return _load_error
    built, running = str(_C.build_info()["torch"]), str(torch.__version__)
    if built != running:
        return (
            f"{_NOT_HERE} the extension was built against torch {built}, and this is torch {running}; "
            f"re{_HOW_TO_BUILD}."
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


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
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
    rows = residual.shape[0] if residual_rows is None else residual_rows.shape[0]
    normed = x.new_empty(rows, weight.shape[0])
    return normed, torch.empty_like(normed) if return_sum else x.new_empty(0)


def _fake_self_attention(
    qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool
) -> Tensor:
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
    return query.new_empty(query.shape)


def _fake_token_logits(hidden: Tensor, weight: Tensor, bias: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return (
        hidden.new_empty(rows, tokens.shape[1], dtype=torch.float64),
        hidden.new_empty(rows, dtype=torch.float64),
    )


_C, _load_error = _load()
if _C is not None:
    torch.library.register_fake("blip_trace::linear", _fake_linear)
    torch.library.register_fake("blip_trace::linear_gelu", _fake_linear)
    torch.library.register_fake("blip_trace::linear_add_norm", _fake_linear_add_norm)
    torch.library.register_fake("blip_trace::self_attention", _fake_self_attention)
    torch.library.register_fake("blip_trace::cross_attention", _fake_cross_attention)
    torch.library.register_fake("blip_trace::token_logits", _fake_token_logits)
