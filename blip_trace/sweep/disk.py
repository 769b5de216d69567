"""A run's folder on a disk, also a shared one: whatever is in it outlives a power cut as a whole."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pyarrow import fs

from .store import FOLDERS, LOCK, MANIFESTS, Busy, Store, Stored


class Disk(Store):
    """A folder whose file system can rename, lock and make durable: see `Store`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    @property
    def address(self) -> str:
        """See `Store`."""
        return str(self.root.absolute())

    def make(self) -> None:
        """Make the folder. Raises NotADirectoryError where it is a file, OSError where it cannot be made."""
        if self.root.exists() and not self.root.is_dir():
            raise NotADirectoryError(f"{self.root} is a file, not a folder for a run")
        for name in FOLDERS:
            _make_folder(self.root / name)

    def unmake(self) -> None:
        """See `Store`."""
        for name in (*FOLDERS, ""):
            with suppress(OSError):
                if not name:
                    self.remove(LOCK)
                (self.root / name).rmdir()

    @contextmanager
    def writing(self, name: str, durable: bool = True) -> Iterator[BinaryIO]:
        """See `Store`.

        First under another name in the same folder, then made durable, then renamed, then the folder made
        durable: whoever looks sees all of it or none, whenever the machine stops.
        """
        path = self.root / name
        part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.part")
        try:
            with open(part, "wb") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if durable:
            _sync_folder(path.parent)

    def reading(self, name: str) -> BinaryIO:
        """See `Store`."""
        return open(self.root / name, "rb")

    def file(self, name: str) -> Stored:
        """See `Store`."""
        path = self.root / name
        return Stored(fs.LocalFileSystem(), str(path), str(path))

    def has(self, name: str) -> bool:
        """See `Store`."""
        return (self.root / name).is_file()

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        return sorted(path.name for path in (self.root / folder).glob("*"))

    def remove(self, name: str) -> None:
        """See `Store`."""
        (self.root / name).unlink(missing_ok=True)

    def open_folder(self, name: str) -> None:
        """See `Store`."""
        (self.root / name).mkdir(parents=True)

    def drop_folder(self, name: str) -> None:
        """See `Store`. Renamed first, for then it is gone at once for all who write into it."""
        gone = self.root / f"{name}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        with suppress(OSError):
            (self.root / name).rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def scratch(self) -> Path:
        """See `Store`."""
        return self.root / MANIFESTS

    def leftovers(self) -> list[str]:
        """See `Store`."""
        found = [path for name in ("", *FOLDERS) for path in (self.root / name).glob(".*.part")]
        return sorted(str(path.relative_to(self.root)) for path in found)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store`. The lock ends with this process, however it ends."""
        with open(self.root / LOCK, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise Busy(f"{self} is being written by {owner}: wait for it, or stop it") from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield
            file.truncate(0)

    def owner(self) -> str | None:
        """See `Store`."""
        if not self.has(LOCK):
            return None
        with open(self.root / LOCK, encoding="utf-8") as file:
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
