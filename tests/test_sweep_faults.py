"""Sweeps that are killed, that find the disk full, and whose files are damaged: the run that goes on is, to
the byte, one that was never interrupted.

Numbers are those of the table of faults that sweeps are built against. What is wrong with the data, the model
or memory is in test_sweep_failures.py; long trials with real processes are in faults_kill.py.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as checked
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sweep_disk import Crash, Disk, after_power_cut
from sweep_helpers import (
    Doing,
    Listener,
    again,
    assert_whole,
    cheap_rows,
    committed,
    damaged,
    ended,
    files_of,
    forked,
    order,
    receipt_file,
    rows_of,
    shard_file,
    start_forked,
    wait_until,
)

from blip_trace import Tracer
from blip_trace.sweep import processes
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Local
from blip_trace.sweep.plan import Plan
from blip_trace.sweep.planning import Order
from blip_trace.sweep.processes import Assignment, Processes
from blip_trace.sweep.shard import ShardTracer
from blip_trace.sweep.sources import open_data
from blip_trace.sweep.store import SUCCESS, Busy, open_store
from blip_trace.sweep.verify import examine

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

SHARDS = 3


@pytest.fixture
def given(cheap: Tracer, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """15 samples in 3 shards. What a process has written outlives it, so that no test waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return order(tiny_folder, "scenes:3")


@pytest.fixture
def few(given: Order) -> Order:
    """10 samples in 2 shards, for what is done many times."""
    return replace(given, data=open_data("scenes:2"))


@pytest.fixture
def few_oracle(few: Order, tmp_path: Path) -> Path:
    """The run of few samples that nothing happened to."""
    sweep(few, tmp_path / "few oracle")
    return tmp_path / "few oracle"


@pytest.fixture
def oracle(given: Order, tmp_path: Path) -> Path:
    """The run that nothing happened to."""
    sweep(given, tmp_path / "oracle")
    assert sorted(rows_of(tmp_path / "oracle")) == sorted(sample.id for sample in given.data.samples())
    return tmp_path / "oracle"


@pytest.fixture
def run(oracle: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(oracle, tmp_path / "run"))


def kept(before: dict[str, tuple[int, str]], folder: Path) -> bool:
    """Whether files that were committed are still what they were, to the time they were written."""
    return before.items() <= files_of(folder).items()


# 1 and 2: processes that end


def test_killed_at_every_step(few: Order, few_oracle: Path, tmp_path: Path) -> None:
    """Fault 1: a driver that is killed before or behind any step by which it changes the disk, or half way
    through a write, is gone on from: everything is there once, what was committed stays as it was, and
    nothing is left over."""
    for at in count():
        folder = tmp_path / f"run-{at}"

        def work(at: int = at, folder: Path = folder) -> None:
            with pytest.MonkeyPatch.context() as patch:
                Disk(at).install(patch)
                sweep(few, folder)

        code = forked(work, tmp_path / "log")
        if code == 0:
            break
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        before = committed(folder)
        _, done = again(folder, few)
        assert len(done) + len(before) <= 2  # rows without a receipt need not be done again
        assert kept(before, folder)
        assert_whole(folder, few_oracle)
        shutil.rmtree(folder)
    assert at > 2 * 5 * (2 * 2 + 3)  # five steps for each file, and more


