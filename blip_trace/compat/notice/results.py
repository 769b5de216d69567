"""The rows of NOTICE's results, written without pickle."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ...files import write_whole
from ...sweep.parquet import encode, open_file

COLUMNS = (
    "scores",
    "low_score",
    "question",
    "correct_token",
    "incorrect_token",
    "block_name",
    "kind",
    "attn_head",
)
"""Of a result: scores [tokens, layers, 4] and low_score [4] as lists of lists, NaN as null in JSON."""
SCHEMA = pa.schema(
    [
        ("scores", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("low_score", pa.list_(pa.float32())),
        ("question", pa.string()),
        ("correct_token", pa.int64()),
        ("incorrect_token", pa.int64()),
        ("block_name", pa.string()),
        ("kind", pa.string()),
        ("attn_head", pa.int64()),
    ]
)
TENSORS = COLUMNS[:2]
MAX_CELL = 2**30
"""Characters of a cell of a CSV file: a map of many tokens, layers and metrics is longer than csv expects."""


def rows_name(
    task: str, mode: str, block_name: str, kind: str | None, rows: int, attn_head: int | None = None
) -> str:
    """The name that NOTICE gives a file of so many results, but for its ending: Parquet."""
    head = "" if attn_head is None else f"_head_{attn_head}"
    return f"BLIP_temp_list_{task}_{mode}_corruption_{block_name}_{kind}{head}_{rows}.parquet"


def save_rows(rows: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Write results as .parquet, .json or .csv, in which scores are JSON; whole or not at all.

    Raises ValueError for another ending, a pickle's among them, and OSError where the file cannot be written.
    """
    path = Path(path)
    suffix = _format(path)
    plain = [{name: row[name].tolist() if name in TENSORS else row[name] for name in COLUMNS} for row in rows]
    if suffix == ".parquet":
        data = encode(pa.Table.from_pylist(plain, schema=SCHEMA))
    elif suffix == ".json":
        data = json.dumps([_without_nan(row) for row in plain], ensure_ascii=False).encode()
    else:
        out = StringIO()
        writer = csv.DictWriter(out, COLUMNS)
        writer.writeheader()
        for row in plain:
            scores = {name: json.dumps(_without_nan(row[name])) for name in TENSORS}
            writer.writerow({**row, **scores})
        data = out.getvalue().encode()
    write_whole(path, data)


def load_rows(path: str | Path) -> list[dict[str, Any]]:
    """Read what `save_rows` wrote: results as `debug_hidden_flow` gives them.

    Raises ValueError for files of another kind, OSError where it cannot be read.
    """
    path = Path(path)
    suffix = _format(path)
    try:
        return [_result(row) for row in _read(path, suffix)]
    except OSError:
        raise
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} holds no results of NOTICE: {' '.join(str(error).split())}") from error


def _read(path: Path, suffix: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]]
    if suffix == ".parquet":
        with open_file(path) as file:
            rows = file.read(columns=list(COLUMNS)).to_pylist()
    elif suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = [
            {name: json.loads(cell) if name in TENSORS else cell for name, cell in row.items()}
            for row in _csv_rows(path)
        ]
    return rows


def _csv_rows(path: Path) -> list[dict[str, str]]:
    before = csv.field_size_limit(MAX_CELL)
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
            return list(reader)
    finally:
        csv.field_size_limit(before)


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    own = {name: row[name] if row[name] != "" else None for name in COLUMNS}
    for name in TENSORS:
        own[name] = torch.tensor(_with_nan(own[name]), dtype=torch.float32)
    for name in ("correct_token", "incorrect_token", "attn_head"):
        own[name] = None if row[name] in ("", None) else int(row[name])
    return own


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{path.name} would be a pickle, which can run code when it is read: end it in .parquet, .json "
            "or .csv"
        )
    if suffix not in (".parquet", ".json", ".csv"):
        raise ValueError(f"results are kept as .parquet, .json or .csv, not as {path.name}")
    return suffix


def _without_nan(value: Any) -> Any:
    """Plain values with null in the place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_nan(own) for name, own in value.items()}
    if isinstance(value, list):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _with_nan(value: Any) -> Any:
    """The same the other way round."""
    if isinstance(value, list):
        return [_with_nan(own) for own in value]
    return math.nan if value is None else value
