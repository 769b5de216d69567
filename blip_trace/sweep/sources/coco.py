"""COCO's pictures, and the sets of questions about them: COCO-QA and VQA."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from ..sample import Sample
from .dataset import Asked, DataSet, Format, files_in, make_sample, names_in
from .json_stream import first_entry, list_entries
from .rows import Row, csv_rows, tables_with, text, text_lines

PICTURES = ("COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg", "{:012d}.jpg", "COCO_QA{:012d}.jpg")
"""What a picture's file is called, by its id, the first that is there."""
UNKNOWN_PICTURE = PICTURES[2]
PICTURE_FOLDERS = ("", "train2014", "val2014", "train2017", "val2017")

LINES = ("questions.txt", "answers.txt", "img_ids.txt", "types.txt")
LINE_SPLITS = ("train", "test")
TYPES = {"0": "object", "1": "number", "2": "color", "3": "location"}
CSV_COLUMNS = ("train_image_id_count", "question_count", "answer_count")

QUESTIONS_SUFFIX = "_questions.json"
_MSCOCO = re.compile(r"mscoco_([\w-]+)_questions\.json$")
_TASK = re.compile(r"(?:OpenEnded|MultipleChoice)_")


class CocoPictures:
    """A folder of COCO's pictures, listed once."""

    def __init__(self, folder: Path) -> None:
        self._names = {sub: frozenset(names_in(folder / sub)) for sub in PICTURE_FOLDERS}

    def reference(self, id: object) -> str:
        """The picture of an id; its plain name where it is not there. Raises ValueError for no id."""
        digits = text(id).strip()
        if not digits.isdecimal() or len(digits) > 12:
            raise ValueError(f"{digits[:40]!r} is no id of a COCO image")
        for pattern in PICTURES:
            name = pattern.format(int(digits))
            for folder, names in self._names.items():
                if name in names:
                    return f"{folder}/{name}" if folder else name
        return UNKNOWN_PICTURE.format(int(digits))


def _line_folders(path: Path) -> dict[str, list[Path]]:
    folders = {split: path / split for split in LINE_SPLITS} if path.is_dir() else {}
    found = {split: [folder] for split, folder in folders.items() if (folder / LINES[0]).is_file()}
    return {"": [path], **found} if (path / LINES[0]).is_file() else found


def _check_lines(folder: Path) -> None:
    counts = {}
    for name in LINES:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no file {name} beside {LINES[0]}")
        counts[name] = sum(1 for _ in text_lines(folder / name))
    if len(set(counts.values())) > 1:
        told = ", ".join(f"{name} {count:,}" for name, count in counts.items())
        raise ValueError(f"the files in {folder} differ in their numbers of lines: {told}")


def _line_samples(folder: Path, split: str, pictures: CocoPictures) -> Iterator[Sample]:
    lines = [text_lines(folder / name) for name in LINES]
    for number, (question, answer, image, type) in enumerate(zip_longest(*lines, fillvalue="")):
        problem = "" if type.strip() in TYPES else f"{type.strip()[:40]!r} is no type of COCO-QA"
        where = f"{folder.name} line {number + 1}"
        id = f"{split or 'row'}-{number}"
        yield _coco_sample(Row(where, {}, problem), id, image, question, answer, TYPES.get(type.strip(), ""),
                           pictures)  # fmt: skip


def _csv_samples(path: Path, pictures: CocoPictures) -> Iterator[Sample]:
    prefix, marked, _ = path.stem.partition("_coco_qa")
    for number, row in enumerate(csv_rows(path)):
        image, question, answer = (row.cells.get(name, "") for name in CSV_COLUMNS)
        id = row.cells.get("", "").strip() or f"row-{number}"
        yield _coco_sample(row, id, image, question, answer, prefix if marked else "", pictures)


def _coco_sample(
    row: Row, id: str, image: object, question: str, answer: str, type: str, pictures: CocoPictures
) -> Sample:
    problem, reference = row.problem, ""
    try:
        reference = pictures.reference(image)
    except ValueError as error:
        problem = problem or str(error)
    return make_sample(row.where, id, reference, question, problem=problem, answers=[answer], type=type)


def _open_coco_qa(asked: Asked) -> DataSet:
    folders = _line_folders(asked.path)
    tables = {path.stem: [path] for path in tables_with(asked.path, CSV_COLUMNS)}
    if not folders and not tables:
        raise ValueError(
            f"{asked.path} is no COCO-QA: that is a folder with {', '.join(LINES)}, or tables with the "
            f"columns {', '.join(CSV_COLUMNS)}"
        )
    parts = asked.parts({**folders, **tables})
    for split, (path,) in parts.items():
        if split not in tables:
            _check_lines(path)
    media = asked.media(asked.folder)

    def read() -> Iterator[Sample]:
        pictures = CocoPictures(asked.images or asked.folder)
        for split, (path,) in parts.items():
            yield from (
                _csv_samples(path, pictures) if split in tables else _line_samples(path, split, pictures)
            )

    return DataSet(COCO_QA.name, str(asked.path), media, read)


