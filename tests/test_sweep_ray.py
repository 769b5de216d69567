"""What only the Ray executor has: a cluster, what its actors leave for each other, and actors that die."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sweep_helpers import Doing, committed, files_of, order, rows_of
from sweep_trouble import Trouble
from sweep_watch import running

from blip_trace.sweep import ray_driver
from blip_trace.sweep.desk import Desk
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Events, make_executor
from blip_trace.sweep.processes import DEATHS, EARLY_DEATHS
from blip_trace.sweep.shard import Stopped
from blip_trace.sweep.store import open_store
from blip_trace.sweep.worker import Job

pytest_plugins = ("sweep_fixtures", "sweep_cluster")
pytestmark = pytest.mark.usefixtures("long_hang_guard")


def test_a_ray_of_its_own(tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no cluster is named a Ray is started for the command, and is gone when that is stopped."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    folder, before = tmp_path / "run", rays()
    given = order(tiny_folder, shard_size=1)
    outcome = sweep(given, folder, Doing(make_executor("ray", 1), stop_after=1), threads=1)
    assert outcome.stopped
    assert rays() == before
    assert not (folder / ".computing").exists()
    assert 0 < len(committed(folder)) < len(outcome.plan.shards)


def rays() -> set[int]:
    """Processes of any Ray on this machine that could start others."""
    return {pid for pid, command in running().items() if "/raylet/raylet" in command}


def test_sample_that_kills(cluster: str, trouble: Trouble, tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 2: a sample whose computation ends every actor that tries it is found, and given up; the others
    have their numbers, those of the other shard to the bit."""
    given = order(tiny_folder, "scenes:2")
    sweep(given, tmp_path / "local", threads=1)
    asked = Counter(sample.question for sample in given.data.samples())
    killer = next(sample for sample in given.data.samples() if asked[sample.question] == 1)
    trouble.kill_at(killer.question)
    outcome = sweep(given, tmp_path / "run", make_executor("ray", 2, cluster), threads=1)
    assert outcome.complete
    assert outcome.statuses == {"ok": 9, "error": 1}
    rows, truth = rows_of(tmp_path / "run"), rows_of(tmp_path / "local")
    assert rows.pop(killer.id)["reason"] == "the process ended while this sample was computed"
    for id, row in rows.items():
        assert row["probability_high"] == pytest.approx(truth[id]["probability_high"], abs=1e-5)
    ours, theirs = files_of(tmp_path / "run"), files_of(tmp_path / "local")
    assert sum(ours[name][1] == theirs[name][1] for name in theirs) == 1


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
