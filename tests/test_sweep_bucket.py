"""Runs in object storage: a bucket gets what a folder would, whoever stops, dies or comes second."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs
from sweep_helpers import Doing, Listener, order, rows_of, wait_until
from typer.testing import CliRunner

from blip_trace import Tracer, load_run
from blip_trace.cli import app
from blip_trace.sweep import bucket
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import make_executor
from blip_trace.sweep.plan import Plan
from blip_trace.sweep.store import LOCK, SUCCESS, Busy, Store, open_store, receipt_name, shard_name
from blip_trace.sweep.verify import examine

pytest_plugins = ("sweep_fixtures",)

pytestmark = pytest.mark.usefixtures("hang_guard")


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 on this machine, with one bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = pytest.MonkeyPatch()
    given.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        given.setenv(name, "testing")
    given.setenv("AWS_DEFAULT_REGION", "us-east-1")
    given.setenv("AWS_EC2_METADATA_DISABLED", "true")
    made, name = fs.FileSystem.from_uri("s3://runs?allow_bucket_creation=true")
    made.create_dir(name)
    yield f"http://{host}:{port}"
    server.stop()
    given.undo()


@pytest.fixture(params=["s3", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet: in a bucket that pyarrow reaches, and in a store that only fsspec knows."""
    if request.param == "s3":
        request.getfixturevalue("s3")
    return f"{request.param}://runs/{tmp_path.name}"


@pytest.fixture
def in_s3(s3: str, tmp_path: Path) -> str:
    return f"s3://runs/{tmp_path.name}"


@pytest.fixture(autouse=True)
def _settled_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "SETTLE_SECONDS", 0.5)


def assert_same_files(place: str, oracle: Path) -> None:
    """A run is complete, and its shards are byte for byte those in a folder."""
    store = open_store(place)
    found = examine(store, Plan.load(store), deep=True, repair=False)
    assert found.complete, (found.open, found.wrong)
    assert store.has(SUCCESS)
    for path in sorted((oracle / "shards").iterdir()):
        assert store.read(f"shards/{path.name}") == path.read_bytes(), path.name
    assert not store.has(LOCK)
    assert not store.names(".computing")


def written(place: str) -> dict[str, object]:
    """When each shard was written."""
    store = open_store(place)
    assert isinstance(store, bucket.Bucket)
    infos = store._files.get_file_info(fs.FileSelector(store._path("shards"), allow_not_found=True))
    return {info.base_name: info.mtime for info in infos}


# The same run


def test_a_run(place: str, tmp_path: Path, cheap: Tracer) -> None:
    """Stopped, gone on with, damaged and mended, it is what a folder would hold, and reads as that."""
    given = order("vqa")
    sweep(given, tmp_path / "folder")
    assert sweep(given, place, Doing(make_executor("local", None), stop_after=2)).stopped
    assert not open_store(place).has(SUCCESS)
    doing = Doing(make_executor("local", None))
    assert sweep(None, place, doing).complete
    assert len(doing.done) == len(Plan.load(open_store(place)).shards) - 2
    assert_same_files(place, tmp_path / "folder")

    store = open_store(place)
    store.write(shard_name(1), store.read(shard_name(1))[:-1])
    store.remove(shard_name(2))
    store.remove(receipt_name(0))
    doing = Doing(make_executor("local", None))
    assert sweep(given, place, doing).complete
    assert sorted(doing.done) == [1, 2]
    assert_same_files(place, tmp_path / "folder")

    assert rows_of(place) == rows_of(tmp_path / "folder")
    here, there = load_run(place), load_run(tmp_path / "folder")
    assert here.complete
    assert here.counts() == there.counts()
    assert here.table().equals(there.table())


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_other_processes(executor: str, in_s3: str, tmp_path: Path, tiny_folder: Path) -> None:
    """They reach the bucket by themselves, and write the same bytes."""
    given = order(tiny_folder, "scenes:2")
    sweep(given, tmp_path / "folder", threads=1)
    assert sweep(given, in_s3, make_executor(executor, 2), threads=1).complete
    assert_same_files(in_s3, tmp_path / "folder")


