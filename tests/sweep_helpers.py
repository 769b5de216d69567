"""What the tests of sweeps share: runs to compare with, a shard function that costs nothing, processes that
are killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from blip_trace import Tracer
from blip_trace.sweep.driver import Outcome, sweep
from blip_trace.sweep.executors import Events, Executor
from blip_trace.sweep.parquet import read_groups
from blip_trace.sweep.plan import Plan, samples_of
from blip_trace.sweep.planning import Order
from blip_trace.sweep.receipts import Receipt
from blip_trace.sweep.sample import Sample
from blip_trace.sweep.settings import Settings
from blip_trace.sweep.shard import Case, ShardTracer, Stopped, failed_row
from blip_trace.sweep.sources import open_data
from blip_trace.sweep.store import SUCCESS, open_store, receipt_name, shard_name
from blip_trace.sweep.verify import examine
from blip_trace.sweep.worker import Job

Row = dict[str, Any]
Work = Callable[[], object]


# Runs


def order(model: str | Path, data: str | Path = "scenes:4", shard_size: int = 5, **given: Any) -> Order:
    """What the tests sweep unless they say otherwise: 20 samples in shards of 5."""
    limit, settings = given.pop("limit", None), {"corruption": {"samples": 1}, **given}
    return Order(open_data(data), str(model), Settings(**settings), limit=limit, shard_size=shard_size)


def rows_of(folder: Path | str) -> dict[str, Row]:
    """All rows of a run by their ids, each of which is there once."""
    rows: dict[str, Row] = {}
    store = open_store(folder)
    for name in store.names("shards"):
        for table in read_groups(store.file(f"shards/{name}")):
            for row in table.to_pylist():
                assert row["sample_id"] not in rows
                rows[row["sample_id"]] = row
    return rows


def planned_ids(folder: Path) -> list[str]:
    """The ids of a run's plan."""
    store = open_store(folder)
    return [sample.id for shard in Plan.load(store).shards for sample in samples_of(store, shard)]


def assert_equal_bits(run: Path, oracle: Path, but: Collection[str] = ()) -> None:
    """Both runs have the same rows, bit for bit (but for these ids), and each planned id once."""
    ours, theirs = rows_of(run), rows_of(oracle)
    assert sorted(ours) == sorted(planned_ids(run)) == sorted(theirs)
    for id, row in theirs.items():
        if id not in but:
            assert repr(ours[id]) == repr(row), id  # a float's repr stands for its bits, NaN too


def assert_close(run: Path, oracle: Path, tolerance: float = 1e-5) -> None:
    """The same samples, answers and statuses, and numbers within the tolerance."""
    ours, theirs = rows_of(run), rows_of(oracle)
    assert ours.keys() == theirs.keys()
    for id, row in theirs.items():
        for name, value in row.items():
            if numbers(value).size and not isinstance(value, str | bool):
                assert np.abs(numbers(ours[id][name]) - numbers(value)).max() <= tolerance, (id, name)
            else:
                assert ours[id][name] == value, (id, name)


def numbers(value: Any) -> np.ndarray[Any, Any]:
    """A map or a score; empty for anything else."""
    if isinstance(value, float | list):
        found = np.array(value)
        return found if found.dtype.kind == "f" else np.empty(0)
    return np.empty(0)


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """When each shard was written, and its digest."""
    return {
        path.name: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted((folder / "shards").glob("*.parquet"))
    }


def committed(folder: Path) -> dict[str, tuple[int, str]]:
    """The same of those that have a receipt."""
    files = files_of(folder)
    stems = {path.stem for path in (folder / "receipts").glob("*.json")}
    return {name: file for name, file in files.items() if Path(name).stem in stems}


def assert_whole(folder: Path, oracle: Path) -> None:
    """A run is complete, and its shards are byte for byte those of another; so each row is there once."""
    store = open_store(folder)
    found = examine(store, Plan.load(store), repair=False)
    assert found.complete, (found.open, found.wrong)
    assert store.has(SUCCESS)
    assert not store.leftovers()
    for path in sorted((oracle / "shards").iterdir()):
        assert (folder / "shards" / path.name).read_bytes() == path.read_bytes(), path.name


