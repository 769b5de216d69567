"""NOTICE's tables: the questions that it patches, from its own CSV files and from the published sets.

A row has clean_image_path, corrupt_image_path, clean_prompt, corrupt_prompt, correct_answer and
incorrect_answer, and whatever else its file has.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from torch import Tensor

from ...sweep.sample import Sample
from ...sweep.sources import open_data
from ...sweep.sources.pairs import NEGATIVES, STATES, SVO, TRIPLETS
from ...sweep.sources.rows import csv_rows, has_columns, text

IMAGES = ("clean_image_path", "corrupt_image_path")
NEEDED = ("clean_image_path", "clean_prompt", "correct_answer")
"""Columns by which a CSV file of NOTICE's is known."""
CORRUPT: dict[str, tuple[str, ...]] = {
    "image": ("corrupt_image_path",),
    "text": ("corrupt_prompt",),
    "both": ("corrupt_image_path", "corrupt_prompt"),
}
"""What else a row must have, by mode."""


@dataclass(frozen=True)
class Question:
    """A checked row; `where`: how errors call it. images: by what its paths say, what they mean."""

    cells: Mapping[str, str]
    where: str
    images: Mapping[str, Any] | None

    def inputs(self, mode: str) -> tuple[Any, Any, Any]:
        """constant_input, clean_input and corrupt_input of NOTICE's functions."""
        prompts = self.cells["clean_prompt"], self.cells.get("corrupt_prompt")
        if mode == "text":
            return self._image(IMAGES[0]), *prompts
        images = self._image(IMAGES[0]), self._image(IMAGES[1])
        if mode == "image":
            return prompts[0], *images
        return None, (images[0], prompts[0]), (images[1], prompts[1])

    def answer_tokens(self, tokenizer: Any) -> list[int]:
        """The first word pieces of the correct and of the incorrect answer. Raises ValueError for words
        outside the vocabulary."""
        ids = []
        for name in ("correct_answer", "incorrect_answer"):
            first = tokenizer(self.cells[name], add_special_tokens=False).input_ids[0]
            if first == tokenizer.unk_token_id:
                raise ValueError(f"the model does not know the {name} {self.cells[name]!r}")
            ids.append(first)
        return ids

    def _image(self, name: str) -> Any:
        path = self.cells[name]
        if self.images is None:
            return path
        image = self.images[path]
        return _picture(image) if isinstance(image, Tensor) else image


def _picture(pixels: Tensor) -> PIL.Image.Image:
    """An image of [3, H, W], uint8 or between 0 and 1: cut off to whole steps then, as torchvision does."""
    if pixels.is_floating_point():
        pixels = pixels.mul(255).byte()
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def questions_of(df: Any, mode: str, images: Mapping[str, Any] | None) -> list[Question]:
    """The rows of a DataFrame, or of any table that yields mappings, checked.

    Raises ValueError, naming the row from 0, for one that lacks something or whose image is not there.
    """
    rows = df.to_dict("records") if hasattr(df, "to_dict") else list(df)
    found = []
    for number, row in enumerate(rows):
        cells = {str(name): text(cell).strip() for name, cell in row.items()}
        if not cells.get("incorrect_answer"):
            cells["incorrect_answer"] = _incorrect(cells)
        for name in (*NEEDED, "incorrect_answer", *CORRUPT.get(mode, ())):
            if not cells.get(name):
                raise ValueError(f"row {number} has no {name}")
        for name in IMAGES if "corrupt_image_path" in CORRUPT.get(mode, ()) else IMAGES[:1]:
            known = Path(cells[name]).is_file() if images is None else cells[name] in images
            if not known:
                raise ValueError(f"row {number} has the {name} {cells[name]!r}, and there is no such image")
        found.append(Question(cells, f"row {number}", images))
    return found


def read_rows(path: str | Path, images: str | Path | None = None) -> list[dict[str, str]]:
    """Questions from a CSV file of NOTICE's (`BLIP_final_{task}.csv`), from `svo_probes.csv` or from the
    folder of MIT-States, for `debug_hidden_flow`.

    images: the folder of the images, that of the file unless given; names that lie there become paths, and
    what does not (the URLs of SVO-Probes) stays as it is. Of the published sets the prompts are made here, as
    forced choices in NOTICE's words before it has GPT-3.5 rephrase them: each pair of SVO-Probes asks about
    both of its pictures; of MIT-States the correct answer stands first in every other question. They have no
    corrupt_prompt: choose words of as many pieces yourself. Rows that give no such pair are left out, with a
    warning that counts them.

    Raises FileNotFoundError for a missing path, ValueError for anything but these files.
    """
    path = Path(path)
    if path.is_file() and has_columns(path, NEEDED):
        folder = path.parent if images is None else Path(images)
        read = list(csv_rows(path))
        found = [_located(row.cells, folder) for row in read if not row.problem]
        return _told(path, found, [f"{row.where}: {row.problem}" for row in read if row.problem])
    data = open_data(path, images=images)
    make = {SVO.name: _svo_rows, STATES.name: _states_rows}.get(data.name)
    if make is None:
        raise ValueError(
            f"{path} is no input of NOTICE's: a CSV file with {', '.join(NEEDED)}, SVO-Probes or MIT-States"
        )
    folder = data.media.root or Path()
    found, problems = [], []
    for sample in data.samples():
        rows = [] if sample.problem else make(sample, len(found))
        found += [_located(row, folder) for row in rows]
        if not rows:
            problems.append(sample.problem or f"{sample.id} is half of a pair, or no pair of two answers")
    return _told(path, found, problems)


