"""Sets whose questions come as pairs of pictures: SVO-Probes and MIT-States."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..sample import Sample
from .dataset import Asked, DataSet, Format, make_sample, names_in, pictures_in
from .rows import csv_rows, header, tables_with, text_lines

SVO_COLUMNS = ("sentence", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg")
NEGATIVES = SVO_COLUMNS[3:]
TRIPLETS = ("pos_triplet", "neg_triplet")

UNLABELLED = "adj"
"""The adjective of MIT-States' folders that have none."""
PAIRS_FOLDER = "compositional-split-natural"


def _svo_samples(path: Path, images: Path) -> Iterator[Sample]:
    # Pictures are fetched by the user and named by their id.
    names = {Path(name).stem: name for name in pictures_in(images)}
    for number, row in enumerate(csv_rows(path)):
        clean, corrupt = (row.cells.get(name, "").strip() for name in SVO_COLUMNS[1:3])
        changed = [name for name in NEGATIVES if row.cells.get(name, "").strip().lower() in ("true", "1")]
        problem = row.problem or ("" if corrupt else "no image is named that does not match")
        yield make_sample(
            row.where,
            row.cells.get("", "").strip() or f"row-{number}",
            names.get(clean, f"{clean}.jpg") if clean else "",
            row.cells.get("sentence", ""),
            problem=problem,
            answers=["match"],
            type=changed[0] if len(changed) == 1 else "",
            corrupt_image=names.get(corrupt, f"{corrupt}.jpg") if corrupt else None,
            extra={name: words for name in TRIPLETS if (words := _triplet(row.cells.get(name, "")))},
        )


def _triplet(cell: str) -> str:
    """Subject, verb and object with commas between, of how the file has them: so, or as Python prints a list,
    which "['[]']" is too, and says nothing."""
    cell = cell.strip()
    if not cell.startswith("["):
        return cell
    try:
        words = ast.literal_eval(cell[:1000])
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return cell
    return ",".join(str(word) for word in words if str(word) != "[]") if isinstance(words, list) else cell


def _open_svo(asked: Asked) -> DataSet:
    asked.no_split()
    tables = tables_with(asked.path, SVO_COLUMNS)
    if len(tables) != 1:
        found = f"; it has {', '.join(header(asked.path))}" if asked.path.is_file() else ""
        raise ValueError(
            f"{asked.path} is no SVO-Probes: that is one CSV file with the columns "
            f"{', '.join(SVO_COLUMNS)}{found}"
        )
    (path,) = tables
    images = asked.images or asked.folder
    return DataSet(SVO.name, str(asked.path), asked.media(asked.folder), lambda: _svo_samples(path, images))


def _states_folder(path: Path) -> Path | None:
    """The folder of the folders of pictures, of it or of one above it."""
    for folder in (path, path / "images", path / "release_dataset" / "images"):
        if folder.is_dir() and any(_is_class(entry) for entry in folder.iterdir()):
            return folder
    return None


def _is_class(folder: Path) -> bool:
    """Whether a folder is named by an adjective and a noun, and holds pictures."""
    return " " in folder.name and folder.is_dir() and bool(pictures_in(folder))


def _pairs_files(folder: Path) -> dict[str, list[Path]]:
    """The published lists of pairs of adjective and noun, by split."""
    for above in (folder, folder.parent):
        found = sorted((above / PAIRS_FOLDER).glob("*_pairs.txt"))
        if found:
            return {file.name.removesuffix("_pairs.txt"): [file] for file in found}
    return {}


def _state_samples(folder: Path, pairs: Path | None) -> Iterator[Sample]:
    wanted = None if pairs is None else {line.strip() for line in text_lines(pairs)}
    by_noun: dict[str, list[str]] = {}
    for name in names_in(folder):
        adjective, _, noun = name.partition(" ")
        if noun and adjective != UNLABELLED and (wanted is None or name in wanted):
            by_noun.setdefault(noun, []).append(adjective)
    for noun in sorted(by_noun):
        adjectives = sorted(by_noun[noun])
        pictures = {adjective: pictures_in(folder / f"{adjective} {noun}") for adjective in adjectives}
        yield from _noun_samples(noun, {name: found for name, found in pictures.items() if found})


def _noun_samples(noun: str, pictures: Mapping[str, list[str]]) -> Iterator[Sample]:
    """A noun's pictures, each against one of the same thing in the next of its states, in turn."""
    adjectives = list(pictures)
    for place, adjective in enumerate(adjectives):
        other = adjectives[(place + 1) % len(adjectives)]
        for number, name in enumerate(pictures[adjective]):
            image = f"{adjective} {noun}/{name}"
            partner = pictures[other][number % len(pictures[other])]
            paired = other != adjective
            yield make_sample(
                image,
                image,
                image,
                f"what kind of {noun} is this",
                answers=[adjective],
                type=noun,
                corrupt_image=f"{other} {noun}/{partner}" if paired else None,
                foil=other if paired else None,
            )


def _open_states(asked: Asked) -> DataSet:
    folder = _states_folder(asked.path)
    if folder is None:
        raise ValueError(
            f"{asked.path} is no MIT-States: that is a folder release_dataset/images with a folder of "
            "pictures for each adjective and noun"
        )
    if asked.images is not None:
        raise ValueError(f"{asked.path} is made of its images: leave out --images")
    splits = asked.parts(_pairs_files(folder)) if asked.split is not None else {}
    pairs = next((file for files in splits.values() for file in files), None)
    return DataSet(STATES.name, str(asked.path), asked.media(folder), lambda: _state_samples(folder, pairs))


SVO = Format(
    "svo-probes",
    "svo_probes.csv",
    lambda path: bool(tables_with(path, SVO_COLUMNS)),
    _open_svo,
)
STATES = Format(
    "mit-states",
    "release_dataset/images with folders such as `old book`",
    lambda path: path.is_dir() and _states_folder(path) is not None,
    _open_states,
)
