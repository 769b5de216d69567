"""References to images, resolved to the bytes of image files: nothing but local files, nothing outside of
the folder they belong to."""

from __future__ import annotations

import re
from collections import OrderedDict
from io import BytesIO
from pathlib import Path
from random import Random
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..images import MAX_PIXELS, check_size, read_file
from ..scenes import random_scene
from .parquet import BROKEN, open_file

SCENE_SIZE = 64
"""Pixels each way of a scene whose reference names no size."""
CACHED_FILES, CACHED_GROUPS, CACHED_BYTES = 8, 4, 2**29
MAX_GROUP_BYTES = 2**30
"""Of a row group's images: it is read as a whole."""

_SCENE = re.compile(r"scene:(\d{1,18})(?:@(\d{1,5}))?")
_CELL = re.compile(r"(.+?\.parquet)#(.+)/(\d{1,18})", re.DOTALL)
_URL = re.compile(r"(?:[a-z][a-z0-9+.-]*://|(?:https?|ftps?|s3|gs|hf|file|data|blob):)", re.IGNORECASE)


class Media:
    """What references to images mean.

    root: the folder that file names are relative to. absolute: whether names may be absolute and lead out of
    it, which is right only where a data set gives such names and the user named no folder of images; without
    a root they may.

    A reference is a file's name; FILE.parquet#COLUMN/ROW, a cell of a Parquet file, rows from 0, which is
    binary or a struct whose `bytes` are (as Hugging Face writes images); or scene:SEED or scene:SEED@SIZE, a
    scene of `blip_trace.scenes` of so many pixels each way.

    It may be used from several threads, and be pickled.
    """

    def __init__(self, root: Path | None, absolute: bool = False) -> None:
        self.root = None if root is None else root.absolute()
        self.absolute = absolute
        self._lock = Lock()
        self._files: OrderedDict[Path, _File] = OrderedDict()
        self._groups: OrderedDict[tuple[Path, str, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Media, (self.root, self.absolute)

    def read(self, reference: str) -> bytes:
        """The bytes of the image file that is meant, which need not be an image.

        Raises ValueError for a reference that is refused (a URL, a name that leads out of the root, a folder,
        pipe or device, a file that is empty or larger than `images.MAX_BYTES`, a cell that is none),
        FileNotFoundError for a missing file, OSError for one that cannot be read.
        """
        if scene := _SCENE.fullmatch(reference):
            return _scene(int(scene[1]), int(scene[2] or SCENE_SIZE))
        if cell := _CELL.fullmatch(reference):
            return self._cell(reference, cell[1], cell[2], int(cell[3]))
        return read_file(self._path(reference))

    def exists(self, reference: str) -> bool:
        """Whether `read` would find something to read; it may still be no image."""
        try:
            if scene := _SCENE.fullmatch(reference):
                return _is_size(int(scene[2] or SCENE_SIZE))
            if cell := _CELL.fullmatch(reference):
                with self._lock:
                    file = self._file(self._path(cell[1]))
                return int(cell[3]) < file.rows and file.has(cell[2])
            return self._path(reference).is_file()
        except (ValueError, OSError):
            return False

    def _path(self, name: str) -> Path:
        """The file of this name, links followed."""
        if _URL.match(name):
            raise ValueError(f"{_short(name)} is a URL: images are read from local files, so download it")
        if not name or "\0" in name:
            raise ValueError(f"{name!r} is no name of an image file")
        path = Path(name)
        if self.root is None:
            if not path.is_absolute():
                raise ValueError(f"{_short(name)} is relative: name the folder of the images with --images")
            return path
        try:
            found = (self.root / path).resolve()
            if (self.absolute and path.is_absolute()) or found.is_relative_to(self.root.resolve()):
                return found
        except RuntimeError:  # links that lead in a circle
            raise ValueError(f"{_short(name)} is a link to itself") from None
        raise ValueError(
            f"{_short(name)} leads out of the folder {self.root}: name the folder that holds all images with "
            "--images"
        )

    def _cell(self, reference: str, name: str, column: str, row: int) -> bytes:
        path = self._path(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no Parquet file {path}")
        with self._lock:
            file = self._file(path)
            if not file.has(column):
                raise ValueError(f"{path} has no column {column!r} of images")
            if row >= file.rows:
                raise ValueError(f"{path} has {file.rows} rows, so there is no row {row}")
            number = file.group(row)
            group = self._group(path, file, column, number)
        value = group[row - file.starts[number]]
        if not value.is_valid:
            raise ValueError(f"{reference} is null")
        data = value.as_buffer()
        check_size(data.size, reference)
        content: bytes = data.to_pybytes()
        return content

    def _file(self, path: Path) -> _File:
        if path not in self._files:
            self._files[path] = _File(path)
            while len(self._files) > CACHED_FILES:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        return self._files[path]

    def _group(self, path: Path, file: _File, column: str, number: int) -> Any:
        """A row group's images; the last few stay, so that rows beside each other are read once."""
        key = (path, column, number)
        if key not in self._groups:
            self._groups[key] = file.read(column, number)
            while len(self._groups) > CACHED_GROUPS or (
                len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > CACHED_BYTES
            ):
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]


class _File:
    """A Parquet file's footer: where its row groups begin, and which leaves of its columns hold bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = metadata_of(path)
        self.rows = 0
        self.starts = []
        for number in range(self._metadata.num_row_groups):
            self.starts.append(self.rows)
            self.rows += self._metadata.row_group(number).num_rows
        self._leaves = binary_leaves(self._metadata)

    def has(self, column: str) -> bool:
        return column in self._leaves

    def group(self, row: int) -> int:
        return max(number for number, start in enumerate(self.starts) if start <= row)

    def read(self, column: str, number: int) -> Any:
        leaf = self._leaves[column]
        size = self._metadata.row_group(number).column(leaf).total_uncompressed_size
        if size > MAX_GROUP_BYTES:
            raise ValueError(
                f"a row group of {self._path} holds {size / 2**30:.1f} GiB of images: write smaller ones"
            )
        path = self._metadata.schema.column(leaf).path
        try:
            with open_file(self._path) as file:
                values = file.read_row_group(number, columns=[path]).column(0)
        except BROKEN as error:
            raise ValueError(f"{self._path} is broken: {' '.join(str(error).split())}") from error
        if path != column:
            values = pa.chunked_array([chunk.field("bytes") for chunk in values.chunks])
        return values


def metadata_of(path: Path) -> pq.FileMetaData:
    """A Parquet file's footer. Raises ValueError for a broken one, OSError for one that cannot be read."""
    try:
        with open_file(path) as file:
            return file.metadata
    except pa.ArrowException as error:
        raise ValueError(f"{path} is no whole Parquet file: {' '.join(str(error).split())}") from error


def binary_leaves(metadata: pq.FileMetaData) -> dict[str, int]:
    """The columns that hold image files, binary or a struct's `bytes`, and the numbers of their leaves."""
    paths = {metadata.schema.column(number).path: number for number in range(metadata.num_columns)}
    leaves = {}
    for field in metadata.schema.to_arrow_schema():
        path = field.name if _is_binary(field.type) else f"{field.name}.bytes"
        if path in paths and (path == field.name or _holds_bytes(field.type)):
            leaves[field.name] = paths[path]
    return leaves


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_binary(kind.field("bytes").type)
    )


def _scene(seed: int, size: int) -> bytes:
    if not _is_size(size):
        raise ValueError(f"a scene is 1 to {int(MAX_PIXELS**0.5)} pixels wide, not {size}")
    data = BytesIO()
    random_scene(Random(seed)).render(size).save(data, "PNG", compress_level=1)
    return data.getvalue()


def _is_size(size: int) -> bool:
    return size >= 1 and size * size <= MAX_PIXELS


def _short(name: str) -> str:
    return name if len(name) <= 120 else f"{name[:100]}… ({len(name):,} characters)"
