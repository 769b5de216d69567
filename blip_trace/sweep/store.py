"""A run's folder: every file in it is there as a whole or not at all, also after a power cut."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

PLAN = "plan.json"
SUCCESS = "_SUCCESS"
LOCK = ".lock"
SHARDS, RECEIPTS, MANIFESTS = "shards", "receipts", "plan"
FOLDERS = (SHARDS, RECEIPTS, MANIFESTS)


class Busy(OSError):
    """Somebody else is writing into this run."""


class Store:
    """The files of one run."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def make(self) -> None:
        """Make the folder. Raises NotADirectoryError where it is a file, OSError where it cannot be made."""
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is a file, not a folder for a run")
        for name in FOLDERS:
            _make_folder(self.root / name)

    def unmake(self) -> None:
        """Take away what `make` made, if nothing has come into it."""
        for name in (*FOLDERS, ""):
            with suppress(OSError):
                if not name:
                    self.remove(LOCK)
                (self.root / name).rmdir()

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self.root / name

    def write(self, name: str, data: bytes) -> str:
        """Write a file for good; returns its SHA-256."""
        with self.writing(name) as file:
            file.write(data)
        return hashlib.sha256(data).hexdigest()

    @contextmanager
    def writing(self, name: str) -> Iterator[BinaryIO]:
        """A file to write into, which is there for good when that ends well and not at all otherwise.

        First under another name in the same folder, then made durable, then renamed, then the folder made
        durable: whoever looks sees all of it or none, whenever the machine stops.
        """
        path = self.path(name)
        part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)

    def write_json(self, name: str, content: object) -> None:
        """Write a file of JSON for good."""
        text = json.dumps(content, ensure_ascii=False, indent=1)
        if not text.isascii() and text != text.encode("utf-8", "replace").decode():
            text = json.dumps(content, indent=1)  # paths may be no UTF-8
        self.write(name, (text + "\n").encode())

    def read_json(self, name: str) -> Any:
        """Raises ValueError where the file is no JSON, FileNotFoundError where it is missing."""
        try:
            return json.loads(self.path(name).read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path(name)} is broken: {error}") from error

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.path(name).is_file()

    def remove(self, name: str) -> None:
        """Take a file away, if it is there."""
        self.path(name).unlink(missing_ok=True)

    def sha256(self, name: str) -> str | None:
        """Of a file's bytes; None where there is no such file."""
        return file_sha256(self.path(name)) if self.has(name) else None

    def leftovers(self) -> list[str]:
        """Files that somebody began to write and did not finish."""
        found = [path for name in ("", *FOLDERS) for path in (self.root / name).glob(".*.part")]
        return sorted(str(path.relative_to(self.root)) for path in found)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep others from writing into this run. The lock ends with this process, however it ends.

        Raises Busy, naming who holds it.
        """
        with open(self.path(LOCK), "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise Busy(f"{self.root} is being written by {owner}: wait for it, or stop it") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            file.truncate(0)

    def owner(self) -> str | None:
        """Who is writing into this run now, or None."""
        if not self.has(LOCK):
            return None
        with open(self.path(LOCK), encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "another process"
        return None


def _make_folder(path: Path) -> None:
    """Make a folder, and those above it, each for good."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make durable which files there are in a folder."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


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
