"""What is exported of a run is what it holds, and other programs read it."""

from __future__ import annotations

import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import typer
from sweep_runs import LAYOUT, Row, make_rows, write_run
from typer.testing import CliRunner

from blip_trace import cli_results
from blip_trace.sweep.results import Run, labelled, load_run
from blip_trace.sweep.results.export import FORMATS, LONG, export

pytest_plugins = ("sweep_run_fixtures",)

TEXT = "text_encoder"
COLUMN = "text_encoder_hidden_probability"


def long_by_hand(rows: list[Row]) -> dict[tuple[Any, ...], tuple[str, str, float, float]]:
    """By sample, stack, kind, metric, head, token and layer: token, role, restored, effect."""
    cells = {}
    for row in rows:
        for stack in LAYOUT.stacks:
            for kind in LAYOUT.kinds:
                for metric in LAYOUT.metrics:
                    values = row.get(LAYOUT.map_column(stack.name, kind, metric))
                    if values is None:
                        continue
                    restored = np.float32(values)
                    for place in np.ndindex(restored.shape):
                        *head, token, layer = place
                        key = (row["sample_id"], stack.name, kind, metric, head[0] if head else None,
                               token, layer)  # fmt: skip
                        texts = (row[f"{stack.name}_{what}"][token] for what in ("tokens", "roles"))
                        value = float(restored[place])
                        cells[key] = (*texts, value, value - float(np.float32(row[f"{metric}_low"])))
    return cells


@pytest.mark.parametrize("ending", ["parquet", "csv"])
def test_long_exports_hold_every_cell(rows: list[Row], tmp_path: Path, ending: str) -> None:
    """And are read by other programs."""
    run = load_run(write_run(tmp_path / "run", rows[:40], (15,)))
    path = tmp_path / f"cells.{ending}"
    export(run, path)
    frame = pd.read_parquet(path) if ending == "parquet" else pd.read_csv(path, keep_default_na=False)
    assert list(frame.columns) == LONG.names
    cells = long_by_hand(rows[:40])
    assert len(frame) == len(cells) > 1000
    found = {}
    for one in frame.itertuples():
        head = None if one.head == "" or pd.isna(one.head) else int(one.head)
        key = (one.sample_id, one.stack, one.kind, one.metric, head, one.token_index, one.layer)
        restored, effect = (float("nan" if v == "" else v) for v in (one.restored, one.effect))
        found[key] = (one.token, one.role, restored, effect)
        assert float(one.se) == pytest.approx(0.02)
    assert found.keys() == cells.keys()
    for key, (token, role, restored, effect) in cells.items():
        assert found[key][:2] == (token, role)
        assert found[key][2:] == pytest.approx((restored, effect), abs=1e-6, nan_ok=True)

    other = pl.read_parquet(path) if ending == "parquet" else pl.read_csv(path, infer_schema_length=None)
    assert len(other) == len(cells)
    reader = f"read_{'parquet' if ending == 'parquet' else 'csv'}"
    (counted,) = duckdb.sql(f"SELECT count(*), count(head) FROM {reader}('{path}')").fetchall()
    assert counted == (len(cells), sum(key[4] is not None for key in cells))
    assert [file.name for file in tmp_path.iterdir() if ".part" in file.name] == []


def test_without_standard_errors_the_column_is_empty(tmp_path: Path) -> None:
    layout = replace(LAYOUT, spread=False)
    run = load_run(write_run(tmp_path / "run", make_rows(10, layout), (), layout))
    assert run.map("q000000", TEXT, "hidden").standard_error is None
    export(run, tmp_path / "cells.parquet")
    assert pq.read_table(tmp_path / "cells.parquet")["se"].null_count > 100


