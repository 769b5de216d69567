"""The engine against every other way to the same map, interleaved in one process.

BLIP-VQA-base size, random weights, 9 question tokens: 108 cells of the question encoder and 12 of the answer
decoder; and the small shipped model, where overheads rule. Ways that take minutes are timed on a sample of
cells (each cell costs them the same) and scaled.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from baselines import StockOps, batched_hooks, lean_hooks, published_loop
from conftest import Gate
from subject import Subject, blip_base, blip_shapes, full_study

from blip_trace.ops import OpSet, extension

Work = Callable[[], object]
GEMM_ROWS, GEMM_IN, GEMM_OUT, GEMM_TIMES = 1024, 768, 3072, 8


def interleave(
    benchmark: Any, rounds: int, ours: Work, others: dict[str, Work]
) -> tuple[float, dict[str, float]]:
    """Time `ours` by pytest-benchmark, and all the others before each of its rounds: medians in seconds."""
    times: dict[str, list[float]] = {name: [] for name in others}

    def before() -> None:
        for name, work in others.items():
            begin = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - begin)

    with torch.inference_mode():
        benchmark.pedantic(ours, setup=before, rounds=rounds, warmup_rounds=1, iterations=1)
    medians = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    benchmark.extra_info.update({f"{name} [s]": round(value, 5) for name, value in medians.items()})
    return statistics.median(benchmark.stats.stats.data), medians


def products(subject: Subject) -> dict[str, Work]:
    """A large matrix product in torch and in this package's way: the faster one is the machine's rate."""
    x = torch.randn(GEMM_ROWS, GEMM_IN).to(subject.model.dtype)
    weight = torch.randn(GEMM_OUT, GEMM_IN).to(subject.model.dtype)
    return {
        "torch product": lambda: [F.linear(x, weight) for _ in range(GEMM_TIMES)],
        "own product": lambda: [subject.ops.linear(x, weight, None) for _ in range(GEMM_TIMES)],
    }


def closeness(benchmark: Any, subject: Subject, ours: float, medians: dict[str, float]) -> float:
    """(operations that must be done / measured rate) / time."""
    operations = 2 * GEMM_ROWS * GEMM_IN * GEMM_OUT * GEMM_TIMES
    rate = operations / min(medians["torch product"], medians["own product"])
    benchmark.extra_info.update(
        gflop=round(subject.operations() / 1e9, 1), gflop_per_second=round(rate / 1e9, 1)
    )
    print(f"\n{subject.operations() / 1e9:.0f} GFLOP at {rate / 1e9:.0f} GFLOP/s, in {ours:.3f} s")
    return subject.operations() / rate / ours


def named(dtype: str) -> str:
    """How rows call a type: where the processor has tiles for bfloat16, everything else weighs more."""
    native = extension()
    assert native is not None
    tiles = dtype == "bfloat16" and native.products()["bfloat16"] == "torch"
    return f"{dtype} on tiles" if tiles else dtype


def published(subject: Subject) -> Work:
    """One cell of the published loop, in the type of the subject's model."""
    return lambda: published_loop(
        subject.model,
        lambda: subject.encoded_by_model(),
        subject.task,
        subject.cells[40:41],
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_sample(benchmark: Any, gate: Gate, quick: bool, dtype: str) -> None:
    """Every baseline, on a model of BLIP-VQA-base size."""
    subject = Subject(blip_base(dtype), samples=1)
    one, rows = subject.cells[40:41], subject.cells[5 :: 12 if quick else 4]
    clean, cached = subject.clean_states(rows), subject.task.clean[None]
    others = {
        "A": published(subject),
        "image": lambda: subject.encoded_by_model(),
        "B": lambda: published_loop(subject.model, lambda: cached, subject.task, one),
        "lean, no cells": lambda: lean_hooks(subject.model, subject.task, ()),
        "lean": lambda: lean_hooks(subject.model, subject.task, one),
        "C": lambda: batched_hooks(subject.model, subject.task, rows, clean),
        "D": lambda: subject.trace(StockOps()),
        **products(subject),
    }
    if dtype == "bfloat16":  # the tool itself runs in float32
        others["A in float32"] = published(Subject(blip_base("float32"), samples=1))
    ours, taken = interleave(benchmark, 2 if quick else 7, lambda: subject.trace(subject.ops), others)
    cells, once = len(subject.cells), taken["image"] + taken["lean, no cells"]
    seconds = {
        "published loop (A)": taken["A"] * cells,
        "the same, image encoded once (B)": taken["image"] + taken["B"] * cells,
        "lean hook loop": once + (taken["lean"] - taken["lean, no cells"]) * cells,
        "batched hooks (C)": once + taken["C"] * cells / len(rows),
        "stock torch, forking (D)": taken["D"],
    }
    if "A in float32" in taken:
        seconds["published loop in float32 (A)"] = taken["A in float32"] * cells
    found = {f"base {named(dtype)}, 1 sample: {name}": value / ours for name, value in seconds.items()}
    found[f"base {named(dtype)}, 1 sample: floor closeness"] = closeness(benchmark, subject, ours, taken)
    gate(found)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_samples(benchmark: Any, gate: Gate, quick: bool, dtype: str) -> None:
    """Ten samples share the image encoder and the clean run; the published loop repeats all of it."""
    subject = Subject(blip_base(dtype), samples=10)
    others = {"A": published(subject), **products(subject)}
    if not quick:
        others["D"] = lambda: subject.trace(StockOps())
    ours, taken = interleave(benchmark, 2 if quick else 3, lambda: subject.trace(subject.ops), others)
    name = f"base {named(dtype)}, 10 samples"
    found = {f"{name}: published loop (A)": 10 * taken["A"] * len(subject.cells) / ours}
    if not quick:
        found[f"{name}: stock torch, forking (D)"] = taken["D"] / ours
    found[f"{name}: floor closeness"] = closeness(benchmark, subject, ours, taken)
    gate(found)


def test_full_study(benchmark: Any, gate: Gate, quick: bool) -> None:
    """Three kinds and all heads at the last token, ten samples: what a paper on one question would run."""
    if quick:
        pytest.skip("half a minute a round: in the full benchmark only")
    model = blip_base("float32")
    subject = Subject(model, samples=10, cells=full_study(model))
    one = Subject(model, samples=1)  # the loops take a sample at a time
    others = {
        "A": published(one),
        "lean, no cells": lambda: lean_hooks(model, one.task, ()),
        "lean": lambda: lean_hooks(model, one.task, one.cells[40:41]),
        **products(subject),
    }
    ours, taken = interleave(benchmark, 2, lambda: subject.trace(subject.ops), others)
    runs = 10 * len(subject.cells)
    name = "base float32, 10 samples, full study"
    gate(
        {
            f"{name}: published loop (A)": taken["A"] * runs / ours,
            f"{name}: lean hook loop": (taken["lean"] - taken["lean, no cells"]) * runs / ours,
            f"{name}: floor closeness": closeness(benchmark, subject, ours, taken),
        }
    )


def test_shipped_model(benchmark: Any, gate: Gate, quick: bool) -> None:
    """The small trained model: Python and launches cost more here than products."""
    subject = Subject(blip_shapes(), samples=1)
    cached = subject.task.clean[None]
    maps = 10  # one after the other, as the loops run their cells: alone, a map is over before it is warm

    def trace(ops: OpSet) -> None:
        for _ in range(maps):
            subject.trace(ops)

    others = {
        "image": lambda: subject.encoded_by_model(),
        "B": lambda: published_loop(subject.model, lambda: cached, subject.task, subject.cells),
        "lean": lambda: lean_hooks(subject.model, subject.task, subject.cells),
        "D": lambda: trace(StockOps()),
    }
    all_maps, taken = interleave(benchmark, 10 if quick else 40, lambda: trace(subject.ops), others)
    ours, taken["D"] = all_maps / maps, taken["D"] / maps
    seconds = {
        "the published loop, image encoded once (B)": taken["image"] + taken["B"],
        "lean hook loop": taken["image"] + taken["lean"],
        "stock torch, forking (D)": taken["D"],
    }
    gate({f"shipped model, 1 sample: {name}": value / ours for name, value in seconds.items()})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(benchmark: Any, gate: Gate, dtype: str) -> None:
    """What a process that makes the model and traces ten samples may take, weights x 1.5 + 500 MB, over what
    it took."""
    bound_over_peak = benchmark.pedantic(_bound_over_peak, args=(dtype,), rounds=1)
    gate({f"base {dtype}, 10 samples: memory bound / peak": bound_over_peak})


def _bound_over_peak(dtype: str) -> float:
    program = (
        # torch loads triton wherever it finds it, 70 MB for nothing on the CPU; it is an extra
        "import re, sys; sys.modules['triton'] = None; from subject import Subject, blip_base;"
        "subject = Subject(blip_base(sys.argv[1]), samples=10); subject.trace(subject.ops);"
        "weights = sum(p.nbytes for p in subject.model.parameters());"
        # not ru_maxrss: a process inherits that from the one that started it
        "peak = 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        "print((1.5 * weights + 500e6) / peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, dtype], cwd=sys.path[0], capture_output=True, text=True, check=True
    )
    return float(done.stdout)
