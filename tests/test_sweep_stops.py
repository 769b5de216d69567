"""Sweeps that are killed, told to stop, begun twice or moved: the run that goes on is, to the byte, one that
was never interrupted.

Faults have the numbers of the table that sweeps are built against. What every executor does is in
test_sweep_executors.py; long trials with real processes are in faults_kill.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from itertools import count
from pathlib import Path
from random import Random

import pytest
from sweep_disk import Disk
from sweep_helpers import (
    Doing,
    Listener,
    again,
    assert_whole,
    committed,
    ended,
    files_of,
    forked,
    order,
    start_forked,
    wait_until,
)
from sweep_watch import kept

from blip_trace import Tracer
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Local
from blip_trace.sweep.planning import Order
from blip_trace.sweep.store import SUCCESS, Busy, open_store

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


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
