"""Parquet as the sweep writes and reads it: checksums on every page, floats split into streams of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from .store import Stored

ROW_GROUP = 2048
"""Rows at most; a reader holds one group in memory."""

BROKEN = (pa.ArrowException, OSError, ValueError)
"""What broken or hostile files raise."""


def writer(target: Path | BinaryIO, schema: pa.Schema, repeating: Sequence[str] = ()) -> pq.ParquetWriter:
    """Writes tables of this schema.

    Dictionaries make columns of floats larger than they are, so only strings have them, and `repeating`
    columns; splitting floats into streams of bytes before zstd makes them a quarter smaller.
    """
    leaves = list(_leaves(schema))
    return pq.ParquetWriter(
        target,
        schema,
        compression="zstd",
        use_dictionary=[*(path for path, kind in leaves if pa.types.is_string(kind)), *repeating],
        use_byte_stream_split=[path for path, kind in leaves if pa.types.is_floating(kind)],
        write_page_checksum=True,
    )


def encode(table: pa.Table) -> bytes:
    """A table as a Parquet file."""
    out = BytesIO()
    with writer(out, table.schema) as file:
        file.write_table(table, row_group_size=ROW_GROUP)
    return out.getvalue()


def open_file(file: Path | Stored) -> pq.ParquetFile:
    """A file whose pages are checked against their checksums as they are read. Raises `BROKEN`."""
    path, filesystem = (file.path, file.filesystem) if isinstance(file, Stored) else (file, None)
    return pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True, memory_map=False)


def read_groups(file: Stored, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """A file's row groups, one after another.

    Raises ValueError, naming the file, where it is broken, and FileNotFoundError where it is missing.
    """
    try:
        with open_file(file) as opened:
            for group in range(opened.num_row_groups):
                yield opened.read_row_group(group, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise
    except BROKEN as error:
        raise ValueError(f"{file} is broken: {' '.join(str(error).split())}") from error


def read_group(file: Stored, group: int) -> pa.Table:
    """One row group of a file. Raises as `read_groups`, and ValueError where there is no such group."""
    try:
        with open_file(file) as opened:
            if not 0 <= group < opened.num_row_groups:
                raise ValueError(f"it has no row group {group}")
            return opened.read_row_group(group)
    except FileNotFoundError:
        raise
    except BROKEN as error:
        raise ValueError(f"{file} is broken: {' '.join(str(error).split())}") from error


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Columns as Parquet counts them: the paths of what nested types hold, and its type."""
    for field in schema:
        yield from _leaf(field.name, field.type)


def _leaf(path: str, kind: Any) -> Iterator[tuple[str, pa.DataType]]:
    if pa.types.is_map(kind):
        yield f"{path}.key_value.key", kind.key_type
        yield f"{path}.key_value.value", kind.item_type
    elif pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _leaf(f"{path}.list.element", kind.value_type)
    else:
        yield path, kind
