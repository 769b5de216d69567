"""Each op's kernels on a GPU against the same in stock torch, and that compiled: a table, in CUDA graphs.

A ratio above 1 means that the own op is faster. Shapes are those of passes of 1 and of 8 questions of a
BLIP-base, and those of bench_ops.py.
"""

from __future__ import annotations

from collections.abc import Callable

import bench_ops
import pytest
import torch
import triton
from bench_ops import cross_attention, linear, linear_add_norm, linear_gelu, self_attention, token_logits
from conftest import Gate
from gpu_report import figure

from blip_trace import ops

Work = Callable[[], object]
pytestmark = pytest.mark.usefixtures("gpu")
SHAPES: dict[str, tuple[Callable[..., tuple[Work, Work]], tuple[int, ...]]] = {
    "linear: 7776 x 768 -> 2304": (linear, (7776, 768, 2304)),
    "linear_gelu: 577 x 768 -> 3072": (linear_gelu, (577, 768, 3072)),
    "linear_gelu: 7776 x 768 -> 3072": (linear_gelu, (7776, 768, 3072)),
    "linear_add_norm: 972 x 3072 -> 768": (linear_add_norm, (972, 3072, 768)),
    "linear_add_norm: 7776 x 768 -> 768": (linear_add_norm, (7776, 768, 768)),
    "self_attention: 8 x 577, 12 heads of 64": (self_attention, (8, 577, 12, 64)),
    "self_attention: 864 x 9, 12 heads of 64": (self_attention, (864, 9, 12, 64)),
    "cross_attention: 972 on 577, width 768": (cross_attention, (1, 972, 577, 12, 64)),
    "cross_attention: 8 x 972 on 577, width 768": (cross_attention, (8, 972, 577, 12, 64)),
    "cross_attention: 960 x 1 on 9, width 768": (cross_attention, (960, 1, 9, 12, 64)),
    "token_logits: 968 x 768, 30524 words": (token_logits, (968, 768, 30524)),
}


def milliseconds(work: Work) -> float:
    """Median, without the launches."""
    found: float = triton.testing.do_bench_cudagraph(work, rep=60, return_mode="median")
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_op(gate: Gate, monkeypatch: pytest.MonkeyPatch, shape: str, dtype: str) -> None:
    make, sizes = SHAPES[shape]
    torch.manual_seed(0)
    taken: dict[str, float] = {}
    with torch.inference_mode(), torch.device("cuda"):
        for backend in ("native", "triton"):
            own_ops = ops.get_ops(backend, torch.device("cuda"))
            monkeypatch.setattr(bench_ops, "native", lambda own_ops=own_ops: own_ops)
            own, stock = make(getattr(torch, dtype), *sizes)
            own()
            taken[backend] = milliseconds(own)
        taken["stock torch"] = milliseconds(stock)
        compiled = torch.compile(stock, fullgraph=True)
        compiled()
        taken["stock torch, compiled"] = milliseconds(compiled)
    name = f"GPU {dtype}, {shape}"
    for way, time_taken in taken.items():
        figure(f"{name}: {way}", time_taken * 1e3, "us")
    best = min(taken["stock torch"], taken["stock torch, compiled"])
    gate({f"{name}: best of torch / {backend}": best / taken[backend] for backend in ("native", "triton")})
