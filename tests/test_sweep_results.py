"""What a run wrote is read as it is, and what is broken is told."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sweep_runs import HEADS, LAYERS, LAYOUT, Row, make_rows, write_run

from blip_trace.sweep.results import Run, load_run
from blip_trace.sweep.results.export import export

pytest_plugins = ("sweep_run_fixtures",)

TEXT = "text_encoder"
COLUMN = "text_encoder_hidden_probability"


def test_metadata_is_read_without_torch_and_pandas(folder: Path) -> None:
    code = (
        "import sys; from blip_trace.sweep.results import load_run;"
        f"run = load_run({str(folder)!r});"
        "assert not {'torch', 'pandas', 'matplotlib'} & set(sys.modules);"
        "run.aggregate('text_encoder', 'hidden', draws=10); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_run_says_of_itself(run: Run, rows: list[Row]) -> None:
    assert run.layout == LAYOUT
    assert run.planned == 240
    assert run.complete
    assert run.settings["corruption"] == {"kind": "noise", "samples": 10}
    counts = run.counts()
    assert list(counts) == ["ok", "filtered", "error", "not_finite"]
    assert counts == {status: sum(row["status"] == status for row in rows) for status in counts}
    assert min(counts.values()) > 5


def test_rows_come_in_order_and_by_status(run: Run, rows: list[Row]) -> None:
    read = list(run.rows())
    assert [row["sample_id"] for row in read] == [row["sample_id"] for row in rows]
    for one, written in zip(read, rows, strict=True):
        assert one["extra"] == written["extra"]
        assert one["correct"] is written["correct"]
        if written.get(COLUMN) is None:
            assert one[COLUMN] is None
        else:
            assert np.array_equal(one[COLUMN], np.float32(written[COLUMN]), equal_nan=True)
    some = list(run.rows(["question"], status=["error", "filtered"]))
    assert some == [{"question": row["question"]} for row in rows if row["status"] in ("error", "filtered")]
    assert len(list(run.rows(["status"], status="ok"))) == run.counts()["ok"]
    with pytest.raises(ValueError, match="unknown column 'nothing'"):
        next(run.rows(["nothing"]))
    with pytest.raises(ValueError, match="unknown status 'fine'"):
        next(run.rows(status="fine"))


def test_maps_of_one_sample(run: Run, rows: list[Row]) -> None:
    row = rows[80]  # of another file than the first
    found = run.map(row["sample_id"], TEXT, "hidden")
    assert np.array_equal(found.values, np.float32(row[COLUMN]))
    assert found.standard_error is not None
    assert np.allclose(found.standard_error, 0.02)
    assert found.tokens == row[f"{TEXT}_tokens"]
    assert found.roles == row[f"{TEXT}_roles"]
    assert found.positions == tuple(range(len(found.tokens)))
    heads = run.map(row["sample_id"], TEXT, "cross_attn_head", "logit")
    assert heads.values.shape == (HEADS, len(found.tokens), LAYERS)
    assert np.array_equal(heads.values, np.float32(row["text_encoder_cross_attn_head_logit"]))
    high, low = np.float32(row["probability_high"]), np.float32(row["probability_low"])
    effects = run.effects(row["sample_id"], TEXT, "hidden")
    assert np.allclose(effects.values, np.array(row[COLUMN]) - low, atol=1e-6)
    share = run.effects(row["sample_id"], TEXT, "hidden", normalized=True)
    assert np.allclose(share.values, effects.values / (high - low), atol=1e-6)
    assert share.standard_error is not None
    assert np.allclose(share.standard_error, 0.02 / (high - low), atol=1e-6)
    vanishing = next(row for row in rows if row["total_effect_vanishes"] and row["status"] == "ok")
    assert np.isnan(run.effects(vanishing["sample_id"], TEXT, "hidden", normalized=True).values).all()


def test_a_map_that_is_not_there(run: Run, rows: list[Row]) -> None:
    failed = next(row for row in rows if row["status"] == "error")
    with pytest.raises(KeyError, match="has no maps, it is 'error': image 1 cannot be decoded"):
        run.map(failed["sample_id"], TEXT, "hidden")
    with pytest.raises(KeyError, match="no sample 'nobody'"):
        run.map("nobody", TEXT, "hidden")
    for wrong in (("vision", "hidden"), (TEXT, "mlp"), (TEXT, "hidden", "rank")):
        with pytest.raises(ValueError, match=f"unknown .* '{wrong[-1] if len(wrong) == 3 else '.*'}'"):
            run.aggregate(*wrong)  # type: ignore[arg-type]


def test_a_run_without_traced_samples(rows: list[Row], tmp_path: Path) -> None:
    failed = [row for row in rows if row["status"] in ("error", "filtered")]
    run = load_run(write_run(tmp_path / "run", failed))
    average = run.aggregate(TEXT, "cross_attn_head", split="type").overall
    assert average.samples == 0
    assert average.mean.shape == (0, 1, LAYERS)
    assert sum(average.excluded.values()) == len(failed)
    export(run, tmp_path / "long.parquet")
    assert pq.read_metadata(tmp_path / "long.parquet").num_rows == 0


def test_noising_and_halves(rows: list[Row], tmp_path: Path) -> None:
    """Of direction "noise" an effect is what was taken away; maps may be stored as float16."""
    layout = replace(LAYOUT, direction="noise", store="float16")
    made = make_rows(60, layout)
    run = load_run(write_run(tmp_path / "run", made, (), layout))
    column = np.float16(made[0][COLUMN]).astype(np.float64)
    effects = run.effects("q000000", TEXT, "hidden").values
    assert np.allclose(effects, np.float32(made[0]["probability_high"]) - column, atol=1e-6)
    means = []
    for row in made:
        if row["status"] == "ok":
            which = np.array(row[f"{TEXT}_roles"]) == "content"
            values = np.float32(row["probability_high"]) - np.float64(np.float16(row[COLUMN]))
            means.append(values[which].mean(0))
    assert np.allclose(run.aggregate(TEXT, "hidden").layer_curve().mean, np.mean(means, 0), atol=1e-7)
    export(run, tmp_path / "long.parquet")
    first = pq.read_table(tmp_path / "long.parquet").slice(0, column.size)
    assert np.allclose(first["effect"].to_numpy(), effects.ravel(), atol=1e-6)
    export(run, tmp_path / "wide.parquet", "wide")
    read = pq.read_table(tmp_path / "wide.parquet")
    assert repr(read.to_pylist()) == repr(run.table().to_pylist())


def flip(path: Path, where: Callable[[pq.FileMetaData], int]) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[where(pq.read_metadata(path))] ^= 1
    path.write_bytes(data)


def middle(name: str) -> Callable[[pq.FileMetaData], int]:
    """A byte in the middle of a column's pages."""

    def where(metadata: pq.FileMetaData) -> int:
        group = metadata.row_group(0)
        column = next(group.column(n) for n in range(group.num_columns)
                      if group.column(n).path_in_schema.startswith(name + "."))  # fmt: skip
        return int(column.data_page_offset + column.total_compressed_size - 20)

    return where


