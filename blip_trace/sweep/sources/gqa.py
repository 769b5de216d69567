"""GQA: JSON objects of questions by their id."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..sample import Sample
from .dataset import Asked, DataSet, Format, files_in, make_sample
from .json_stream import first_entry, object_entries
from .rows import text

PATTERN = "*_questions*.json"
_PART = re.compile(r"(.+?)_questions(?:_\d+)?\.json")


def _samples(path: Path, prefix: str) -> Iterator[Sample]:
    for number, (key, entry) in enumerate(object_entries(path)):
        where = f"{path.name} entry {number}"
        id = key or f"row-{number}"
        if not isinstance(entry, dict):
            yield make_sample(where, id, "", "", problem="it is no object")
            continue
        image = text(entry.get("imageId"))
        types: Any = entry.get("types")
        types = types if isinstance(types, dict) else {}
        extra = {
            "full_answer": text(entry.get("fullAnswer")),
            "balanced": text(entry.get("isBalanced")),
            "semantic_type": text(types.get("semantic")),
        }
        yield make_sample(
            where,
            id,
            f"{prefix}{image}.jpg" if image else "",
            text(entry.get("question")),
            answers=[text(entry.get("answer"))],
            type=text(types.get("structural")),
            extra={name: value for name, value in extra.items() if value},
        )


def _files(path: Path) -> dict[str, list[Path]]:
    """The files of questions by split: train_all of train_all_questions/train_all_questions_0.json."""
    files = files_in(path, PATTERN, "*/" + PATTERN) if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".json" and _is_gqa(file):
            part = _PART.fullmatch(file.name)
            found.setdefault(part[1] if part else file.stem, []).append(file)
    return found


def _is_gqa(path: Path) -> bool:
    key, entry = first_entry(path)
    return not key and {"imageId", "question"} <= entry.keys()


def _open(asked: Asked) -> DataSet:
    found = _files(asked.path)
    if not found:
        raise ValueError(
            f"{asked.path} is no GQA: that is a file *_questions.json, an object of questions with imageId "
            "and question, or a folder of such"
        )
    files = [file for part in asked.parts(found).values() for file in part]

    def read() -> Iterator[Sample]:
        inner = asked.images is None and (asked.folder / "images").is_dir()
        for file in files:
            yield from _samples(file, "images/" if inner else "")

    return DataSet(GQA.name, str(asked.path), asked.media(asked.folder), read)


GQA = Format(
    "gqa", "*_questions.json, questions with imageId by their id", lambda path: bool(_files(path)), _open
)
