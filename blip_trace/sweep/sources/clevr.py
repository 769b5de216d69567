"""CLEVR: its published folder of JSON questions, and tables of yes/no questions about its pictures."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..sample import Sample
from .dataset import PICTURE_SUFFIXES, Asked, DataSet, Format, files_in, make_sample, names_in
from .json_stream import first_entry, list_entries
from .rows import Row, csv_rows, tables_with, text

CSV_COLUMNS = ("Image_IDs", "Questions_Answers")
MAX_LITERAL = 100_000
"""Characters of a cell of questions."""
YES_NO = {"0": "no", "1": "yes"}

_QUESTIONS = re.compile(r"(?:CLEVR_)?(\w+)_questions\.json")
_SPLIT = re.compile(r"CLEVR_([A-Za-z]+)_")


class _Pictures:
    """A folder of CLEVR's pictures: in it, in its folders by split, or in such of its folder `images`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, frozenset[str]] = {}

    def reference(self, name: str, split: str) -> str:
        """The picture of this name, with or without suffix; where it is not there, in the published place."""
        names = [name] if Path(name).suffix else [name + suffix for suffix in PICTURE_SUFFIXES]
        places = [f"images/{split}/", f"{split}/", "images/", ""] if split.isalnum() else ["images/", ""]
        for place in places:
            for file in names:
                if file in self._listed(place):
                    return place + file
        there = next((place for place in places if self._listed(place)), "")
        return there + names[0]

    def _listed(self, place: str) -> frozenset[str]:
        if place not in self._names:
            self._names[place] = frozenset(names_in(self._folder / place))
        return self._names[place]


def _json_samples(path: Path, split: str, pictures: _Pictures) -> Iterator[Sample]:
    for number, entry in enumerate(list_entries(path, "questions")):
        family = text(entry.get("question_family_index"))
        image = text(entry.get("image_filename"))
        yield make_sample(
            f"{path.name} question {number}",
            text(entry.get("question_index")) or f"row-{number}",
            pictures.reference(image, text(entry.get("split")) or split) if image else "",
            text(entry.get("question")),
            answers=[text(entry.get("answer"))],
            type=_type(entry.get("program")),
            extra={"question_family_index": family} if family else {},
        )


def _type(program: Any) -> str:
    """What a question asks for in the end: the last function of its program, such as count or query_color."""
    last = program[-1] if isinstance(program, list) and program else None
    return text(last.get("function") or last.get("type")) if isinstance(last, dict) else ""


def _csv_samples(path: Path, pictures: _Pictures) -> Iterator[Sample]:
    for number, row in enumerate(csv_rows(path)):
        name = row.cells.get(CSV_COLUMNS[0], "").strip()
        split = _SPLIT.match(name)
        image = pictures.reference(name, split[1] if split else "") if name else ""
        try:
            asked = [] if row.problem else _literal(row.cells[CSV_COLUMNS[1]])
        except ValueError as error:
            row, asked = Row(row.where, row.cells, str(error)), []
        if not asked:
            problem = row.problem or "it has no questions"
            yield make_sample(row.where, name or f"row-{number}", image, "", problem=problem)
        for index, item in enumerate(asked):
            answer = text(item.get("answer"))
            yield make_sample(
                f"{row.where} question {index}",
                f"{name or f'row-{number}'}-{index}",
                image,
                text(item.get("question")),
                answers=[YES_NO.get(answer, answer)],
            )


def _literal(cell: str) -> Sequence[Mapping[str, Any]]:
    """A list of dicts as Python prints it, never run. Raises ValueError for anything else."""
    if len(cell) > MAX_LITERAL:
        raise ValueError(f"its {CSV_COLUMNS[1]} have {len(cell):,} characters, more than {MAX_LITERAL:,}")
    try:
        found = ast.literal_eval(cell.strip())
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"its {CSV_COLUMNS[1]} are no Python list of dicts")
    return found


def _json_files(path: Path) -> dict[str, list[Path]]:
    """The files of questions, by split."""
    files = files_in(path, "*_questions.json", "questions/*_questions.json") if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".json" and _is_clevr(file):
            split = _QUESTIONS.fullmatch(file.name)
            found.setdefault(split[1] if split else file.stem, []).append(file)
    return found


def _is_clevr(path: Path) -> bool:
    key, entry = first_entry(path)
    return key == "questions" and {"image_filename", "question"} <= entry.keys()


def _open(asked: Asked) -> DataSet:
    found = _json_files(asked.path)
    tables = {path.stem: [path] for path in tables_with(asked.path, CSV_COLUMNS)}
    if not found and not tables:
        raise ValueError(
            f"{asked.path} is no CLEVR: that is a folder with questions/CLEVR_*_questions.json, such a file, "
            f"or tables with the columns {' and '.join(CSV_COLUMNS)}"
        )
    parts = asked.parts({**found, **tables})
    # In the published folder the questions lie beside `images`, not above it.
    folder = asked.folder.absolute()
    folder = folder.parent if folder.name == "questions" else folder

    def read() -> Iterator[Sample]:
        pictures = _Pictures(asked.images or folder)
        for split, files in parts.items():
            for file in files:
                yield from (
                    _csv_samples(file, pictures) if split in tables else _json_samples(file, split, pictures)
                )

    return DataSet(CLEVR.name, str(asked.path), asked.media(folder), read)


CLEVR = Format(
    "clevr",
    f"questions/CLEVR_*_questions.json, or CSV with {' and '.join(CSV_COLUMNS)}",
    lambda path: bool(_json_files(path) or tables_with(path, CSV_COLUMNS)),
    _open,
)
