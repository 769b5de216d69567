"""Published data sets, read from local files into the one normal form."""

from __future__ import annotations

from pathlib import Path

from . import drawn
from .clevr import CLEVR
from .coco import COCO_QA, VQA
from .dataset import Asked, DataSet, Format
from .gqa import GQA
from .huggingface import HUGGINGFACE
from .pairs import STATES, SVO
from .table import TABLE

__all__ = ["FORMATS", "DataSet", "format_names", "open_data"]

FORMATS: dict[str, Format] = {
    format.name: format for format in (TABLE, COCO_QA, VQA, CLEVR, GQA, SVO, STATES, HUGGINGFACE)
}


def format_names() -> tuple[str, ...]:
    """All names that `open_data` takes."""
    return (*FORMATS, drawn.NAME)


def open_data(
    path: str | Path,
    format: str | None = None,
    images: str | Path | None = None,
    split: str | None = None,
) -> DataSet:
    """Open a data set.

    path: its file or folder, or scenes:COUNT[:SEED]. format: one of `format_names()`, found out unless given.
    images: the folder that its images lie in, that of the data unless given. split: one of its splits, all
    unless given.

    Raises FileNotFoundError for a missing path, and ValueError, in one sentence, for a format that is unknown
    or cannot be told, for files that are foreign to it, and for a split that is not there.
    """
    if format is not None and format not in format_names():
        raise ValueError(f"there is no format {format!r}; there are {', '.join(format_names())}")
    if format == drawn.NAME or (format is None and str(path).startswith(f"{drawn.NAME}:")):
        if images is not None or split is not None:
            raise ValueError("scenes are drawn and have no splits: leave out --images and --split")
        return drawn.open_scenes(str(path))
    asked = Asked(Path(path), None if images is None else Path(images), split)
    if not asked.path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not asked.path.is_dir() and not asked.path.is_file():
        raise ValueError(f"{path} is no regular file and no folder")
    if asked.images is not None and not asked.images.is_dir():
        raise FileNotFoundError(f"there is no folder of images {images}")
    return (FORMATS[format] if format else _recognized(asked.path)).open(asked)


def _recognized(path: Path) -> Format:
    """The format that a path looks like. What holds images itself is a table too, and more."""
    found = [format for format in FORMATS.values() if format.recognizes(path)]
    if len(found) > 1 and TABLE in found:
        found.remove(TABLE)
    if len(found) == 1:
        return found[0]
    if found:
        names = " or ".join(format.name for format in found)
        raise ValueError(f"{path} could be {names}: say which with --format")
    known = "; ".join(
        [*(f"{format.name} ({format.looks})" for format in FORMATS.values()), f"{drawn.NAME} ({drawn.LOOKS})"]
    )
    raise ValueError(f"{path} is of no format that is known here, name it with --format: {known}")
