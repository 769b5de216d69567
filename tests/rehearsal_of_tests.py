"""A plugin of pytest by which the tests that need a GPU run on the pretended one, so that they run on a real
one the first time. All is pretended until the process ends."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu

from blip_trace import ops, tracer

_patch, _choose, _open = pytest.MonkeyPatch(), ops.get_ops, ExitStack()
_open.enter_context(pretended_gpu(_patch))
_patch.setattr(torch.cuda, "is_available", lambda: True)
_patch.setattr(torch.cuda, "Stream", object)
_patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())


def _native(backend: str, device: Any = None) -> ops.OpSet:
    """Triton's kernels need the device itself."""
    return _choose("native" if backend == "triton" else backend, device)


for _module in (ops, tracer):
    _patch.setattr(_module, "get_ops", _native)
