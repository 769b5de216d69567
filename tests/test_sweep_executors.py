"""What every executor promises: the same tests for this process, two processes of this machine, and two
workers of a Ray cluster. The oracle is what this process does in one go.

What workers do that die over and over is in test_sweep_processes.py and test_sweep_ray.py, long trials are in
faults_kill.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest
from sweep_helpers import (
    Listener,
    again,
    assert_equal_bits,
    assert_whole,
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
from sweep_trouble import Trouble
from sweep_watch import ends_within, kept, of_environment, of_session

from blip_trace.cli import app
from blip_trace.sweep import driver
from blip_trace.sweep.driver import Outcome, sweep
from blip_trace.sweep.executors import EXECUTORS, Executor, make_executor
from blip_trace.sweep.plan import Plan, samples_of
from blip_trace.sweep.planning import Order
from blip_trace.sweep.receipts import Receipt
from blip_trace.sweep.sources import open_data
from blip_trace.sweep.store import SUCCESS, Busy, open_store

pytest_plugins = ("sweep_fixtures", "sweep_cluster")
pytestmark = pytest.mark.usefixtures("long_hang_guard")

OTHER = {"local": "processes", "processes": "ray", "ray": "local"}
SHARDS, SHARD_SIZE = 6, 4
MISSING, BROKEN = 1, 4
"""The shards that have a picture that cannot be read, beside one that can."""
Make = Callable[[str], Executor]


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest) -> Make:
    """Makes an executor."""

    def made(name: str) -> Executor:
        address = request.getfixturevalue("cluster") if name == "ray" else None
        return make_executor(name, None if name == "local" else 2, address)

    return made


@pytest.fixture(scope="module", params=EXECUTORS)
def name(request: pytest.FixtureRequest) -> str:
    """The executor that a test is about."""
    return str(request.param)


@pytest.fixture(scope="module")
def executor(name: str, make: Make) -> Executor:
    return make(name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two questions about each of 12 pictures."""
    folder, scenes, lines = tmp_path_factory.mktemp("data"), open_data("scenes:12"), []
    for sample in scenes.samples():
        if sample.type in ("color", "shape"):
            picture = f"{sample.image.removeprefix('scene:')}.png"
            (folder / picture).write_bytes(scenes.media.read(sample.image))
            lines.append(json.dumps({"id": sample.id, "image": picture, "question": sample.question}))
    (folder / "a.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def given(data: Path, tiny_folder: Path) -> Order:
    return order(tiny_folder, data / "a.jsonl", SHARD_SIZE)


@pytest.fixture(scope="module")
def oracle(given: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    assert sweep(given, folder, threads=1).statuses == {"ok": SHARDS * SHARD_SIZE}
    assert len(files_of(folder)) == SHARDS
    return folder


@pytest.fixture(scope="module")
def spoilt(data: Path, oracle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data, but a picture is missing and another broken."""
    folder = Path(shutil.copytree(data, tmp_path_factory.mktemp("spoilt") / "data"))
    (folder / picture_of(oracle, MISSING)).unlink()
    os.truncate(folder / picture_of(oracle, BROKEN), 200)
    return folder


def picture_of(run: Path, shard: int) -> str:
    """The picture of a shard's first sample."""
    store = open_store(run)
    return samples_of(store, Plan.load(store).shards[shard])[0].image


@pytest.fixture(scope="module")
def given_spoilt(given: Order, spoilt: Path) -> Order:
    return replace(given, data=open_data(spoilt / "a.jsonl"))


@pytest.fixture(scope="module")
def spoilt_oracle(given_spoilt: Order, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoilt-oracle") / "run"
    sweep(given_spoilt, folder, threads=1)
    return folder


@dataclass(frozen=True)
class Swept:
    """A run, and what was told of it; what another driver was told meanwhile."""

    folder: Path
    outcome: Outcome
    listener: Listener
    refused: list[str]


@pytest.fixture(scope="module")
def swept(given_spoilt: Order, executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """A run from nothing to its end, with pictures that cannot be read."""
    folder, refused = tmp_path_factory.mktemp("swept") / "run", []

    class Second(Listener):
        """Somebody who wants to go on with the run that is being done."""

        def finished(self, receipt: Receipt) -> None:
            super().finished(receipt)
            for what in (given_spoilt, None):
                with pytest.raises(Busy) as error:
                    sweep(what, folder)
                refused.append(str(error.value))

    listener = Second()
    with ends_within(150):
        outcome = sweep(given_spoilt, folder, executor, threads=1, reporter=listener)
    return Swept(folder, outcome, listener, refused)


def test_whole_run(swept: Swept, name: str, spoilt_oracle: Path) -> None:
    """From nothing to its end it is byte for byte the local run, samples that fail included; each shard is
    told once, and done where it should be."""
    assert swept.outcome.complete
    assert not swept.outcome.stopped
    assert_whole(swept.folder, spoilt_oracle)
    assert swept.listener.samples == swept.outcome.plan.samples
    assert sorted(receipt.number for receipt in swept.listener.receipts) == list(range(SHARDS))
    here = {receipt.made["process"] == os.getpid() for receipt in swept.listener.receipts}
    assert here == {name == "local"}


def test_bad_samples(swept: Swept, oracle: Path) -> None:
    """A picture that cannot be read is a reason in its samples' rows, and changes no bit of any other row."""
    assert swept.outcome.statuses == {"ok": SHARDS * SHARD_SIZE - 4, "error": 4}
    assert swept.outcome.failed == 4
    failed = {id: row for id, row in rows_of(swept.folder).items() if row["status"] == "error"}
    reasons = {row["image"]: row["reason"] for row in failed.values()}
    assert "there is no image file" in reasons.pop(picture_of(oracle, MISSING))
    assert "truncated" in reasons.pop(picture_of(oracle, BROKEN))
    assert not reasons
    assert_equal_bits(swept.folder, oracle, but=failed)


def test_second_driver(swept: Swept) -> None:
    """It is refused as long as shards are done, and told who is at it."""
    assert len(swept.refused) == 2 * SHARDS
    assert all(f"is being written by process {os.getpid()} on " in text for text in swept.refused)


def test_finished_run(swept: Swept, given_spoilt: Order, executor: Executor) -> None:
    """Fault 18: it is left as it is, whether it is named by its order or by its folder."""
    before = times(swept.folder)
    for what in (given_spoilt, None, replace(given_spoilt, shard_size=None)):
        outcome, done = again(swept.folder, what, executor=executor, threads=1)
        assert outcome.complete
        assert not done
    assert times(swept.folder) == before


def times(folder: Path) -> dict[Path, int]:
    """When each file of a run was written."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.stat().st_mtime_ns for path in files}


def test_what_is_done_again(
    swept: Swept, spoilt: Path, data: Path, given: Order, oracle: Path, executor: Executor, tmp_path: Path
) -> None:
    """Shards with failed samples if that is asked for, and those that are gone or damaged; the others stay as
    they are, to the time they were written. When the pictures are mended nothing tells what happened."""
    folder = shutil.copytree(swept.folder, tmp_path / "run")
    pictures = shutil.copytree(spoilt, tmp_path / "data")
    given = replace(given, data=open_data(pictures / "a.jsonl"))
    outcome, done = again(folder, given, retry=True, threads=1)
    assert done == [MISSING, BROKEN]
    assert outcome.statuses == swept.outcome.statuses
    shutil.copytree(data, pictures, dirs_exist_ok=True)
    before = files_of(folder)
    shard_file(folder, 0).unlink()
    damaged(shard_file(folder, 2), Random(0))
    receipt_file(folder, 3).unlink()  # which is written again from the rows
    outcome, done = again(folder, given, executor=executor, retry=True, threads=1)
    assert outcome.statuses == {"ok": SHARDS * SHARD_SIZE}
    assert sorted(done) == [0, MISSING, 2, BROKEN]
    for number in (3, 5):
        assert files_of(folder)[shard_file(folder, number).name] == before[shard_file(folder, number).name]
    assert_whole(folder, oracle)
    assert again(folder, given, executor=executor, retry=True, threads=1)[1] == []


class Interrupted(Listener):
    """Gets a signal when the first shard is done."""

    def finished(self, receipt: Receipt) -> None:
        super().finished(receipt)
        os.kill(os.getpid(), signal.SIGTERM)


def test_stopped_killed_and_gone_on(
    name: str,
    given: Order,
    oracle: Path,
    make: Make,
    trouble: Trouble,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Fault 2: a run that one executor has begun is gone on with by another, also when that loses a process
    in the middle of a pass; what was finished before stays as it was."""
    monkeypatch.setattr(driver, "REPAIRS", 1)  # so that nobody but the executor does a shard again
    folder, own, other = tmp_path / "run", make(name), make(OTHER[name])
    trouble.slow(0.1)
    outcome = sweep(given, folder, own, threads=1, reporter=Interrupted())
    assert outcome.stopped
    assert not outcome.complete
    trouble.end()
    before = committed(folder)
    assert 0 < len(before) < SHARDS
    assert {path.name for path in folder.glob("[._]*")} == {".lock"}

    trouble.kill_one()
    listener = Listener()
    if OTHER[name] == "local":
        code = forked(lambda: sweep(None, folder, other, threads=1), tmp_path / "log")
        assert code == -signal.SIGKILL, (tmp_path / "log").read_text()
        assert trouble.has_killed()
    outcome, done = again(folder, None, executor=other, threads=1, reporter=listener)
    assert outcome.complete
    assert trouble.has_killed()
    assert any("done again" in note for note in listener.notes) == (OTHER[name] != "local")
    assert not {shard_file(folder, number).name for number in done} & before.keys()
    assert len(done) == len(set(done)) > 0
    assert kept(before, folder)
    assert_whole(folder, oracle)


def test_interrupted_command(
    name: str,
    data: Path,
    given: Order,
    oracle: Path,
    trouble: Trouble,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Fault 2: Ctrl-C, which a terminal sends to all processes of a command, ends it soon and in silence,
    with an exit code of its own and none of its processes left, and the run goes on."""
    folder, mark = tmp_path / "run", str(tmp_path)
    options = [f"--out={folder}", f"--data={data / 'a.jsonl'}", f"--model={given.model}", "--samples=1",
               f"--shard-size={SHARD_SIZE}", "--threads=1", f"--executor={name}"]  # fmt: skip
    if name != "local":
        options.append("--workers=2")
    if name == "ray":
        options.append(f"--address={request.getfixturevalue('cluster')}")

    def command() -> None:
        os.setsid()
        os.environ["STARTED_BY"] = mark
        with pytest.raises(SystemExit) as end:
            app(["sweep", *options])
        os._exit(int(end.value.code or 0))

    trouble.slow(0.2)
    child = start_forked(command, tmp_path / "log")
    try:
        wait_until(lambda: committed(folder))
        assert bool(of_environment(mark)) == (name != "local")
        before = committed(folder)
        os.killpg(child, signal.SIGINT)
    finally:
        code = ended(child)
    assert code == 130
    assert "Traceback" not in capfd.readouterr().err
    trouble.end()
    wait_until(lambda: not of_environment(mark), 10)
    if name == "ray":
        session = request.getfixturevalue("ray_of_two").session
        wait_until(lambda: not any("MapWorker" in command for command in of_session(session).values()), 10)
    assert 0 < len(committed(folder)) < SHARDS
    assert kept(before, folder)
    assert sweep(given, folder, threads=1).complete
    assert kept(before, folder)
    assert_whole(folder, oracle)


def test_nowhere_to_write(
    given: Order, oracle: Path, executor: Executor, trouble: Trouble, tmp_path: Path
) -> None:
    """Fault 4: what keeps a worker from writing ends the run, in one sentence; mended, it goes on."""
    folder, away = tmp_path / "run", tmp_path / "away"

    class Removing(Listener):
        def finished(self, receipt: Receipt) -> None:
            super().finished(receipt)
            if not away.exists():
                (folder / "shards").rename(away)

    trouble.slow(0.1)
    with pytest.raises(OSError, match=r"^\[Errno 2\] No such file or directory: '.*part'$"):
        sweep(given, folder, executor, threads=1, reporter=Removing())
    trouble.end()
    assert not (folder / ".computing").exists()
    assert not (folder / SUCCESS).exists()
    away.rename(folder / "shards")
    before = committed(folder)
    assert before
    assert sweep(None, folder, threads=1).complete
    assert kept(before, folder)
    assert_whole(folder, oracle)