def test_killed(in_s3: str, tmp_path: Path, tiny_folder: Path) -> None:
    """A command that was killed leaves a lease, and on its machine the next one sees that nobody holds it."""
    given = order(tiny_folder, shard_size=1)
    sweep(given, tmp_path / "folder", threads=1)
    command = [sys.executable, "-m", "blip_trace", "sweep", "--data", "scenes:4", "--model", str(tiny_folder)]
    command += ["--samples", "1", "--shard-size", "1", "--threads", "1", "--out", in_s3]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(written(in_s3)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    assert open_store(in_s3).owner() == f"process {process.pid} on {socket.gethostname()}"
    process.kill()
    process.wait()
    store = open_store(in_s3)
    assert store.has(LOCK)
    assert store.owner() is None
    done = {name: at for name, at in written(in_s3).items() if store.has(f"receipts/{Path(name).stem}.json")}
    assert 0 < len(done) < 20
    assert sweep(given, in_s3, threads=1).complete
    assert done.items() <= written(in_s3).items()
    assert_same_files(in_s3, tmp_path / "folder")


# One at a time


def lease(store: Store, age: float, host: str = "elsewhere", process: int = 1) -> None:
    """Somebody has said so many seconds ago that they write."""
    store.write_json(LOCK, {"token": "theirs", "host": host, "process": process, "at": time.time() - age})


def test_two_drivers(place: str, cheap: Tracer) -> None:
    """The second is told who was first, wherever that is, unless it has not been heard of for long."""
    given, store = order("vqa"), open_store(place)
    with (
        store.lock(),
        pytest.raises(Busy, match=rf"^{place} is being written by process \d+ on .*wait for it"),
    ):
        sweep(given, place)
    assert not store.has(LOCK)
    lease(store, age=bucket.LEASE_SECONDS - 5)
    with pytest.raises(Busy, match=r"is being written by process 1 on elsewhere: wait for it, or stop it$"):
        sweep(given, place)
    assert store.owner() == "process 1 on elsewhere"
    for gone in (
        dict(age=bucket.LEASE_SECONDS + 5),
        dict(age=0, host=socket.gethostname(), process=2**22 + 1),
    ):
        lease(store, **gone)
        assert store.owner() is None
        assert sweep(given, place).complete
        assert not store.has(LOCK)


def test_at_the_same_time(place: str) -> None:
    """Of several that come at once, one gets the run at most."""
    inside, most, refused = [], [], []
    start = threading.Barrier(4)

    def come() -> None:
        start.wait()
        try:
            with open_store(place).lock():
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.3)
                inside.pop()
        except Busy:
            refused.append(1)

    threads = [threading.Thread(target=come) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) <= 1  # on a machine that is busy all may be too slow
    assert len(refused) == 4 - len(most)


