"""Rows of Parquet files, without the images that they hold: those become references to their cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..media import binary_leaves, metadata_of
from ..parquet import BROKEN, open_file
from .rows import Row

BATCH = 1024
BYTES = ("BYTE_ARRAY", "NONE")
"""What Parquet calls a column of bytes that are no text."""


def columns_of(path: Path) -> list[str]:
    """The names of a Parquet file's columns. Raises ValueError for a broken file, or for a name twice."""
    names: list[str] = metadata_of(path).schema.to_arrow_schema().names
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} has two columns {name!r}")
    return names


def binary_columns(path: Path) -> set[str]:
    """The names of the columns that hold bytes, as of image files."""
    return set(binary_leaves(metadata_of(path)))


def parquet_rows(path: Path, reference: str) -> Iterator[Row]:
    """A file's rows. A cell that holds an image file is a reference to itself in the file `reference`; one
    that names one, as Hugging Face's structs may, is that name. Of what is broken, each row is bad."""
    metadata = metadata_of(path)
    leaves = binary_leaves(metadata)
    every = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    columns = [leaf.path for leaf in every if (leaf.physical_type, leaf.logical_type.type) != BYTES]
    number = 0
    with open_file(path) as file:
        for group in range(metadata.num_row_groups):
            end = number + metadata.row_group(group).num_rows
            try:
                held = {name: _present(file, group, leaf) for name, leaf in leaves.items()}
                start = number
                for batch in file.iter_batches(BATCH, row_groups=[group], columns=columns):
                    for cells, problem in _cells(batch):
                        for name, present in held.items():
                            if present is True or (present and present[number - start]):
                                cells[name] = f"{reference}#{name}/{number}"
                            elif isinstance(cells.get(name), dict):
                                cells[name] = cells[name].get("path")
                        yield Row(f"{path.name} row {number}", cells, problem)
                        number += 1
            except BROKEN as error:
                reason = f"its part of the file is broken: {' '.join(str(error).split())[:200]}"
                while number < end:
                    yield Row(f"{path.name} row {number}", {}, reason)
                    number += 1


def _cells(batch: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows as dicts, and what is wrong with them."""
    try:
        for cells in batch.to_pylist():
            yield cells, ""
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield batch.slice(row, 1).to_pylist()[0], ""
            except UnicodeDecodeError:
                yield {}, "it is not UTF-8"


def _present(file: pq.ParquetFile, group: int, leaf: int) -> bool | list[bool]:
    """Which rows of a group have an image: all, none, or as listed. The images are read only where the file's
    statistics do not tell."""
    column = file.metadata.row_group(group).column(leaf)
    statistics = column.statistics
    if statistics is not None and statistics.has_null_count:
        if statistics.null_count == 0:
            return True
        if statistics.null_count == column.num_values:
            return False
    path = file.metadata.schema.column(leaf).path
    present: list[bool] = []
    for batch in file.iter_batches(BATCH // 16, row_groups=[group], columns=[path]):
        values = batch.column(0)
        if pa.types.is_struct(values.type):
            values = values.flatten()[0]  # null where the struct is
        present += values.is_valid().to_pylist()
    return present
