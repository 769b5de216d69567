"""The executor on a Ray cluster of two processors: what it writes, and what becomes of it when things die."""

from __future__ import annotations

import importlib
import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_helpers import Doing, Listener, assert_whole, committed, files_of, order

from blip_trace.sweep import ray_driver
from blip_trace.sweep.desk import Desk
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Events, make_executor
from blip_trace.sweep.processes import DEATHS, EARLY_DEATHS
from blip_trace.sweep.receipts import Receipt
from blip_trace.sweep.shard import Stopped
from blip_trace.sweep.store import open_store
from blip_trace.sweep.worker import Job

HANGS_AFTER = 150
CLUSTER = """
import logging, sys, ray
quiet = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@pytest.fixture(autouse=True)
def _hang_guard() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"the test has taken {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS_AFTER)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of our own, which is gone afterwards."""
    given = pytest.MonkeyPatch()
    given.setenv("RAY_USAGE_STATS_ENABLED", "0")
    given.setenv("RAY_AUTH_MODE", "token")  # others on this machine must not join, our drivers must
    given.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    given.setenv("OMP_NUM_THREADS", "1")
    given.delenv("RAY_ADDRESS", raising=False)
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            given.undo()
    assert not _of_session(process.pid)


def _of_session(session: int) -> list[str]:
    """Commands of all processes of a session that are alive."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, *_, own = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            command = (folder / "cmdline").read_bytes().decode().split("\0")[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z" and int(own) == session:
            found.append(command)
    return found


def _rays() -> set[int]:
    """Processes of any Ray on this machine that could start others."""
    commands = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/cmdline")}
    found = set()
    for pid, path in commands.items():
        try:
            if b"/raylet/raylet" in path.read_bytes().split(b"\0")[0]:
                found.add(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Killer(Listener):
    """Kills whoever commits the first shard."""

    def finished(self, receipt: Receipt) -> None:
        super().finished(receipt)
        if len(self.receipts) == 1:
            os.kill(receipt.made["process"], signal.SIGKILL)


def test_a_killed_actor_is_replaced(cluster: str, tmp_path: Path, tiny_folder: Path) -> None:
    """The run is complete, and to the byte what the local executor writes."""
    given = order(tiny_folder, shard_size=1)
    sweep(given, tmp_path / "local", threads=1)
    killer = Killer()
    outcome = sweep(given, tmp_path / "run", make_executor("ray", 1, cluster), threads=1, reporter=killer)
    assert outcome.complete
    assert_whole(tmp_path / "run", tmp_path / "local")
    assert killer.samples == outcome.plan.samples
    first, *_, last = (receipt.made["process"] for receipt in killer.receipts)
    assert os.getpid() != first != last != os.getpid()
    assert sorted(receipt.number for receipt in killer.receipts) == list(range(len(outcome.plan.shards)))


def test_a_stopped_run_goes_on(cluster: str, tmp_path: Path, tiny_folder: Path) -> None:
    """Stopped on a Ray that was started for it, and is gone then; done on a cluster by two actors."""
    given = order(tiny_folder, shard_size=1)
    sweep(given, tmp_path / "local", threads=1)
    folder, before = tmp_path / "run", _rays()
    outcome = sweep(given, folder, Doing(make_executor("ray", 1), stop_after=1), threads=1)
    assert outcome.stopped
    assert _rays() == before
    assert not (folder / ".computing").exists()
    done = committed(folder)
    assert 0 < len(done) < len(outcome.plan.shards)
    doing = Doing(make_executor("ray", 2, cluster))
    assert sweep(None, folder, doing, threads=1).complete
    left = [shard.number for shard in outcome.plan.shards if f"{shard.number:06d}.parquet" not in done]
    assert sorted(doing.done) == left
    assert done.items() <= files_of(folder).items()
    assert_whole(folder, tmp_path / "local")


def test_what_a_worker_cannot_do(cluster: str, tmp_path: Path, tiny_folder: Path) -> None:
    """It comes out as one sentence."""
    folder = tmp_path / "run"
    sweep(order(tiny_folder), folder, threads=1)
    job = Job(str(folder), str(tiny_folder), None, threads=1)
    events = Events(lambda _: None, lambda _: None, lambda _: None, lambda: False)
    shutil.rmtree(folder / "shards")
    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*part'$"):
        make_executor("ray", 1, cluster).run(job, [0], events, None)
    assert not (folder / ".computing").exists()


def test_no_cluster(tmp_path: Path) -> None:
    events = Events(lambda _: None, lambda _: None, lambda _: None, lambda: False)
    job = Job(str(tmp_path), "", None)
    with pytest.raises(ConnectionError, match=r"^Ray cannot be reached at 127\.0\.0\.1:1: Conn.* refused$"):
        make_executor("ray", 1, "127.0.0.1:1").run(job, [0], events, None)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_desk(place: str, tmp_path: Path) -> None:
    """What was computed when two processes died is computed alone; what then kills a third is given up."""
    store = open_store(tmp_path if place == "folder" else f"memory://{tmp_path}")
    with Desk.set_up(store) as desk:
        for seen in ({"a", "b", "c"}, {"b", "d"}, {"b"}):
            assert not Desk(store, desk.name).take(3).lost
            own = Desk(store, desk.name)
            own.take(3)  # it has found nothing that was being computed
            own.tell(sorted(seen), 0)
        after = Desk(store, desk.name).take(3)
        assert after.suspects == after.lost == {"b"}
        assert Desk(store, desk.name).take(4).deaths == 0
        desk.leave(3)
        assert Desk(store, desk.name).take(3).deaths == 0
        for _ in range(DEATHS - 1):
            Desk(store, desk.name).take(3)
        with pytest.raises(ChildProcessError, match=f"^{DEATHS} processes ended during shard 3$"):
            Desk(store, desk.name).take(3)


@pytest.mark.parametrize("place", ["folder", "bucket"])
def test_closed_desk(place: str, tmp_path: Path) -> None:
    """Whoever was forgotten ends before it commits, also when the run goes on without it."""
    store = open_store(tmp_path if place == "folder" else f"memory://{tmp_path}")
    with Desk.set_up(store) as desk:
        own = Desk(store, desk.name)
        own.take(0)
        assert own.starting() < EARLY_DEATHS
    with Desk.set_up(store) as after:
        assert after.untouched()
        assert not own.open()
        for work in (lambda: own.tell((), 1), own.starting, lambda: own.take(1)):
            with pytest.raises(Stopped):
                work()


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are counted on machines that are there, by whatever is scarce."""
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 3.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(nodes=lambda: nodes))
    for cpus, gpus, workers in (
        (1, 0, 8),
        (2, 0, 3),
        (4, 0, 1),
        (6, 0, 0),
        (1, 1, 2),
        (1, 0.25, 5),
        (1, 3, 0),
    ):
        assert ray_driver._room(cpus, gpus) == (workers, 8)


