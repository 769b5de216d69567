"""Long trials of sweeps in real processes that are killed: `pytest tests/faults_kill.py`.

They take some minutes, so that plain `pytest` does not collect them; their quick forms are in
test_sweep_stops.py and test_sweep_processes.py. Random times come from a seed that is printed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from sweep_helpers import (
    again,
    assert_equal_bits,
    assert_whole,
    committed,
    files_of,
    forked,
    order,
    planned_ids,
    rows_of,
    wait_until,
)
from sweep_watch import kept

from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Order
from blip_trace.sweep.store import SUCCESS, open_store

KILLS, KILLS_OF_PROCESSES = 50, 12
SEED = int(os.environ.get("FAULT_SEED", random.randrange(10**6)))
SHARDS = 6

pytestmark = pytest.mark.usefixtures("seeded")

DRIVER = """
import os, signal, sys
from pathlib import Path
from sweep_helpers import order
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import make_executor

if __name__ == "__main__":
    model, folder, executor, workers = sys.argv[1:]
    made = make_executor(executor, int(workers) if workers != "0" else None)
    outcome = sweep(order(model, "scenes:6"), folder, made, threads=1)
    sys.exit(130 if outcome.stopped else 3 if outcome.failed else 0)
"""
"""What is started and killed."""


@pytest.fixture
def seeded() -> None:
    print(f"FAULT_SEED={SEED}")
    random.seed(SEED)


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "driver.py"
    path.write_text(DRIVER)
    return path


@pytest.fixture(scope="session")
def given(tiny_folder: Path) -> Order:
    """30 samples in 6 shards, traced with a tiny model."""
    return order(tiny_folder, "scenes:6")


@pytest.fixture(scope="session")
def oracle(given: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("oracle") / "run"
    sweep(given, folder, threads=1)
    assert len(files_of(folder)) == SHARDS
    assert sorted(rows_of(folder)) == sorted(planned_ids(folder))
    return folder


def start(
    driver: Path, model: str | Path, folder: Path, executor: str, workers: int = 0, patch: str = ""
) -> subprocess.Popen[bytes]:
    """Start a driver, and, in it and in all its workers, what `patch` says."""
    place = folder.with_name(f"{folder.name} patch")
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(textwrap.dedent(patch))
    paths = [str(place), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with open(place / "log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, str(driver), str(model), str(folder), executor, str(workers)],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def log_of(folder: Path) -> str:
    return (folder.with_name(f"{folder.name} patch") / "log").read_text(errors="replace")


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Processes that a driver has started and that do its work."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        names = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
        return [child for child, name in names.items() if b"spawn_main" in name]
    except OSError:
        return []


def started(process: subprocess.Popen[bytes]) -> bool:
    """Whether a driver has its two workers, or has ended already."""
    return len(workers_of(process)) == 2 or process.poll() is not None


def without_orphans(pids: Sequence[int]) -> None:
    """The workers of a driver that was killed end by themselves."""
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)


def finished(given: Order, folder: Path, oracle: Path, before: dict[str, tuple[int, str]]) -> None:
    """Gone on with, a run is the oracle, and what was committed before is what it was."""
    _, done = again(folder, given, threads=1)
    assert not {f"{number:06d}.parquet" for number in done} & before.keys()
    assert kept(before, folder)
    assert_whole(folder, oracle)
    assert_equal_bits(folder, oracle)


# 1: the driver


def test_driver_killed_at_random_times(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 1: 50 drivers that trace a model are killed at any time, each gone on from by the next; every
    time the run is complete it begins anew."""
    begin = time.monotonic()
    forked(lambda: sweep(given, tmp_path / "timed", threads=1), tmp_path / "log", 100)
    usual, kills, runs = time.monotonic() - begin, 0, 0
    folder = tmp_path / "run-0"
    while kills < KILLS:
        before = committed(folder)
        child = os.fork()
        if not child:
            try:
                sweep(given, folder, threads=1)
            finally:
                os._exit(0)
        time.sleep(random.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        assert kept(before, folder)
        if (folder / SUCCESS).exists():
            finished(given, folder, oracle, committed(folder))
            runs += 1
            folder = tmp_path / f"run-{runs}"
    assert runs >= 1
    if open_store(folder).has("plan.json"):
        finished(given, folder, oracle, committed(folder))


def test_interpreters_killed_at_random_times(
    driver: Path, tiny_folder: Path, given: Order, oracle: Path, tmp_path: Path
) -> None:
    """Fault 1: whole interpreters with two processes each; those end by themselves, and the run goes on at
    once, while they may still be there."""
    folder, usual = tmp_path / "run", 0.0
    for kill in range(KILLS_OF_PROCESSES):
        before = committed(folder)
        process = start(driver, tiny_folder, folder, "processes", 2)
        begin = time.monotonic()
        wait_until(partial(started, process))
        time.sleep(random.uniform(0, max(10.0, usual)))
        workers = workers_of(process)
        usual = max(usual, time.monotonic() - begin) if process.poll() is not None else usual
        process.kill()
        process.wait(30)
        if kill % 2:
            before = committed(folder) or before
            finished(given, folder, oracle, before if not workers else {})
            without_orphans(workers)
            assert_whole(folder, oracle)
            folder = tmp_path / f"run-{kill}"
        else:
            assert kept(before, folder)
            without_orphans(workers)


STEPS = """
import os, signal, sys
from pathlib import Path

at, once, driver = {at}, Path({once!r}), {driver!r}
if "spawn_main" in " ".join(sys.orig_argv):
    from blip_trace.sweep import disk
    moments = -1

    def moment():
        global moments
        moments += 1
        if moments == at and not once.exists():
            once.touch()
            if driver:
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def around(work):
        def wrapped(*given, **options):
            moment()
            done = work(*given, **options)
            moment()
            return done
        return wrapped

    def opened(path, mode="r", **options):
        return around(open)(path, mode, **options) if mode == "wb" else open(path, mode, **options)

    disk.open = opened
    os.fsync, os.replace = around(os.fsync), around(os.replace)
"""
"""Kills a worker, and its driver, at one of the steps by which it commits shards."""


@pytest.mark.parametrize("with_driver", [False, True])
def test_workers_killed_at_every_step(
    with_driver: bool, driver: Path, tiny_folder: Path, given: Order, oracle: Path, tmp_path: Path
) -> None:
    """Fault 1 and 2: a worker is killed before each step of a commit, or behind it with its driver. The local
    executor's steps, and the driver's own, are in test_sweep_stops.py."""
    for at in range(with_driver, 16, 2):
        folder, once = tmp_path / f"run-{at}", tmp_path / f"once-{at}"
        patch = STEPS.format(at=at, once=str(once), driver=with_driver)
        process = start(driver, tiny_folder, folder, "processes", 1, patch)
        code = process.wait(120)
        assert once.exists(), log_of(folder)
        assert code == (-signal.SIGKILL if with_driver else 0), log_of(folder)
        finished(given, folder, oracle, committed(folder))


# 2: workers and signals


def test_workers_killed_at_random_times(
    driver: Path, tiny_folder: Path, oracle: Path, tmp_path: Path
) -> None:
    """Fault 2: workers are killed over and over, and their driver goes on to the end."""
    folder, kills = tmp_path / "run", 0
    process = start(driver, tiny_folder, folder, "processes", 2, SLOW)
    until = time.monotonic() + 200
    while process.poll() is None:
        assert time.monotonic() < until, log_of(folder)
        if len(committed(folder)) > kills and (workers := workers_of(process)):
            os.kill(random.choice(workers), signal.SIGKILL)
            kills += 1
        time.sleep(random.uniform(0, 0.3))
    assert process.returncode == 0, log_of(folder)
    assert kills >= 2
    assert_whole(folder, oracle)


SLOW = """
import time
from blip_trace import Tracer
measure = Tracer.measure
Tracer.measure = lambda *given: (time.sleep(0.3), measure(*given))[1]
"""
KILLER = """
import os, signal, sys
if "spawn_main" in " ".join(sys.orig_argv):
    from blip_trace import Tracer
    measure = Tracer.measure

    def deadly(self, request, prepared, *rest):
        if any({words!r} in own.asked.question for own in prepared):
            os.kill(os.getpid(), signal.SIGSEGV)
        return measure(self, request, prepared, *rest)

    Tracer.measure = deadly
"""


def test_sample_that_kills(
    driver: Path, tiny_folder: Path, given: Order, oracle: Path, tmp_path: Path
) -> None:
    """Fault 2: a sample whose computation ends its process becomes a failed row; the others have their
    numbers, those of other shards to the bit."""
    asked = {sample.id: sample.question for sample in given.data.samples()}
    texts = list(asked.values())
    id, words = next((id, text) for id, text in asked.items() if sum(text in own for own in texts) == 1)
    folder = tmp_path / "run"
    process = start(driver, tiny_folder, folder, "processes", 2, KILLER.format(words=words))
    assert process.wait(200) == 3, log_of(folder)
    rows, truth = rows_of(folder), rows_of(oracle)
    assert [own for own in rows if rows[own]["status"] != "ok"] == [id]
    assert rows[id]["reason"] == "the process ended while this sample was computed"
    for other, row in rows.items():
        if other != id:
            assert row["probability_high"] == pytest.approx(truth[other]["probability_high"], abs=1e-5)
    same = [name for name, file in files_of(folder).items() if file[1] == files_of(oracle)[name][1]]
    assert len(same) == SHARDS - 1


@pytest.mark.parametrize("executor", ["local", "processes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals(
    number: int, executor: str, driver: Path, tiny_folder: Path, given: Order, oracle: Path, tmp_path: Path
) -> None:
    """Fault 2: a signal to the driver, or to all its processes as a terminal sends it, ends it soon with a
    code of its own, no process stays behind, and the run goes on."""
    folder = tmp_path / "run"
    process = start(driver, tiny_folder, folder, executor, 2 if executor == "processes" else 0, SLOW)
    wait_until(lambda: committed(folder) or process.poll() is not None)
    workers = workers_of(process)
    assert bool(workers) == (executor == "processes")
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(30) == 130, log_of(folder)
    without_orphans(workers)
    assert not (folder / SUCCESS).exists()
    before = committed(folder)
    finished(given, folder, oracle, before)