def _told(path: Path, rows: list[dict[str, str]], problems: Sequence[str]) -> list[dict[str, str]]:
    if problems:
        warnings.warn(f"{len(problems)} rows of {path} are left out: {problems[0]}", stacklevel=3)
    return rows


def _located(cells: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The row with paths in the place of the names of images that are there."""
    row = {name: cell.strip() for name, cell in cells.items()}
    for name in IMAGES:
        if row.get(name) and (folder / row[name]).is_file():
            row[name] = str(folder / row[name])
    return row


def _svo_rows(sample: Sample, _: int) -> list[dict[str, str]]:
    """A question about each picture of a pair; none where the pair does not differ in exactly one word."""
    # of several triplets one behind the other the first counts, as in `parse_triplet`
    cells = [parse_triplet(sample.extra.get(name, "")) for name in TRIPLETS]
    if sample.type not in NEGATIVES or any(len(words) % 3 for words in cells) or not sample.corrupt_image:
        return []
    positive, negative = (words[:3] for words in cells)
    place = NEGATIVES.index(sample.type)
    words = list(positive)
    words[place] = f"{positive[place]} or {negative[place]}"
    prompt = f"is {' '.join(words)}?"
    halves = ((sample.image, positive[place]), (sample.corrupt_image, negative[place]))
    return [
        {
            "clean_image_path": image,
            "corrupt_image_path": other,
            "clean_prompt": prompt,
            "correct_answer": answer,
            "incorrect_answer": wrong,
            **sample.extra,
            "type": sample.type,
        }
        for (image, answer), (other, wrong) in (halves, halves[::-1])
    ]


def _states_rows(sample: Sample, number: int) -> list[dict[str, str]]:
    """A question about a thing and two of its states."""
    if sample.corrupt_image is None or sample.foil is None:
        return []
    answer, first = sample.answers[0], number % 2 == 0
    choice = (answer, sample.foil) if first else (sample.foil, answer)
    return [
        {
            "clean_image_path": sample.image,
            "corrupt_image_path": sample.corrupt_image,
            "clean_prompt": f"Is this {sample.type} {' or '.join(choice)}?",
            "correct_answer": answer,
            "incorrect_answer": sample.foil,
            "noun": sample.type,
            "correct_first": str(first),
        }
    ]


def parse_triplet(triplet_str: str) -> list[str]:
    """Subject, verb and object of a cell: with commas between, or the first of a list of such, as Python
    prints it."""
    try:
        parsed = ast.literal_eval(triplet_str[:1000])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        parsed = None
    first = parsed[0] if isinstance(parsed, list) and parsed else triplet_str
    return [word.strip() for word in str(first).split(",")]


def get_incorrect_answers(df: Any) -> list[str]:
    """For each row of SVO-Probes (a DataFrame, or mappings) that of the two words that differ in its triplets
    which is not its correct_answer. Raises ValueError, naming the row, where there is none."""
    rows = df.to_dict("records") if hasattr(df, "to_dict") else df
    answers = []
    for number, row in enumerate(rows):
        answer = _incorrect({str(name): text(cell).strip() for name, cell in row.items()})
        if not answer:
            raise ValueError(f"row {number} has no triplets that differ in one word")
        answers.append(answer)
    return answers


def _incorrect(cells: Mapping[str, str]) -> str:
    """The incorrect answer of a row of SVO-Probes, "" where it cannot be told."""
    places = [
        place for place, name in enumerate(NEGATIVES) if cells.get(name, "").lower() in ("true", "1", "1.0")
    ]
    triplets = [parse_triplet(cells.get(name, "")) for name in TRIPLETS]
    if not places or any(len(words) != 3 for words in triplets):
        return ""
    correct = cells.get("correct_answer", "").lower()
    both = [words[places[0]] for words in triplets]
    return next((word for word in both if word.lower() != correct), "")
