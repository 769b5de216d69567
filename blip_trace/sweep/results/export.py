"""A run's results as one file for other programs: long or wide Parquet, CSV, zarr, netCDF."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow import csv

from ...sites import HEAD_KINDS
from ..parquet import ROW_GROUP, writer
from .profiles import CHUNK, decode, floats, indirect_effect, of_tokens

if TYPE_CHECKING:
    from .run import Run

LONG = pa.schema(
    {
        "sample_id": pa.string(),
        "stack": pa.string(),
        "kind": pa.string(),
        "metric": pa.string(),
        "head": pa.int32(),
        "token_index": pa.int32(),
        "token": pa.string(),
        "role": pa.string(),
        "layer": pa.int32(),
        "restored": pa.float32(),
        "se": pa.float32(),
        "effect": pa.float32(),
    }
)
"""A row for each cell of each map. head: null for kinds without heads. token_index: its place in the stack.
restored: the metric with that state restored, mean over samples of the noise, se its standard error (null
where there was one). effect: the indirect effect."""

ENDINGS = {".parquet": "long", ".csv": "csv", ".zarr": "zarr", ".nc": "netcdf"}


def export(run: Run, path: str | Path, format: str | None = None) -> None:
    """Write a run's results as one file, whole or not at all; rows without maps only in the wide format.

    format: "long" (Parquet, a row for each cell: see `LONG`), "csv" (the same as text), "wide" (Parquet, a
    row for each sample, as the run holds them), "zarr" or "netcdf" (see `labelled.to_xarray`); None: by the
    ending, .parquet for long. Parquet and CSV are written piece by piece, the others hold all maps in memory.

    Raises ValueError for another format or ending, a broken run and a package that is not installed,
    FileExistsError for a folder in the way, and OSError where the file cannot be written.
    """
    path = Path(path)
    if format is None:
        format = ENDINGS.get(path.suffix.lower())
        if format is None:
            raise ValueError(
                f"cannot export to {path.name!r}: end it in {', '.join(ENDINGS)}, or name a format"
            )
    if format not in _WRITERS:
        raise ValueError(f"unknown format {format!r}: choose among {', '.join(_WRITERS)}")
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder that exists already")
    with _part(path) as part:
        _WRITERS[format](run, part)


def long_tables(run: Run) -> Iterator[pa.Table]:
    """All cells of a run's maps, of some samples at a time, with the columns of `LONG`."""
    for stack, kind in run.maps():
        for metric in run.layout.metrics:
            name = run.layout.map_column(stack, kind, metric)
            columns = ["sample_id", name, *(f"{stack}_{what}" for what in ("tokens", "roles", "positions"))]
            columns += [f"{metric}_low", f"{metric}_high"] + [f"{name}_se"] * run.layout.spread
            for group in run.groups(columns):
                for start in range(0, len(group), CHUNK):
                    table = group.slice(start, CHUNK).combine_chunks()
                    yield _long(run, table, stack, kind, metric)


def _long(run: Run, table: pa.Table, stack: str, kind: str, metric: str) -> pa.Table:
    name = run.layout.map_column(stack, kind, metric)
    values, lengths = decode(table[name], kind in HEAD_KINDS)
    tokens, heads, layers = values.shape
    sample = np.repeat(np.arange(len(table)), lengths.clip(min=0))
    scores = (floats(table[f"{metric}_{end}"])[sample, None, None] for end in ("high", "low"))
    effects = indirect_effect(run.layout, values, *scores)
    each = pa.array(np.repeat(np.arange(tokens), heads * layers))

    def by_token(array: pa.Array) -> pa.Array:
        return array.take(each)

    cells = len(each)
    parts = {
        "sample_id": by_token(table["sample_id"].combine_chunks().take(pa.array(sample))),
        "stack": pa.repeat(stack, cells),
        "kind": pa.repeat(kind, cells),
        "metric": pa.repeat(metric, cells),
        "head": _counted(heads, layers, cells) if kind in HEAD_KINDS else pa.nulls(cells, pa.int32()),
        "token_index": by_token(of_tokens(table[f"{stack}_positions"], lengths)),
        "token": by_token(of_tokens(table[f"{stack}_tokens"], lengths)),
        "role": by_token(of_tokens(table[f"{stack}_roles"], lengths)),
        "layer": _counted(layers, 1, cells),
        "restored": pa.array(values.ravel(), pa.float32()),
        "se": pa.nulls(cells, pa.float32()),
        "effect": pa.array(effects.ravel(), pa.float32()),
    }
    if run.layout.spread:
        errors = decode(table[f"{name}_se"], kind in HEAD_KINDS).values
        parts["se"] = pa.array(errors.ravel(), pa.float32())
    return pa.table(parts, schema=LONG)


def _counted(count: int, each: int, cells: int) -> pa.Array:
    """0 to `count`, every number `each` times, over and over."""
    return pa.array(np.arange(cells) // each % count, pa.int32())


def _write_long(run: Run, path: Path) -> None:
    with writer(path, LONG, repeating=("head", "token_index", "layer")) as file:
        for table in long_tables(run):
            file.write_table(table)


def _write_wide(run: Run, path: Path) -> None:
    with writer(path, run.columns) as file:
        for table in run.groups():
            file.write_table(table, row_group_size=ROW_GROUP)


def _write_csv(run: Run, path: Path) -> None:
    with csv.CSVWriter(path, LONG) as writer:
        for table in long_tables(run):
            writer.write_table(table)


def _write_zarr(run: Run, path: Path) -> None:
    from .labelled import to_xarray, wanted

    wanted("zarr")
    to_xarray(run).to_zarr(path, mode="w", zarr_format=2)  # 3 has no strings that other programs read


def _write_netcdf(run: Run, path: Path) -> None:
    from .labelled import to_xarray, wanted

    wanted("netCDF4")
    to_xarray(run).to_netcdf(path, engine="netcdf4")


_WRITERS: dict[str, Callable[[Run, Path], None]] = {
    "long": _write_long,
    "wide": _write_wide,
    "csv": _write_csv,
    "zarr": _write_zarr,
    "netcdf": _write_netcdf,
}
FORMATS = tuple(_WRITERS)


@contextmanager
def _part(path: Path) -> Iterator[Path]:
    """A place beside `path` for what is not whole yet, a file or a folder; moved there in the end."""
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        part.unlink(missing_ok=True)
