"""Processes of one machine that die: over and over, at a sample, or before they have loaded the model."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from sweep_helpers import (
    Listener,
    assert_whole,
    cheap_rows,
    rows_of,
)

from blip_trace.sweep import processes
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Order
from blip_trace.sweep.processes import Assignment, Processes
from blip_trace.sweep.shard import ShardTracer

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


@pytest.fixture
def copied_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are copies of this process: they start at once, and with what is patched here."""
    context = processes.multiprocessing.get_context("fork")
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda _: context)
    monkeypatch.setattr(processes, "PATIENCE_SECONDS", 0.5)


@pytest.mark.usefixtures("copied_processes")
def test_workers_that_end(
    given: Order, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 2: processes that are killed are replaced and what they did is done again, to the same bytes."""
    marks, parent = tmp_path / "marks", os.getpid()
    marks.mkdir()

    def rows(self: ShardTracer, samples: Any, *rest: Any) -> Any:
        assert os.getpid() != parent
        left = cheap_rows(self, samples, *rest)
        if len(list(marks.iterdir())) < 3:
            (marks / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return left

    monkeypatch.setattr(ShardTracer, "rows", rows)
    listener = Listener()
    outcome = sweep(given, tmp_path / "run", Processes(2), reporter=listener)
    assert outcome.complete
    assert len(list(marks.iterdir())) >= 3
    ended_early = ["exit code -9" in note for note in listener.notes]
    assert sum(ended_early) == len(list(marks.iterdir()))
    assert_whole(tmp_path / "run", oracle)


@pytest.mark.usefixtures("copied_processes")
def test_sample_that_kills(
    given: Order, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 2: a sample whose computation ends the process is found, and given up; all others are as they
    would have been without it."""
    killer = "1-count"

    def rows(self: ShardTracer, samples: Any, alone: Any = (), lost: Any = ()) -> Any:
        told = self.told

        def tell(ids: Any, done: int) -> None:
            told(ids, done)
            if killer in ids:
                os.kill(os.getpid(), signal.SIGKILL)

        self.told = tell if killer not in lost else told
        try:
            return cheap_rows(self, samples, alone, lost)
        finally:
            self.told = told

    monkeypatch.setattr(ShardTracer, "rows", rows)
    outcome = sweep(given, tmp_path / "run", Processes(2))
    assert outcome.complete
    assert outcome.statuses == {"ok": 14, "error": 1}
    rows_now, rows_then = rows_of(tmp_path / "run"), rows_of(oracle)
    assert "the process ended while this sample was computed" in rows_now.pop(killer)["reason"]
    del rows_then[killer]
    assert repr(sorted(rows_now.items())) == repr(sorted(rows_then.items()))


def test_who_is_given_up() -> None:
    """Fault 2: one death of a process blames nobody, two suspect what both computed, and only what was
    computed alone then is given up."""
    own = Assignment(0)
    own.died(["a", "b"])
    assert (own.suspects, own.lost) == (set(), set())
    own.died(["b", "c"])
    assert (own.suspects, own.lost) == ({"b"}, set())
    own.died([])
    own.died(["d"])
    assert (own.suspects, own.lost) == ({"b"}, set())
    own.died(["b"])
    assert own.lost == {"b"}


@pytest.mark.usefixtures("copied_processes")
def test_workers_that_always_end(given: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 2: processes that cannot live are not started for ever: the run ends with a reason."""

    def rows(*_: Any) -> Any:
        os._exit(9)

    monkeypatch.setattr(ShardTracer, "rows", rows)
    with pytest.raises(OSError, match=r"20 processes ended during shard 0 \(exit code 9\)"):
        sweep(given, tmp_path, Processes(1))


@pytest.mark.usefixtures("copied_processes")
@pytest.mark.parametrize("always", [False, True])
def test_workers_that_end_early(
    always: bool, given: Order, oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 2: three in a row that end before they have loaded the model end the run; some now and then,
    however many, do not."""
    serve, marks = processes._serve, tmp_path / "marks"
    marks.mkdir()

    def dying(job: Any, connection: Any) -> None:
        (marks / str(os.getpid())).touch()
        if always or len(list(marks.iterdir())) % 2:
            os._exit(9)
        serve(job, connection)

    def rows(self: ShardTracer, samples: Any, *rest: Any) -> Any:
        left = cheap_rows(self, samples, *rest)
        if len(list(marks.iterdir())) < 9:
            os._exit(9)
        return left

    monkeypatch.setattr(processes, "_serve", dying)
    monkeypatch.setattr(ShardTracer, "rows", rows)
    if always:
        with pytest.raises(OSError, match=r"end before they have loaded the model \(exit code 9\)"):
            sweep(given, tmp_path / "run", Processes(1))
        assert len(list(marks.iterdir())) == 3
    else:
        assert sweep(given, tmp_path / "run", Processes(1)).complete
        assert len(list(marks.iterdir())) >= 9
        assert_whole(tmp_path / "run", oracle)


@pytest.mark.usefixtures("copied_processes")
def test_worker_that_cannot_write(given: Order, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 4: what stops one process for a reason of the machine's stops the run, in its words."""

    def rows(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device", "shards/000000.parquet")

    monkeypatch.setattr(ShardTracer, "rows", rows)
    with pytest.raises(OSError, match="No space left on device"):
        sweep(given, tmp_path, Processes(2))
