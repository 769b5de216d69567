"""What runs a GPU's kernels: the GPU itself and, so that machines without one prove as much as they can, the
CUDA sources compiled for the CPU and played by an emulator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_build import built

from blip_trace import ops

EMULATED = "emulated CUDA"
GPUS = {"CUDA": "native", "Triton": "triton"}
"""Backends on a GPU, by the name of the machine."""

OPS = ("cross_attention", "linear", "linear_add_norm", "linear_gelu", "self_attention", "token_logits")
HERE = torch.cuda.is_available()
REQUIRED = os.environ.get("FAIL_WITHOUT_CUDA") == "1"
MACHINES = list(GPUS) if HERE or REQUIRED else [EMULATED]
"""That are tested: GPUs where there is one, or must be."""

# cuBLAS is deterministic, as tests want it, with a workspace of a fixed size
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@dataclass(frozen=True)
class Machine:
    """Ops, the device on which their tensors are, the backend's name there, and, of the emulator, what sets
    the order in which threads run."""

    name: str
    ops: ops.OpSet
    device: torch.device
    set_order: Callable[[int], None] | None = None

    def put(self, args: Any) -> list[Any]:
        """Arguments with their tensors on the device."""
        return [a.to(self.device) if isinstance(a, torch.Tensor) else a for a in args]


@cache
def machine(name: str) -> Machine:
    """The machine of this name; a test fails where it is not there."""
    cpu = torch.device("cpu")
    if name == EMULATED:
        path = built("emulated") / "tests" / "cuda_emulator" / "libblip_trace_emulated.so"
        torch.ops.load_library(path)
        found = torch.ops.blip_trace_emulated
        own: Any = SimpleNamespace(**{op: getattr(found, op).default for op in OPS})
        return Machine(name, own, cpu, ctypes.CDLL(str(path)).blip_trace_emulator_set_order)
    if not HERE:
        pytest.fail("there is no GPU")
    gpu = torch.device("cuda", torch.cuda.current_device())
    return Machine(name, ops.get_ops(GPUS[name], gpu), gpu)
