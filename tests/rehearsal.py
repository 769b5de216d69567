"""A plugin of pytest by which the benchmarks of a GPU run on the pretended one, on little work and with
floors that everything reaches: so that they run on a real one the first time."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretended_gpu import pretended_gpu

PROPERTIES = SimpleNamespace(name="A pretended GPU", multi_processor_count=1, total_memory=2**30)


@pytest.fixture(scope="session", autouse=True)
def rehearsal() -> Iterator[None]:
    """What is patched stays so until the process ends, for the report is written last."""
    import bench_gpu
    import bench_gpu_ops
    import conftest
    import gpu_report
    import subject
    import triton

    from blip_trace import ops, tracer

    patch = pytest.MonkeyPatch()
    small, choose = subject.blip_shapes(), ops.get_ops

    def timed(work: Callable[[], Any], **_: Any) -> float:
        begin = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - begin)

    folder = Path(os.environ["REHEARSAL"])
    floors = folder / "floors.json"
    floors.write_text(json.dumps(dict.fromkeys(json.loads(conftest.FLOORS.read_text()), -math.inf)))
    little = {
        name: (make, tuple(min(size, 24) for size in sizes))
        for name, (make, sizes) in bench_gpu_ops.SHAPES.items()
    }
    with pretended_gpu(patch):
        patch.setattr(conftest, "FLOORS", floors)
        patch.setattr(gpu_report, "RESULTS", folder / "results")
        for module in (bench_gpu, subject):
            patch.setattr(module, "blip_base", lambda dtype: small.to(getattr(torch, dtype)))
        patch.setattr(bench_gpu, "GEMM", 64)
        patch.setattr(bench_gpu, "QUESTIONS", (2, 3))
        patch.setattr(bench_gpu, "seconds", lambda work, rounds=5: max(timed(work) / 1e3, 1e-9))
        patch.setattr(bench_gpu_ops, "SHAPES", little)
        for module in (ops, tracer):  # Triton's kernels need the device itself
            patch.setattr(module, "get_ops", lambda backend, device=None: choose("native", device))
        patch.setattr(triton.testing, "do_bench_cudagraph", timed)
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
        yield