def test_a_flipped_bit_is_told_with_the_file(rows: list[Row], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rows, (100,))
    flip(folder / "shards" / "000001.parquet", middle(COLUMN))
    run = load_run(folder)
    assert run.counts()["ok"]  # other columns are whole
    for read in (
        lambda: run.aggregate(TEXT, "hidden", draws=2),
        lambda: list(run.rows()),
        lambda: run.table([COLUMN]),
        lambda: run.map(rows[-1]["sample_id"], TEXT, "hidden"),
        lambda: export(run, tmp_path / "out.csv"),
        lambda: export(run, tmp_path / "out.parquet", "wide"),
    ):
        with pytest.raises(ValueError, match=r"000001\.parquet is broken"):
            read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]  # and nothing is left of exports


def test_broken_runs(rows: list[Row], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no run"):
        load_run(tmp_path)
    folder = write_run(tmp_path / "run", rows[:20], (10,))
    second = folder / "shards" / "000001.parquet"
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=r"000001\.parquet is broken"):
        load_run(folder).counts()
    stranger = replace(LAYOUT, run_id="another")
    table = pa.Table.from_pylist([], schema=stranger.schema())
    second.write_bytes(whole)
    other = write_run(tmp_path / "other", rows[:3], (), stranger)
    second.write_bytes((other / "shards" / "000000.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"000001\.parquet belongs to another run"):
        load_run(folder).counts()
    second.unlink()
    with pytest.raises(ValueError, match="complete with 2 files of results, but holds 1"):
        load_run(folder)
    (folder / "_SUCCESS").unlink()
    going_on = load_run(folder)
    assert not going_on.complete
    assert sum(going_on.counts().values()) == 10
    first = folder / "shards" / "000000.parquet"
    pq.write_table(table.replace_schema_metadata({}), first)
    with pytest.raises(ValueError, match=r"000000\.parquet is broken"):
        load_run(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match="no results yet"):
        load_run(folder)
    (folder / "plan.json").write_text('{"settings": 3}')
    with pytest.raises(ValueError, match=r"plan\.json is no plan"):
        load_run(folder)


def test_a_table_and_a_frame(run: Run, rows: list[Row]) -> None:
    assert run.table(["sample_id", "type"]).to_pylist() == [
        {"sample_id": row["sample_id"], "type": row["type"]} for row in rows
    ]
    frame = run.to_pandas(["sample_id", COLUMN, "extra"])
    assert np.array_equal(np.stack(frame[COLUMN][0]), np.float32(rows[0][COLUMN]))
    assert frame["extra"][1] == rows[1]["extra"]