def _vqa_files(path: Path) -> dict[str, list[Path]]:
    """The files of questions, by split: train2014 of v2_OpenEnded_mscoco_train2014_questions.json."""
    files = files_in(path, "*" + QUESTIONS_SUFFIX, "*/*" + QUESTIONS_SUFFIX) if path.is_dir() else [path]
    found: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix == ".json" and _is_vqa(file):
            split = _MSCOCO.search(file.name)
            found.setdefault(split[1] if split else file.name.removesuffix(QUESTIONS_SUFFIX), []).append(file)
    return found


def _is_vqa(path: Path) -> bool:
    key, entry = first_entry(path)
    return key == "questions" and {"question_id", "image_id", "question"} <= entry.keys()


def _annotations(path: Path) -> Path | None:
    """The file of answers beside one of questions, in whose name the kind of task is left out."""
    for name in (_TASK.sub("", path.name), path.name):
        beside = path.with_name(name.replace("questions.json", "annotations.json"))
        if beside != path and beside.is_file():
            return beside
    return None


class _Annotations:
    """Annotations by the question's id, read only as far as they are asked for: published files have both in
    the same order, so that next to none is held."""

    def __init__(self, path: Path) -> None:
        self._entries = list_entries(path, "annotations")
        self._waiting: dict[str, tuple[tuple[str, ...], str, str]] = {}

    def take(self, id: str) -> tuple[tuple[str, ...], str, str] | None:
        """Answers, answer type and question type; None for a question without."""
        if id in self._waiting:
            return self._waiting.pop(id)
        for entry in self._entries:
            found = _vqa_answers(entry), text(entry.get("answer_type")), text(entry.get("question_type"))
            if text(entry.get("question_id")) == id:
                return found
            self._waiting[text(entry.get("question_id"))] = found
        return None


def _vqa_answers(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The answer to expect, then the others, those that more people gave first."""
    given = entry.get("answers")
    people = (
        [text(item.get("answer")) for item in given if isinstance(item, dict)]
        if isinstance(given, list)
        else []
    )
    counted = [answer for answer, _ in Counter(people).most_common()]
    return tuple(dict.fromkeys([text(entry.get("multiple_choice_answer")), *counted]))


def _vqa_samples(path: Path, pictures: CocoPictures) -> Iterator[Sample]:
    beside = _annotations(path)
    annotations = _Annotations(beside) if beside else None
    for number, entry in enumerate(list_entries(path, "questions")):
        id = text(entry.get("question_id"))
        found = annotations.take(id) if annotations else ((), "", "")
        problem = "" if found else f"{beside.name if beside else ''} has no annotation of question {id}"
        answers, type, question_type = found or ((), "", "")
        reference = ""
        try:
            reference = pictures.reference(entry.get("image_id"))
        except ValueError as error:
            problem = problem or str(error)
        yield make_sample(
            f"{path.name} question {number}",
            id or f"row-{number}",
            reference,
            text(entry.get("question")),
            problem=problem,
            answers=answers,
            type=type,
            extra={"question_type": question_type} if question_type else {},
        )


def _open_vqa(asked: Asked) -> DataSet:
    found = _vqa_files(asked.path)
    if not found:
        raise ValueError(
            f"{asked.path} is no VQA v2: that is a file *{QUESTIONS_SUFFIX} with a list `questions` of "
            "objects with question_id, image_id and question, or a folder of such"
        )
    # train means train2014 as well.
    short = {split.rstrip("0123456789"): files for split, files in found.items()}
    chosen = asked.parts(found if asked.split is None else {**short, **found})
    files = [file for part in chosen.values() for file in part]

    def read() -> Iterator[Sample]:
        pictures = CocoPictures(asked.images or asked.folder)
        for file in files:
            yield from _vqa_samples(file, pictures)

    return DataSet(VQA.name, str(asked.path), asked.media(asked.folder), read)


COCO_QA = Format(
    "coco-qa",
    f"a folder with {' '.join(LINES)}, or CSV with {CSV_COLUMNS[0]}",
    lambda path: bool(_line_folders(path) or tables_with(path, CSV_COLUMNS)),
    _open_coco_qa,
)
VQA = Format(
    "vqa-v2",
    f"*mscoco*{QUESTIONS_SUFFIX}, annotations beside it",
    lambda path: bool(_vqa_files(path)),
    _open_vqa,
)
