"""Tables in the normal form: CSV, TSV, JSON Lines and Parquet with an image and a question in each row."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sample import Sample
from .dataset import Asked, DataSet, Format, make_sample
from .parquet_rows import binary_columns, columns_of, parquet_rows
from .rows import DELIMITERS, Row, csv_rows, header, json_rows, text

ALIASES: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "sample_id", ""),
    "image": ("image", "image_path", "img", "file_name", "image_id"),
    "question": ("question",),
    "type": ("type", "question_type", "answer_type"),
    "corrupt_image": ("corrupt_image",),
    "corrupt_question": ("corrupt_question",),
    "foil": ("foil", "foil_answer"),
    "subject": ("subject",),
}
"""What columns may be called, in any case of letters; of several the first counts, the others are extra. An
unnamed column, as pandas writes its index, is an id."""
ANSWERS = ("multiple_choice_answer", "answer", "answers")
"""All that are there count, in this order: texts, lists, lists in JSON, or structs with an `answer`."""
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
PEEKED_ROWS = 100


@dataclass(frozen=True)
class TableFile:
    """A table: its file, its name relative to the root (None where it lies outside), and what comes before
    the relative names of images in it."""

    path: Path
    reference: str | None
    prefix: str = ""


def is_table(path: Path) -> bool:
    """Whether a file is of a kind that tables are kept in."""
    return path.is_file() and path.suffix.lower() in (*DELIMITERS, *JSON_LINES, *PARQUET)


def column_names(path: Path) -> list[str]:
    """A table's columns; of JSON Lines the first object's keys. Raises ValueError where there are none."""
    suffix = path.suffix.lower()
    if suffix in PARQUET:
        return columns_of(path)
    if suffix in JSON_LINES:
        for number, row in enumerate(json_rows(path)):
            if row.cells:
                return list(row.cells)
            if number == PEEKED_ROWS:
                break
        raise ValueError(f"{path} holds no JSON objects, one in each line")
    return header(path)


def check_table(file: TableFile) -> None:
    """Raises ValueError for a table without images or questions, or whose images cannot be referred to."""
    names = column_names(file.path)
    found = _Columns(names)
    for needed in ("image", "question"):
        if needed not in found.by_role:
            raise ValueError(
                f"{file.path} has no column {' or '.join(ALIASES[needed][:2])}; it has "
                f"{', '.join(map(repr, names[:20]))}"
            )
    if file.path.suffix.lower() not in PARQUET:
        return
    binary = binary_columns(file.path)
    if found.by_role["question"] in binary:
        raise ValueError(f"{file.path} holds bytes in its column {found.by_role['question']!r}, not text")
    images = {found.by_role.get("image"), found.by_role.get("corrupt_image")}
    if file.reference is None and images & binary:
        raise ValueError(f"{file.path} holds its images itself: leave out --images")


def table_samples(files: Iterable[TableFile]) -> Iterator[Sample]:
    """The samples of tables, one after another."""
    number = 0
    for file in files:
        columns: _Columns | None = None
        for row in _rows(file):
            if columns is None or columns.names != row.cells.keys():
                columns = _Columns(row.cells)
            yield _sample(row, columns, number, file.prefix)
            number += 1


def read_tables(name: str, asked: Asked, files: Sequence[TableFile], folder: Path) -> DataSet:
    """A data set of tables whose references are relative to a folder."""
    for file in files:
        check_table(file)
    return DataSet(name, str(asked.path), asked.media(folder), lambda: table_samples(files))


def relative(path: Path, folder: Path) -> str | None:
    """A path's name relative to a folder, None where it lies outside."""
    try:
        return path.absolute().relative_to(folder.absolute()).as_posix()
    except ValueError:
        return None


class _Columns:
    """Which column plays which role."""

    def __init__(self, names: Iterable[str]) -> None:
        given = {name.casefold(): name for name in reversed(list(names))}
        self.names = set(given.values())
        self.by_role = {
            role: next(given[alias] for alias in aliases if alias in given)
            for role, aliases in ALIASES.items()
            if any(alias in given for alias in aliases)
        }
        self.answers = [given[alias] for alias in ANSWERS if alias in given]
        used = {*self.by_role.values(), *self.answers}
        self.extra = [name for name in given.values() if name not in used]


def _rows(file: TableFile) -> Iterator[Row]:
    suffix = file.path.suffix.lower()
    if suffix in PARQUET:
        return parquet_rows(file.path, file.reference or file.path.name)
    return json_rows(file.path) if suffix in JSON_LINES else csv_rows(file.path)


def _sample(row: Row, columns: _Columns, number: int, prefix: str) -> Sample:
    cells = {role: text(_named(row.cells.get(name))) for role, name in columns.by_role.items()}
    image, corrupt_image = (_prefixed(cells.get(role, ""), prefix) for role in ("image", "corrupt_image"))
    return make_sample(
        row.where,
        cells.get("id", "").strip() or f"row-{number}",
        image,
        cells.get("question", ""),
        problem=row.problem,
        answers=[answer for name in columns.answers for answer in answers_in(row.cells.get(name))],
        type=cells.get("type", ""),
        corrupt_image=corrupt_image,
        corrupt_question=cells.get("corrupt_question"),
        foil=cells.get("foil"),
        subject=cells.get("subject"),
        extra={name: found for name in columns.extra if (found := text(row.cells.get(name)))},
    )


def answers_in(cell: object) -> list[str]:
    """The answers in a cell: one, a list, a list as JSON, or structs with an `answer`."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            parsed = json.loads(cell)
        except (ValueError, RecursionError):
            return [cell]
        return answers_in(parsed) if isinstance(parsed, list) else [cell]
    if isinstance(cell, list):
        return [text(_named(item, "answer")) for item in cell]
    return [text(_named(cell, "answer"))]


def _named(cell: Any, key: str = "path") -> Any:
    """What a struct holds under a key; any other cell as it is."""
    return cell.get(key) if isinstance(cell, Mapping) else cell


def _prefixed(name: str, prefix: str) -> str:
    """A relative file name below a folder; other references as they are."""
    plain = prefix and name and ":" not in name and "#" not in name
    return posixpath.join(prefix, name.strip()) if plain else name


def _open(asked: Asked) -> DataSet:
    if not is_table(asked.path):
        raise ValueError(f"{asked.path} is no table: that is a .csv, .tsv, .jsonl, .ndjson or .parquet file")
    asked.no_split()
    folder = asked.folder
    file = TableFile(asked.path, relative(asked.path, asked.images or folder))
    return read_tables(TABLE.name, asked, [file], folder)


def _recognizes(path: Path) -> bool:
    if not is_table(path):
        return False
    try:
        roles = _Columns(column_names(path)).by_role
    except (ValueError, OSError):
        return False
    return "image" in roles and "question" in roles


TABLE = Format("table", "CSV, TSV, JSON Lines or Parquet with image and question", _recognizes, _open)