def test_killed_again_and_again(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 1: killed at random times, over and over, until it is done; each time it has come no less far."""
    rng, folder, far = Random(1), tmp_path / "run", 0
    for trial in range(200):
        before = committed(folder)
        child = start_forked(lambda: sweep(given, folder), tmp_path / "log")
        time.sleep(rng.uniform(0, 0.01 + 0.001 * trial))
        os.kill(child, signal.SIGKILL)
        ended(child)
        assert kept(before, folder)
        assert len(committed(folder)) >= far
        far = len(committed(folder))
        if (folder / SUCCESS).exists():
            break
    assert trial >= 5
    assert again(folder, given)[1] == []
    assert_whole(folder, oracle)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(number: int, given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 2: a signal ends a run between two passes; what it says is that it was stopped, and the handlers
    from before are back."""
    folder = tmp_path / "run"

    def work() -> None:
        mine = signal.signal(number, signal.SIG_DFL)
        signal.signal(number, mine)
        listener = Listener(lambda samples: os.kill(os.getpid(), number) if samples == 7 else None)
        outcome = sweep(given, folder, reporter=listener)
        assert outcome.stopped
        assert not outcome.complete
        assert any("will go on from here" in note for note in listener.notes)
        assert listener.samples == 7
        assert signal.getsignal(number) == mine

    assert forked(work, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    before = committed(folder)
    assert len(before) == 1
    _, done = again(folder, None)
    assert len(done) == 2
    assert kept(before, folder)
    assert_whole(folder, oracle)


def test_interrupted_twice(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 2: a second Ctrl-C ends everything at once, and the run can still be gone on with."""
    folder = tmp_path / "run"

    def interrupt(samples: int) -> None:
        if samples == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    def work() -> None:
        with pytest.raises(KeyboardInterrupt):
            sweep(given, folder, reporter=Listener(interrupt))

    assert forked(work, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    sweep(given, folder)
    assert_whole(folder, oracle)


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


# 3: two drivers


def test_two_drivers(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 3: a second driver is refused and told who is at it; when that one is killed its lock is free."""
    folder = tmp_path / "run"

    def hold(samples: int) -> None:
        until = time.monotonic() + 20
        while samples == 7 and time.monotonic() < until:
            time.sleep(0.01)

    child = start_forked(lambda: sweep(given, folder, reporter=Listener(hold)), tmp_path / "log")
    try:
        wait_until(lambda: len(committed(folder)) == 1)
        before = files_of(folder)
        for what in (given, None):
            with pytest.raises(Busy, match=f"process {child} on "):
                sweep(what, folder)
        assert str(child) in (open_store(folder).owner() or "")
        assert files_of(folder) == before
    finally:
        os.kill(child, signal.SIGKILL)
        ended(child)
    assert open_store(folder).owner() is None
    sweep(given, folder)
    assert_whole(folder, oracle)


# 4: no room


def test_disk_that_fails_at_every_step(
    few: Order, few_oracle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4 and 15: whichever step finds the disk full, or the file on another disk, the run ends with that
    error; no file of half its contents has its final name; with room again the run goes on."""

    def fail(number: int) -> None:
        raise OSError(number, os.strerror(number))

    for at in count(step=2):
        folder, number = tmp_path / f"run-{at}", errno.ENOSPC if at % 4 else errno.EXDEV
        with monkeypatch.context() as patch:
            disk = Disk(at, partial(fail, number))
            disk.install(patch)
            with suppress(OSError):
                sweep(few, folder)
                break
            assert disk.failed
        for path in folder.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                whole = (few_oracle / path.relative_to(folder)).read_bytes()
                assert path.read_bytes() == whole or json.loads(path.read_bytes())  # times and places differ
        before = committed(folder)
        sweep(few, folder)
        assert kept(before, folder)
        assert_whole(folder, few_oracle)
        shutil.rmtree(folder)
    assert at > 60


@pytest.mark.parametrize("limit", [500, 3_000, 9_000])
def test_files_that_may_not_grow(limit: int, given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 4: a limit on the size of files ends the run with one error that says so; without it, it goes
    on."""
    folder = tmp_path / "run"
    folder.mkdir()

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(OSError, match=r"too large|disk|full"):
            sweep(given, folder)

    assert forked(work, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert not open_store(folder).has(SUCCESS)
    sweep(given, folder)
    assert_whole(folder, oracle)


def test_full_disk(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 4: a small disk, where this machine lets one be made."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        for room in (8, 24, 48):  # KiB
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            (folder / "ballast").write_bytes(bytes(free - room * 1024))
            with pytest.raises(OSError, match=r"No space left|full"):
                sweep(given, folder / "run")
            (folder / "ballast").unlink()
        assert sweep(given, folder / "run").complete
        assert_whole(folder / "run", oracle)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# 5 and 6: damaged files


Damage = Callable[[Path], object]
DAMAGE: dict[str, tuple[str, Damage, list[int]]] = {
    "torn shard": ("shards/000001.parquet", lambda path: os.truncate(path, path.stat().st_size // 2), [1]),
    "empty shard": ("shards/000001.parquet", lambda path: os.truncate(path, 0), [1]),
    "missing shard": ("shards/000001.parquet", Path.unlink, [1]),
    "another shard": ("shards/000001.parquet", lambda path: shutil.copy(shard_of(path, 2), path), [1]),
    "torn receipt": ("receipts/000001.json", lambda path: os.truncate(path, 40), []),
    "empty receipt": ("receipts/000001.json", lambda path: os.truncate(path, 0), []),
    "receipt of zeros": ("receipts/000001.json", lambda path: path.write_bytes(bytes(300)), []),
    "missing receipt": ("receipts/000001.json", Path.unlink, []),
    "another receipt": ("receipts/000001.json", lambda path: shutil.copy(receipt_of(path, 2), path), [1]),
    "receipt of another type": ("receipts/000001.json", lambda path: path.write_text("[1, 2]"), []),
    "no receipts at all": ("receipts", shutil.rmtree, []),
    "no shards at all": ("shards", shutil.rmtree, [0, 1, 2]),
    "broken end": ("_SUCCESS", lambda path: os.truncate(path, 20), []),
    "end of something else": ("_SUCCESS", lambda path: path.write_text("{}"), []),
}  # fmt: skip


def receipt_of(path: Path, number: int) -> Path:
    return path.with_name(f"{number:06d}.json")


def shard_of(path: Path, number: int) -> Path:
    return path.with_name(f"{number:06d}.parquet")


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(what: str, given: Order, oracle: Path, run: Path) -> None:
    """Fault 5: what is torn, empty or gone is noticed; only that shard is done again, and a receipt that was
    lost is written again from the rows."""
    name, damage, expected = DAMAGE[what]
    before = files_of(run)
    damage(run / name)
    shards = {number for number in range(SHARDS) if number not in expected}
    found = examine(open_store(run), Plan.load(open_store(run)), repair=False)
    assert set(found.open) == set(expected)
    listener = Listener()
    outcome, done = again(run, None, reporter=listener)
    assert outcome.complete
    assert done == expected
    assert len([note for note in listener.notes if "is done again" in note]) == len(expected)
    for number in shards:
        assert files_of(run)[f"{number:06d}.parquet"] == before[f"{number:06d}.parquet"]
    assert_whole(run, oracle)
    assert (run / SUCCESS).read_bytes() == (oracle / SUCCESS).read_bytes()
    receipts = [json.loads(receipt_file(run, number).read_bytes()) for number in range(SHARDS)]
    written = [json.loads(receipt_file(oracle, number).read_bytes()) for number in range(SHARDS)]
    for ours, theirs in zip(receipts, written, strict=True):
        for field in ("number", "run_id", "sha256", "bytes", "ids", "statuses"):
            assert ours[field] == theirs[field]


def test_strangers(given: Order, run: Path) -> None:
    """Fault 5: a file that does not belong to a run is named, and nothing is done to it."""
    (run / "shards" / "000099.parquet").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"000099.parquet does not belong to this run"):
        sweep(given, run)
    assert (run / "shards" / "000099.parquet").exists()


def test_damaged_plan(given: Order, oracle: Path, run: Path) -> None:
    """Fault 6: no bit of the plan or of the list of samples can change unnoticed: the file is named."""
    rng = Random(6)
    for name in ("plan.json", "plan/samples-000.parquet"):
        whole = (run / name).read_bytes()
        for _ in range(40):
            damaged(run / name, rng)
            with pytest.raises(ValueError, match=name):
                sweep(given, run)
            (run / name).write_bytes(whole)
        (run / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            sweep(given, run)
        (run / name).write_bytes(whole)
    assert again(run, given)[1] == []
    assert_whole(run, oracle)


@pytest.mark.parametrize("receipt", [True, False])
def test_flipped_bits(receipt: bool, given: Order, oracle: Path, run: Path) -> None:
    """Fault 6: no bit of a shard can change unnoticed, in its numbers, in what describes them or in its end,
    with its receipt or without."""
    rng, path, store = Random(7), shard_file(run, 1), open_store(run)
    plan, whole = Plan.load(store), path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    places = [rng.randrange(*part) for part in ((4, footer), (footer, len(whole))) for _ in range(100)]
    for place in [*range(4), *places, *range(len(whole) - 8, len(whole))]:
        data = bytearray(whole)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        if not receipt:
            receipt_file(run, 1).unlink(missing_ok=True)
        found = examine(store, plan, repair=False)
        assert found.open.keys() == {1}, place
        assert "000001.parquet" in found.open[1]
    assert again(run, given)[1] == [1]
    assert_whole(run, oracle)


def test_flipped_bits_of_receipts(given: Order, oracle: Path, run: Path) -> None:
    """Fault 6: a receipt that was changed is written again, or its shard done again; counts stay right."""
    rng, whole = Random(8), receipt_file(run, 1).read_bytes()
    counts, end = whole.index(b'"statuses"'), whole.index(b'"seconds"')
    flips = [(place, rng.randrange(8)) for place in range(0, counts, 3)]
    flips += [(place, bit) for place in range(counts, end) for bit in range(8)]
    for place, bit in flips:
        data = bytearray(whole)
        data[place] ^= 1 << bit
        receipt_file(run, 1).write_bytes(data)
        store = open_store(run)
        found = examine(store, Plan.load(store), repair=False)
        assert found.statuses == {"ok": 5 * len(found.done)}
        assert found.open.keys() <= {1}
    sweep(given, run)
    assert_whole(run, oracle)


def test_reading_a_damaged_page(oracle: Path, run: Path) -> None:
    """Fault 6: rows are never read from a page that has changed, even by those who ask no receipt."""
    path = shard_file(run, 0)
    whole = path.read_bytes()
    metadata = pq.read_metadata(path).row_group(0)
    rng = Random(9)
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        # the last bytes of a column are data of its last page
        data = bytearray(whole)
        end = column.dictionary_page_offset or column.data_page_offset
        data[end + column.total_compressed_size - 1 - rng.randrange(4)] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"000000.parquet is broken"):
            rows_of(run)


# 15 and 16: places, and the order of things


def test_other_places(
    cheap: Tracer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """Fault 15: a run may be moved, and gone on with from another folder; its model, named by a relative
    path, is found again; a folder of data that cannot be written to is enough."""
    here, data = tmp_path / "here", tmp_path / "here" / "data"
    data.mkdir(parents=True)
    shutil.copytree(tiny_folder, here / "model")
    rows = [{"id": str(n), "image": f"{n}.png", "question": "what color"} for n in range(9)]
    (data / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data.chmod(0o555)
    monkeypatch.chdir(here)
    sweep(order("model", "data/a.jsonl"), "run", Doing(Local(), stop_after=1))
    monkeypatch.chdir(tmp_path)
    shutil.move(here / "run", tmp_path / "moved")
    outcome, done = again(Path("moved"), None)
    assert outcome.complete
    assert len(done) == 1
    assert [path.name for path in data.iterdir()] == ["a.jsonl"]
    monkeypatch.setattr(time, "time", lambda: 0.0)  # nothing asks what time it is
    assert again(tmp_path / "moved", order("here/model", "here/data/a.jsonl"))[1] == []


@pytest.fixture
def steps(few: Order, tmp_path: Path) -> list[Any]:
    """What a whole run does to the disk."""
    disk = Disk()
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        sweep(few, tmp_path / "run")
    return disk.steps


def test_order_of_steps(steps: list[Any], tmp_path: Path) -> None:
    """Fault 16: each file is written under another name, made durable, renamed, and its name made durable; a
    shard is durable before its receipt is begun, all receipts before the run's end; so are new folders."""
    finals = [step for step in steps if step.kind == "replace"]
    names = [os.path.relpath(step.to, tmp_path / "run") for step in finals]
    shards = [name for n in range(2) for name in (f"shards/{n:06d}.parquet", f"receipts/{n:06d}.json")]
    assert names == ["plan/samples-000.parquet", "plan.json", *shards, "_SUCCESS"]
    created = [place for place, step in enumerate(steps) if step.kind == "create"]
    assert len(created) == len(finals)
    for begin, end in zip(created, [*created[1:], len(steps)], strict=True):
        own = [step for step in steps[begin:end] if step.kind != "unlink"]
        final = own[-2].to
        kinds = [step.kind for step in own if step.kind != "write"]
        assert kinds == ["create", "fsync", "replace", "syncdir"]
        assert own[-1].path == os.path.dirname(final) == os.path.dirname(own[0].path)
        assert {step.path for step in own[:-1]} == {own[0].path}
        assert own[-3].kind == "fsync"  # nothing is written behind it
    for place, step in enumerate(steps):
        if step.kind == "mkdir":
            assert (steps[place + 1].kind, steps[place + 1].path) == ("syncdir", os.path.dirname(step.path))


@pytest.mark.parametrize("names_kept", [False, True])
def test_power_cuts(names_kept: bool, steps: list[Any], few: Order, few_oracle: Path, tmp_path: Path) -> None:
    """Fault 16: when the power fails behind any step, and all is lost that was not made durable, no shard is
    lost whose receipt was, none is there half, and the run goes on to the same bytes."""
    target = tmp_path / "after"
    receipts = [f"receipts/{number:06d}.json" for number in range(2)]
    for cut in range(len(steps) + 1):
        if [step.kind for step in steps[cut - 1 : cut + 1]] == ["write", "write"]:
            continue
        after_power_cut(steps[:cut], tmp_path / "run", target, names_kept)
        durable = 0
        for number, receipt in enumerate(receipts):
            renamed = [n for n, step in enumerate(steps[:cut]) if step.to.endswith(receipt)]
            if renamed and any(step.kind == "syncdir" for step in steps[renamed[0] : cut]):
                durable = number + 1
        assert len(committed(target)) >= durable
        before = committed(target)
        outcome, done = again(target, few)
        assert outcome.complete
        assert set(done).isdisjoint(range(durable))
        assert kept({name: before[name] for name in sorted(before)[:durable]}, target)
        assert_whole(target, few_oracle)
        shutil.rmtree(target)


# 19: anything, in any order


class AnyOrder(RuleBasedStateMachine):
    """Runs, stops, crashes, damage and loss in any order; the run that goes on is that of the oracle."""

    given: Order
    oracle: Path
    place: Path
    runs = 0

    @initialize()
    def begin(self) -> None:
        type(self).runs += 1
        self.folder = self.place / f"run-{self.runs}"
        self.hurt: set[int] = set()
        self.planned = False

    def _sound(self) -> dict[str, tuple[int, str]]:
        files = committed(self.folder)
        return {name: file for name, file in files.items() if int(Path(name).stem) not in self.hurt}

    def _check(self, before: dict[str, tuple[int, str]], done: list[int]) -> None:
        assert kept(before, self.folder)
        assert not {f"{number:06d}.parquet" for number in done} & before.keys()
        self.hurt -= set(done)
        for path in sorted((self.oracle / "shards").iterdir()):
            number, own = int(path.stem), self.folder / "shards" / path.name
            if own.exists() and own.read_bytes() == path.read_bytes():
                self.hurt.discard(number)  # a run that crashed had come so far
            else:
                assert number in self.hurt or not own.exists()

    @rule(shards=st.integers(1, SHARDS), named=st.booleans())
    def some(self, shards: int, named: bool) -> None:
        """Some shards, then a stop."""
        before, doing = self._sound(), Doing(Local(), stop_after=shards)
        sweep(None if self.planned and not named else self.given, self.folder, doing)
        self.planned = True
        self._check(before, doing.done)

    @rule(at=st.integers(0, 120))
    def crash(self, at: int) -> None:
        """The process ends at some step."""

        def end() -> None:
            raise Crash

        before, doing = self._sound(), Doing(Local())
        with pytest.MonkeyPatch.context() as patch:
            Disk(at, end).install(patch)
            with suppress(Crash):
                sweep(self.given, self.folder, doing)
        self.planned = (self.folder / "plan.json").exists()
        self._check(before, doing.done)

    @precondition(lambda self: committed(self.folder))
    @rule(seed=st.integers(0, 2**32))
    def damage(self, seed: int) -> None:
        """One bit of one shard."""
        rng = Random(seed)
        name = rng.choice(sorted(committed(self.folder)))
        damaged(self.folder / "shards" / name, rng)
        self.hurt.add(int(Path(name).stem))

    @precondition(lambda self: committed(self.folder))
    @rule(seed=st.integers(0, 2**32), what=st.sampled_from(["shard", "receipt", "torn receipt", "end"]))
    def lose(self, seed: int, what: str) -> None:
        """A file is gone, or half of it."""
        number = int(Path(Random(seed).choice(sorted(committed(self.folder)))).stem)
        if what == "shard":
            shard_file(self.folder, number).unlink()
            self.hurt.add(number)
        elif what == "end":
            (self.folder / SUCCESS).unlink(missing_ok=True)
        elif what == "receipt":
            receipt_file(self.folder, number).unlink()
        else:
            os.truncate(receipt_file(self.folder, number), 99)

    @precondition(lambda self: self.planned)
    @rule()
    def verify(self) -> None:
        """It finds all that is damaged, and changes nothing."""
        store, before = open_store(self.folder), files_of(self.folder)
        found = examine(store, Plan.load(store), deep=True, repair=False)
        assert self.hurt <= found.open.keys()
        assert not found.wrong
        assert files_of(self.folder) == before

    @rule()
    def finish(self) -> None:
        """All of it."""
        before, doing = self._sound(), Doing(Local())
        assert sweep(self.given, self.folder, doing).complete
        self.planned = True
        self._check(before, doing.done)
        assert_whole(self.folder, self.oracle)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.finish()
            shutil.rmtree(self.folder)


def test_any_order(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 19: the promises of 1 to 6 hold for any sequence of these."""

    class Machine(AnyOrder):
        place = tmp_path

    Machine.given, Machine.oracle = given, oracle
    run_state_machine_as_test(
        Machine,
        settings=checked(
            max_examples=40,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