def test_another_machine(tmp_path: Path, tiny_folder: Path) -> None:
    """It must have the run's images and its very model."""
    sweep(order(tiny_folder), tmp_path / "run", threads=1)
    job = Job(str(tmp_path / "run"), str(tiny_folder), None)
    ray_driver.check_places(job, "there")
    with pytest.raises(FileNotFoundError, match=r"^there has no folder .*/pictures: every machine needs"):
        ray_driver.check_places(replace(job, images=str(tmp_path / "pictures")), "there")
    other = shutil.copytree(tiny_folder, tmp_path / "model")
    (other / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^the model in .*/model of there is not the one"):
        ray_driver.check_places(replace(job, model=str(other)), "there")


def test_ray_options(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("local", "processes"):
        with pytest.raises(ValueError, match=f"belong to ray, not to the {name} executor"):
            make_executor(name, None, "auto")
        with pytest.raises(ValueError, match="belong to ray"):
            make_executor(name, None, gpus=0.5)
    for wrong in (-1, 1.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="a whole number or a share of one GPU"):
            make_executor("ray", None, gpus=wrong)
    monkeypatch.delitem(sys.modules, "blip_trace.sweep.on_ray", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"^the ray executor needs Ray: pip install 'blip-trace\[ray\]'$"):
        make_executor("ray", 2)
