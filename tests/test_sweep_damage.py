"""Files of a run that are torn, lost or changed by a bit: it is noticed, and only their shard done again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from sweep_helpers import (
    Listener,
    again,
    assert_whole,
    damaged,
    files_of,
    receipt_file,
    rows_of,
    shard_file,
)

from blip_trace.sweep.driver import sweep
from blip_trace.sweep.plan import Plan
from blip_trace.sweep.planning import Order
from blip_trace.sweep.store import SUCCESS, open_store
from blip_trace.sweep.verify import examine

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

SHARDS = 3
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


@pytest.fixture
def run(oracle: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(oracle, tmp_path / "run"))


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