def test_the_wide_export_is_the_run_in_one_file(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "wide.parquet"
    export(run, path, "wide")
    assert repr(pq.read_table(path).to_pylist()) == repr(run.table().to_pylist())
    assert pq.read_schema(path).names == run.columns.names
    assert pq.read_schema(path).metadata == run.columns.metadata
    size = sum(Path(str(shard)).stat().st_size for shard in run.shards)
    assert path.stat().st_size < 1.1 * size
    frame = pd.read_parquet(path, columns=["sample_id", COLUMN])
    assert len(frame) == 240
    assert len(pl.read_parquet(path, columns=["sample_id", COLUMN])) == 240
    cells = f"SELECT unnest({COLUMN}, recursive := true) AS cell FROM '{path}' WHERE status = 'ok'"
    ((mean,),) = duckdb.sql(f"SELECT avg(cell) FROM ({cells})").fetchall()
    expected = np.concatenate([np.array(row[COLUMN]).ravel() for row in run.rows([COLUMN], status="ok")])
    assert mean == pytest.approx(expected.mean(), rel=1e-6)


def test_shards_open_elsewhere(folder: Path, rows: list[Row], tmp_path: Path) -> None:
    """The run's own files, as they lie there: pandas, polars, DuckDB, Hugging Face datasets."""
    pattern = str(folder / "shards" / "*.parquet")
    expected = {row["sample_id"] for row in rows}
    first = next(row for row in rows if row["status"] == "ok")
    (where,) = (place for place, row in enumerate(rows) if row is first)

    assert set(pd.read_parquet(folder / "shards")["sample_id"]) == expected
    assert set(pl.read_parquet(pattern)["sample_id"]) == expected
    counted = duckdb.sql(f"SELECT count(DISTINCT sample_id) FROM '{pattern}'").fetchall()
    assert counted == [(len(expected),)]
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path))
    assert set(loaded["sample_id"]) == expected
    assert np.array_equal(np.float32(loaded[where][COLUMN]), np.float32(first[COLUMN]))


@pytest.mark.parametrize(("ending", "package"), [("zarr", "zarr"), ("nc", "netCDF4")])
def test_labelled_arrays(run: Run, rows: list[Row], tmp_path: Path, ending: str, package: str) -> None:
    """Where the packages are installed, which nothing else needs; otherwise the error says which."""
    path = tmp_path / f"maps.{ending}"
    missing = [name for name in ("xarray", package) if not labelled.is_installed(name)]
    if missing:
        with pytest.raises(ValueError, match="pip install " + "|".join(missing)):
            export(run, path)
        assert not path.exists()
        return
    import xarray as xr

    export(run, path)
    data = xr.open_zarr(path) if ending == "zarr" else xr.open_dataset(path)
    with data:
        for row in rows[:30]:
            own = data.sel(sample=row["sample_id"])
            tokens = row.get(f"{TEXT}_tokens", ())
            length = int(own["text_encoder_length"])
            assert length == len(tokens)
            assert tuple(own["text_encoder_tokens"].values[:length]) == tuple(tokens)
            assert set(own["text_encoder_roles"].values[length:]) <= {""}
            assert np.isnan(own[COLUMN].values[length:]).all()
            assert str(own["question"].values) == row["question"]
            if length:
                assert np.array_equal(own[COLUMN][:length], np.float32(row[COLUMN]), equal_nan=True)
                heads = own["text_encoder_cross_attn_head_logit"]
                assert heads.dims == ("head", "text_encoder_token", "text_encoder_layer")
                expected = np.float32(row["text_encoder_cross_attn_head_logit"])
                assert np.array_equal(heads[:, :length], expected, equal_nan=True)
    with pytest.raises(FileExistsError) if ending == "zarr" else nullcontext():
        export(run, path)


def test_a_missing_package_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "is_installed", lambda package: False)
    with pytest.raises(ValueError, match="takes the package zarr: pip install zarr"):
        export(run, tmp_path / "maps.zarr")


def command(*arguments: object) -> tuple[int, str]:
    app = typer.Typer()
    cli_results.register(app)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


def test_the_command(folder: Path, tmp_path: Path) -> None:
    code, output = command("export", folder, "--to", tmp_path / "cells.csv")
    assert code == 0
    assert "cells.csv" in output
    assert (tmp_path / "cells.csv").stat().st_size > 10_000
    for wrong, match in (
        ((tmp_path, "--to", tmp_path / "x.csv"), "is no run"),
        ((folder, "--to", tmp_path / "x.txt"), r"end it in \.parquet"),
        ((folder, "--to", tmp_path / "x.txt", "--format", "text"), f"among {', '.join(FORMATS)}"),
        ((folder, "--to", tmp_path), "cannot export|is a folder"),
        ((folder, "--to", tmp_path / "no" / "x.csv"), "No such file"),
    ):
        code, output = command("export", *wrong)
        assert code == 2
        assert len(output.strip().splitlines()) == 1
        assert re.search(match, output)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.csv"]
