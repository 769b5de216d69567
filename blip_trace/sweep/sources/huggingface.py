"""What Hugging Face's `datasets` writes and reads: Parquet that holds its images, and folders of images with
a table beside them."""

from __future__ import annotations

import re
from pathlib import Path

from .dataset import Asked, DataSet, Format, files_in
from .parquet_rows import binary_columns
from .table import TableFile, read_tables, relative

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")


def _files(path: Path) -> tuple[dict[str, list[Path]], bool]:
    """Files by split, and whether they are tables beside folders of images."""
    if path.is_file():
        beside = path.name in METADATA
        return ({"": [path]} if beside or _holds_images(path) else {}), beside
    found: dict[str, list[Path]] = {}
    for file in files_in(path, *METADATA, *(f"*/{name}" for name in METADATA)):
        found.setdefault("" if file.parent == path else file.parent.name, []).append(file)
    if found:
        return found, True
    for file in files_in(path, "*.parquet", "*/*.parquet"):
        shard = _SHARD.fullmatch(file.stem)
        found.setdefault(shard[1] if shard else file.stem, []).append(file)
    return found, False


def _holds_images(path: Path) -> bool:
    try:
        return path.suffix.lower() == ".parquet" and bool(binary_columns(path))
    except (ValueError, OSError):
        return False


def _root(folder: Path) -> Path:
    """The folder, or the one that it is a snapshot in: files in the hub's cache are links to others there."""
    for above in (folder, *folder.parents):
        if above.parent.name == "snapshots" and (above.parent.parent / "blobs").is_dir():
            return above.parent.parent
    return folder


def _open(asked: Asked) -> DataSet:
    found, beside = _files(asked.path)
    if not found:
        raise ValueError(
            f"{asked.path} is nothing that Hugging Face's datasets write: that is Parquet that holds its "
            f"images, or images with {' or '.join(METADATA)} beside them"
        )
    root = _root(asked.folder.absolute())
    tables = []
    for file in (file for part in asked.parts(found).values() for file in part):
        reference = relative(file, asked.images or root)
        prefix = (
            (relative(file.parent if beside else asked.folder, root) or "") if asked.images is None else ""
        )
        tables.append(TableFile(file, reference, "" if prefix == "." else prefix))
    return read_tables(HUGGINGFACE.name, asked, tables, root)


HUGGINGFACE = Format(
    "huggingface",
    "Parquet that holds images, or images with metadata.csv or metadata.jsonl",
    lambda path: bool(_files(path)[0]),
    _open,
)
