"""Rows of CSV, TSV, JSON Lines and line-aligned text files: bad ones are told, and the reading goes on."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_LINE = 2**24
"""Characters of a line that are read; the rest of it is not held."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class Row(NamedTuple):
    """A row: the file and line or row it stands in, its cells, and what is wrong with it, or ""."""

    where: str
    cells: Mapping[str, Any]
    problem: str = ""


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends. What is not UTF-8 becomes lone surrogates, which no text
    has, so that it is known for what it is (`make_sample`)."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        while line := file.readline(MAX_LINE):
            yield line
            while len(line) == MAX_LINE and not line.endswith(("\n", "\r")):
                line = file.readline(MAX_LINE)


def header(path: Path) -> list[str]:
    """The names of a CSV or TSV file's columns. Raises ValueError where there are none, or one twice."""
    try:
        names = [name.strip() for name in next(csv.reader(text_lines(path), delimiter=_delimiter(path)), [])]
    except csv.Error as error:
        raise ValueError(f"{path} has no header: {error}") from error
    if not names:
        raise ValueError(f"{path} is empty")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{path} has two columns {name!r}")
    return names


def has_columns(path: Path, names: Sequence[str]) -> bool:
    """Whether a path is a CSV or TSV file with these columns, and perhaps others."""
    if path.suffix.lower() not in DELIMITERS:
        return False
    try:
        return set(names) <= set(header(path))
    except (ValueError, OSError):
        return False


def tables_with(path: Path, names: Sequence[str]) -> list[Path]:
    """The file that a path is, or those in the folder that it is, which have these columns."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if has_columns(file, names)]


def csv_rows(path: Path) -> Iterator[Row]:
    """The rows of a CSV or TSV file. Where a quote is never closed, only the line it opens in is bad."""
    names = header(path)
    lines = _Lines(text_lines(path))
    reader = csv.reader(lines, delimiter=_delimiter(path), strict=True)
    next(reader)
    while True:
        lines.begin_record()
        where = f"{path.name} line {lines.number + 1}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            lines.give_back()
            yield Row(where, {}, f"it is no CSV: {error}")
            continue
        if values is None:
            return
        if len(values) == len(names):
            yield Row(where, dict(zip(names, values, strict=True)))
        elif values:
            lines.give_back()
            yield Row(where, {}, f"it has {len(values)} columns, the header {len(names)}")


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSON Lines file, an object each."""
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            cells = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Row(where, {}, f"it is no JSON: {' '.join(str(error).split())[:200]}")
            continue
        if isinstance(cells, dict):
            yield Row(where, cells)
        else:
            yield Row(where, {}, "it is no JSON object")


def text(value: object) -> str:
    """A cell as text: "" for what is missing (null, NaN), JSON for what is nested."""
    if value is None or value != value:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


class _Lines:
    """Lines for a reader of records that may take several: those after a bad record's first can be read
    again, as records of their own."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._again: deque[str] = deque()
        self._record: list[str] = []
        self.number = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self._record.append(line)
        self.number += 1
        return line

    def begin_record(self) -> None:
        self._record = []

    def give_back(self) -> None:
        rest = self._record[1:]
        self._again.extendleft(reversed(rest))
        self.number -= len(rest)


def _delimiter(path: Path) -> str:
    return DELIMITERS.get(path.suffix.lower(), ",")
