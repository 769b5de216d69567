"""A run's files by name, wherever they are: each of them is there as a whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pyarrow import fs

PLAN = "plan.json"
SUCCESS = "_SUCCESS"
LOCK = ".lock"
SHARDS, RECEIPTS, MANIFESTS = "shards", "receipts", "plan"
FOLDERS = (SHARDS, RECEIPTS, MANIFESTS)


class Busy(OSError):
    """Somebody else is writing into this run."""


@dataclass(frozen=True)
class Stored:
    """A file of a run, as pyarrow opens it; its text is how it is called."""

    filesystem: fs.FileSystem
    path: str
    called: str

    def __str__(self) -> str:
        return self.called


class Store(ABC):
    """The files of one run. Its text is how the run's place is called, without anything secret in it.

    Names are relative, with a slash between folder and file. Whatever reads raises FileNotFoundError where
    there is no such file; whatever reads or writes raises OSError where that fails.
    """

    @property
    @abstractmethod
    def address(self) -> str:
        """What `open_store` opens this with in any process and in any folder."""

    @abstractmethod
    def make(self) -> None:
        """Make the place, if need be. Raises OSError where it cannot be made."""

    @abstractmethod
    def unmake(self) -> None:
        """Take away what `make` made, if nothing has come into it."""

    @abstractmethod
    def writing(self, name: str, durable: bool = True) -> AbstractContextManager[BinaryIO]:
        """A file to write into, which is there when that ends well, and as it was before if not; `durable`:
        also after a power cut. Raises FileNotFoundError where it belongs into a folder that is gone."""

    @abstractmethod
    def reading(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A file to read from."""

    @abstractmethod
    def file(self, name: str) -> Stored:
        """A file for pyarrow to open, whether it is there or not."""

    @abstractmethod
    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """The files in a folder, in order; none where there is no such folder."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""

    @abstractmethod
    def open_folder(self, name: str) -> None:
        """Make a folder for files that need not last."""

    @abstractmethod
    def drop_folder(self, name: str) -> None:
        """Take such a folder away with all that is in it, if it is there."""

    @abstractmethod
    def scratch(self) -> Path:
        """A folder of this machine with room for files as large as those of the run."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Files that somebody began to write and did not finish."""

    @abstractmethod
    def lock(self) -> AbstractContextManager[None]:
        """Keep others from writing into this run. Raises Busy, naming who does."""

    @abstractmethod
    def owner(self) -> str | None:
        """Who is writing into this run now, or None."""

    def write(self, name: str, data: bytes, durable: bool = True) -> None:
        """Write all of a file: see `writing`."""
        with self.writing(name, durable) as file:
            file.write(data)

    def read(self, name: str) -> bytes:
        """All of a file."""
        with self.reading(name) as file:
            return file.read()

    def write_json(self, name: str, content: object, durable: bool = True) -> None:
        """Write a file of JSON."""
        text = json.dumps(content, ensure_ascii=False, indent=1)
        if not text.isascii() and text != text.encode("utf-8", "replace").decode():
            text = json.dumps(content, indent=1)  # paths may be no UTF-8
        self.write(name, (text + "\n").encode(), durable)

    def read_json(self, name: str) -> Any:
        """Raises ValueError where the file is no JSON."""
        try:
            return json.loads(self.read(name))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.file(name)} is broken: {error}") from error

    def sha256(self, name: str) -> str | None:
        """Of a file's bytes; None where there is no such file."""
        try:
            with self.reading(name) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except FileNotFoundError:
            return None


def open_store(place: str | Path) -> Store:
    """The files of the run in a folder, or in a bucket: s3://, gs://, abfs://, or whatever fsspec knows.

    Raises ValueError for a kind of storage that nobody knows, and for a folder whose path is no UTF-8.
    """
    from .bucket import open_bucket
    from .disk import Disk

    if isinstance(place, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place):
        scheme, _, rest = place.partition("://")
        if scheme.lower() != "file":
            return open_bucket(place)
        place = "/" + rest.lstrip("/")
    try:
        os.fspath(Path(place).absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the path {str(place)!r} is no UTF-8, as which Parquet files are opened") from None
    return Disk(Path(place))


def file_sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_name(number: int) -> str:
    """The file of a shard's rows."""
    return f"{SHARDS}/{number:06d}.parquet"


def receipt_name(number: int) -> str:
    """The file that says what a shard's rows are."""
    return f"{RECEIPTS}/{number:06d}.json"