class Doing:
    """An executor that notes which shards it was given, and stops after some."""

    def __init__(self, executor: Executor, stop_after: int | None = None) -> None:
        self.executor, self.stop_after = executor, stop_after
        self.done: list[int] = []

    def run(self, job: Job, todo: Sequence[int], events: Events, tracer: Tracer | None) -> None:
        def finished(receipt: Receipt) -> None:
            self.done.append(receipt.number)
            events.finished(receipt)

        def stop() -> bool:
            return (self.stop_after is not None and len(self.done) >= self.stop_after) or events.stop()

        self.executor.run(job, todo, Events(events.computed, finished, events.note, stop), tracer)


class Listener:
    """A reporter that remembers, and may do something when samples are computed."""

    def __init__(self, at: Callable[[int], None] | None = None) -> None:
        self.notes: list[str] = []
        self.receipts: list[Receipt] = []
        self.samples = 0
        self._at = at

    def planned(self, plan: Plan, found: object) -> None:
        pass

    def computed(self, samples: int) -> None:
        self.samples += samples
        if self._at is not None:
            self._at(self.samples)

    def finished(self, receipt: Receipt) -> None:
        self.receipts.append(receipt)

    def note(self, text: str) -> None:
        self.notes.append(text)


def again(folder: Path, given: Order | None, **options: Any) -> tuple[Outcome, list[int]]:
    """Go on with a run in this process; which shards that did."""
    from blip_trace.sweep.executors import Local

    doing = Doing(options.pop("executor", Local()))
    outcome = sweep(given, folder, doing, **options)
    return outcome, doing.done


# A shard function that costs nothing


def cheap_rows(
    self: ShardTracer, samples: Sequence[Sample], alone: Collection[str] = (), lost: Collection[str] = ()
) -> list[Row]:
    """In the place of `ShardTracer.rows`."""
    rows = []
    for sample in samples:
        if self.stop():
            raise Stopped
        self.told([sample.id], 0)
        rows.append(cheap_row(self, sample, lost))
        self.told([], 1)
    return rows


def cheap_row(own: ShardTracer, sample: Sample, lost: Collection[str]) -> Row:
    if sample.id in lost:
        return failed_row(Case(sample, problem="the process ended while this sample was computed"))
    draw = np.random.default_rng(Random(sample.id).getrandbits(32))
    row: Row = {"sample_id": sample.id, "status": "ok", "question": sample.question, "image": sample.image}
    for metric in own.layout.metrics:
        row[f"{metric}_high"], row[f"{metric}_low"] = draw.random(2, dtype=np.float32).tolist()
        for stack in own.layout.stacks:
            row[f"{stack.name}_tokens"] = ["a"] * 3
            for kind in own.layout.kinds:
                maps = draw.random((3, stack.layers), dtype=np.float32)
                row[own.layout.map_column(stack.name, kind, metric)] = maps
    return row


# Processes


def forked(work: Work, log: Path, limit: float = 30) -> int:
    """Do something in a copy of this process; its exit code, negative: the signal that ended it.

    What it raises is written to the log, and its exit code is then 70.
    """
    child = start_forked(work, log)
    return ended(child, limit)


def start_forked(work: Work, log: Path) -> int:
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        signal.alarm(0)
        work()
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def ended(child: int, limit: float = 30) -> int:
    """Wait for a child."""
    until = time.monotonic() + limit
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise TimeoutError(f"a process has taken {limit} s")


def python(
    code: str, *given: str, limit: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a program in a new interpreter."""
    return subprocess.run(
        [sys.executable, "-c", code, *given],
        capture_output=True,
        text=True,
        timeout=limit,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def wait_until(condition: Callable[[], object], limit: float = 60) -> None:
    """Wait for something that another process does."""
    until = time.monotonic() + limit
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError("what was waited for did not happen")
        time.sleep(0.005)


def damaged(path: Path, rng: Random) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def shard_file(folder: Path, number: int) -> Path:
    return folder / shard_name(number)


def receipt_file(folder: Path, number: int) -> Path:
    return folder / receipt_name(number)
