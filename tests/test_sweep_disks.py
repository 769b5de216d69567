"""Disks that are full, or that forget at a power cut what was not made durable."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sweep_disk import Disk, after_power_cut
from sweep_helpers import (
    again,
    assert_whole,
    committed,
    forked,
)
from sweep_watch import kept

from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Order
from blip_trace.sweep.store import SUCCESS, open_store

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


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