def test_somebody_slow(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes too long between looking and writing does not get in beside another, who keeps the run."""
    monkeypatch.setattr(bucket, "RENEW_SECONDS", 0.05)
    renew, fast = bucket.Bucket._renew, open_store(place)

    def late(own: bucket.Bucket) -> None:
        if own is not fast:
            monkeypatch.setattr(bucket.Bucket, "_renew", renew)
            started.enter_context(fast.lock())
        renew(own)

    with ExitStack() as started:
        monkeypatch.setattr(bucket.Bucket, "_renew", late)
        with (
            pytest.raises(Busy, match=r"answers too slowly to be locked: try again$"),
            open_store(place).lock(),
        ):
            pass
        wait_until(lambda: fast.has(LOCK))
        fast.write("plan.json", b"still mine")


def test_somebody_who_withdraws(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their lease is no reason to give the run up; as long as it is there nothing is written."""
    monkeypatch.setattr(bucket, "RENEW_SECONDS", 0.02)
    store, other = open_store(place), open_store(place)
    assert isinstance(store, bucket.Bucket)
    with store.lock(), ThreadPoolExecutor(1) as thread:
        monkeypatch.setattr(bucket, "SETTLE_SECONDS", 2.0)

        def noticed() -> bool:
            lease(other, age=0)  # again, for it may be overwritten as the other one is renewed
            time.sleep(0.05)
            return not store._certain.is_set()

        wait_until(noticed)
        writing = thread.submit(store.write, "plan.json", b"still mine")
        time.sleep(0.1)
        assert not other.has("plan.json")
        other.remove(LOCK)
        writing.result(timeout=50)
        wait_until(lambda: (found := store._lease()) is not None and found["token"] == store._token)
    assert other.read("plan.json") == b"still mine"
    assert not other.has(LOCK)


def test_taken_over(place: str, cheap: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was not heard of for long enough that somebody else went on writes nothing any more."""
    monkeypatch.setattr(bucket, "RENEW_SECONDS", 0.02)
    store = open_store(place)

    def slow(samples: int) -> None:
        for _ in range(5 if samples == 1 else 0):  # one alone may be overwritten as it is renewed
            lease(open_store(place), age=0)
            time.sleep(0.1)

    with pytest.raises(Busy, match="was taken over by process 1 on elsewhere, for it had heard nothing"):
        sweep(order("vqa"), place, reporter=Listener(slow))
    assert not store.has(SUCCESS)
    assert store.owner() == "process 1 on elsewhere"


def test_a_lease_is_renewed(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "RENEW_SECONDS", 0.02)
    store = open_store(place)
    assert isinstance(store, bucket.Bucket)
    with store.lock():
        begun = time.time()
        # fsspec's memory shows objects that are being written: no lease can be read then
        wait_until(lambda: (lease := store._lease()) is not None and lease["at"] > begun + 0.1)


def test_a_strange_lease(place: str) -> None:
    """What is no lease keeps nobody from anything."""
    store = open_store(place)
    for strange in (b"", b"{}", b"[1]", b'{"token": 1, "at": "x", "host": "a", "process": 3}', b"\xff"):
        store.write(LOCK, strange)
        assert store.owner() is None
        with store.lock():
            pass


# Objects


def leave_early(store: Store, error: BaseException) -> None:
    with store.writing("plan.json") as file:
        file.write(b"half")
        raise error


def test_objects_are_whole(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left early is as it was before; what is larger than a chunk arrives."""
    store = open_store(place)
    with pytest.raises(RuntimeError):
        leave_early(store, RuntimeError())
    assert not store.has("plan.json")
    monkeypatch.setattr(bucket, "CHUNK_BYTES", 1000)
    store.write("plan.json", bytes(range(256)) * 10)
    assert store.read("plan.json") == bytes(range(256)) * 10
    with pytest.raises(KeyboardInterrupt):
        leave_early(store, KeyboardInterrupt())
    assert store.read("plan.json") == bytes(range(256)) * 10


def test_absent_objects(place: str) -> None:
    store = open_store(place)
    assert store.names("shards") == store.leftovers() == []
    assert store.sha256("plan.json") is None
    assert not store.has("plan.json")
    store.remove("plan.json")
    store.drop_folder(".computing")
    for read in (store.read, store.read_json):
        with pytest.raises(FileNotFoundError):
            read("plan.json")
    with pytest.raises(FileNotFoundError, match=rf"^{place} holds no run: there is no plan.json in it$"):
        sweep(None, place)
    with pytest.raises(FileNotFoundError, match=rf"^{place} is no run: it holds no plan.json$"):
        load_run(place)


# What is said


def test_addresses(tmp_path: Path) -> None:
    """Nothing secret is shown; a folder is a folder however it is written."""
    secret = open_store("s3://key:secret@runs/a/b/?endpoint_override=localhost:1")
    assert str(secret) == "s3://runs/a/b"
    assert str(secret.file("plan.json")) == "s3://runs/a/b/plan.json"
    assert "key:secret" in secret.address
    for place in (tmp_path, str(tmp_path), f"file://{tmp_path}"):
        assert str(open_store(place)) == open_store(place).address == str(tmp_path)
    with pytest.raises(ValueError, match=r"^the path 'r\\udcffn' is no UTF-8, as which Parquet files are"):
        open_store("r\udcffn")
    with pytest.raises(
        ValueError, match=r"^odd://runs: neither pyarrow nor fsspec knows such storage; give a"
    ):
        open_store("odd://runs")
    with pytest.raises(ValueError, match=r"^s3:// names no bucket$"):
        open_store("s3://")


def test_no_bucket(s3: str, cheap: Tracer) -> None:
    with pytest.raises(OSError, match="The specified bucket does not exist"):
        sweep(order("vqa"), "s3://elsewhere/run")


def test_commands(in_s3: str, tmp_path: Path, tiny_folder: Path) -> None:
    """Every command takes an address; a report is a folder of this machine's and has to be named."""

    def run(*words: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, [*words])
        assert done.exit_code == code, done.output
        return " ".join(done.output.split())

    run("sweep", "--data", "scenes:2", "--model", str(tiny_folder), "--samples", "1", "--out", in_s3)
    assert "10 of 10 done" in run("status", in_s3)
    assert "all as they were written: 10 ok" in run("verify", in_s3)
    run("export", in_s3, "--to", str(tmp_path / "cells.csv"))
    said = run("report", in_s3, code=2)
    assert f"{in_s3} is no folder: say where the report is to be written, with --out DIR" in said
    run("report", in_s3, "--out", str(tmp_path / "report"))
    assert (tmp_path / "report" / "index.html").is_file()
    assert json.loads(open_store(in_s3).read(SUCCESS))["samples"] == 10
