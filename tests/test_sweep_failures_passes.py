"""Passes of a sweep that memory does not suffice for, or that fail.

The sample at fault is a row with a reason; the others keep what they have without it.
The numbers of faults are those of the table, as in test_sweep_stops.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from sweep_helpers import Listener, assert_close, order, receipt_file, rows_of

from blip_trace import Tracer
from blip_trace.sweep import shard
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.shard import is_out_of_memory

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

OUT_OF_MEMORY: dict[str, BaseException] = {
    "python": MemoryError(),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1"),
    "arrow": pa.ArrowMemoryError("malloc of size 1 failed"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("step", ["measure", "prepare_all", "answers"])
def test_passes_too_large(
    step: str, error: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: where more than two questions at once do not fit, half as many are tried until they do; the
    numbers are the same, and the receipt says what happened."""
    given = order(tiny_folder, "scenes:3", shard_size=20)
    assert is_out_of_memory(OUT_OF_MEMORY[error])
    sweep(given, tmp_path / "oracle")
    real, sizes = getattr(Tracer, step), []

    def small(self: Tracer, first: Any, *given: Any, **options: Any) -> Any:
        items = first if step == "answers" else given[0]
        size = len(items)
        sizes.append(size)
        if size > 2:
            raise OUT_OF_MEMORY[error]
        return real(self, first, *given, **options)

    monkeypatch.setattr(Tracer, step, small)
    listener = Listener()
    assert sweep(given, tmp_path / "run", reporter=listener).statuses == {"ok": 15}
    assert_close(tmp_path / "run", tmp_path / "oracle")
    notes = json.loads(receipt_file(tmp_path / "run", 0).read_bytes())["notes"]
    assert any("out of memory: at most" in note for note in notes)
    assert sizes.count(8) <= 2  # it does not try again and again what did not fit
    assert max(sizes[-3:]) <= 2


def test_sample_too_large(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: a sample that does not fit even alone is a failed row; passes are made smaller first, and the
    others keep their numbers."""
    given, measure, memory = order(tiny_folder, "scenes:2"), Tracer.measure, []
    sweep(given, tmp_path / "oracle")

    def small(self: Tracer, request: Any, prepared: Any, *rest: Any) -> Any:
        memory.append(self.memory)
        if any("square" in own.asked.question or "circle" in own.asked.question for own in prepared):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(self, request, prepared, *rest)

    monkeypatch.setattr(Tracer, "measure", small)
    statuses = sweep(given, tmp_path / "run").statuses
    assert statuses["error"] in range(1, 10)
    assert statuses.total() == 10
    rows = rows_of(tmp_path / "run")
    failed = [id for id, row in rows.items() if row["status"] == "error"]
    assert all(rows[id]["reason"] == "out of memory" for id in failed)
    oracle = rows_of(tmp_path / "oracle")
    for id in rows.keys() - set(failed):
        assert rows[id]["probability_high"] == pytest.approx(oracle[id]["probability_high"], abs=1e-5)
    assert min(own for own in memory if own) == shard.LEAST_MEMORY


def test_error_in_a_pass(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with one sample of a pass is said of that one alone, by its class too."""
    given, measure = order(tiny_folder, "scenes:2"), Tracer.measure
    sweep(given, tmp_path / "oracle")

    odd = [sample.id for sample in given.data.samples() if "triangle" in sample.question]
    assert 0 < len(odd) < 5

    def triangle(self: Tracer, request: Any, prepared: Any, *rest: Any) -> Any:
        if any("triangle" in own.asked.question for own in prepared):
            raise ZeroDivisionError("triangles\nare odd")
        return measure(self, request, prepared, *rest)

    monkeypatch.setattr(Tracer, "measure", triangle)
    sweep(given, tmp_path / "run")
    rows, oracle = rows_of(tmp_path / "run"), rows_of(tmp_path / "oracle")
    assert sorted(id for id in rows if rows[id]["status"] == "error") == sorted(odd)
    for id, row in rows.items():
        if id in odd:
            assert row["reason"] == "ZeroDivisionError: triangles are odd"
        else:
            assert row["probability_low"] == pytest.approx(oracle[id]["probability_low"], abs=1e-5)
