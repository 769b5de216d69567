"""Argument checks that the ops share: of types, shapes and devices alone.

Values are never looked at, for that would wait for the device: row numbers, starts and tokens that are out
of range are the caller's to avoid.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED: bool = triton.knobs.runtime.interpret


def check_matrix(op: str, name: str, x: Tensor) -> None:
    """Refuse all but matrices of a floating-point type, on a device on which kernels run."""
    if x.dtype not in _TYPES:
        raise ValueError(
            f"blip_trace_triton::{op} takes float32, bfloat16 or float16, and {name} is {_type_of(x)}."
        )
    if x.dim() != 2:
        raise ValueError(
            f"blip_trace_triton::{op}: {name} must have two dimensions, but its shape is {list(x.shape)}."
        )
    if x.device.type == "cpu" and not _INTERPRETED:
        raise ValueError(f"blip_trace_triton::{op} runs on a GPU, and {name} is on the CPU.")


def check_like(op: str, name: str, x: Tensor, like: Tensor, sizes: tuple[int, ...]) -> None:
    """`x` is like `like` in type and device, and has the sizes given."""
    if x.dtype != like.dtype:
        raise ValueError(
            f"blip_trace_triton::{op}: {name} is {_type_of(x)}, but the input is {_type_of(like)}; "
            "both must be of one type."
        )
    _check_device(op, name, x, like)
    if x.shape != sizes:
        raise ValueError(
            f"blip_trace_triton::{op}: {name} must have shape {list(sizes)}, but it is {list(x.shape)}."
        )


def check_rows(op: str, name: str, rows: Tensor, like: Tensor) -> None:
    """`rows` is a vector of int32 row numbers."""
    if rows.dtype != torch.int32 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"blip_trace_triton::{op}: {name} must be a contiguous vector of int32.")
    _check_device(op, name, rows, like)


def check_starts(op: str, name: str, starts: Tensor, like: Tensor) -> int:
    """`starts` is a vector of int32; returns the number of parts that it marks."""
    if starts.dtype != torch.int32 or starts.dim() != 1 or not starts.is_contiguous() or not starts.numel():
        raise ValueError(
            f"blip_trace_triton::{op}: {name} must be a contiguous vector of int32 that is not empty."
        )
    _check_device(op, name, starts, like)
    return starts.numel() - 1


def check_prefixes(op: str, prefixes: Tensor, like: Tensor, groups: int) -> None:
    """`prefixes` is int32 [groups, 2]."""
    if prefixes.dtype != torch.int32 or prefixes.shape != (groups, 2) or not prefixes.is_contiguous():
        raise ValueError(
            f"blip_trace_triton::{op}: prefixes must be contiguous int32 [{groups}, 2], but it is "
            f"{_type_of(prefixes)} {list(prefixes.shape)}."
        )
    _check_device(op, "prefixes", prefixes, like)


def check_tokens(op: str, tokens: Tensor, like: Tensor) -> None:
    """`tokens` is int64 [rows, K], with the rows of `like`."""
    rows = like.shape[0]
    if tokens.dtype != torch.int64 or tokens.dim() != 2 or tokens.shape[0] != rows:
        raise ValueError(
            f"blip_trace_triton::{op}: tokens must be int64 [{rows}, K], but it is {_type_of(tokens)} "
            f"{list(tokens.shape)}."
        )
    _check_device(op, "tokens", tokens, like)


def _check_device(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(
            f"blip_trace_triton::{op}: {name} is on {x.device}, but the input is on {like.device}."
        )


def _type_of(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
