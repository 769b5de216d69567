"""A run in object storage, through pyarrow's file systems, or fsspec's where pyarrow has none of its own.

Such storage knows no folders, no renaming and no locks, but an object is there as a whole, and for everybody,
once it has been written, and not before. What a lock does for a disk, a lease does here: an object that says
who writes, and that is renewed as long as somebody does.
"""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from .store import LOCK, Busy, Store, Stored

LEASE_SECONDS = 60.0
"""So long after somebody last said to be there, others take over. Clocks may differ by less than that."""
RENEW_SECONDS = 15.0
SETTLE_SECONDS = 2.0
"""So long it is waited before looking who of several that came at the same time was the last, and whether
somebody who came too late has withdrawn."""
CHUNK_BYTES = 8 * 2**20


class Bucket(Store):
    """Objects whose names begin alike: see `Store`."""

    def __init__(self, address: str, called: str, filesystem: fs.FileSystem, root: str) -> None:
        self._address = address
        self._called = called
        self._files = filesystem
        self._root = root.rstrip("/")
        self._token = uuid.uuid4().hex
        self._stranger: str | None = None
        self._taken_by: str | None = None
        self._certain = threading.Event()
        self._certain.set()

    def __str__(self) -> str:
        return self._called

    @property
    def address(self) -> str:
        """See `Store`."""
        return self._address

    def make(self) -> None:
        """See `Store`: there is nothing to make."""

    def unmake(self) -> None:
        """See `Store`."""

    @contextmanager
    def writing(self, name: str, durable: bool = True) -> Iterator[BinaryIO]:
        """See `Store`. Raises Busy where somebody else has taken the run over, once that is certain."""
        self._certain.wait()
        if self._taken_by is not None:
            raise Busy(
                f"{self} was taken over by {self._taken_by}, for it had heard nothing from this process"
            )
        with tempfile.TemporaryFile() as file:
            yield file
            file.seek(0)
            # A stream that is left early makes an object of what it has got, and Ctrl-C may come at any time,
            # but only to the first thread.
            with ThreadPoolExecutor(1) as thread:
                thread.submit(self._put, name, file).result()

    def _put(self, name: str, data: BinaryIO) -> None:
        with self._files.open_output_stream(self._path(name)) as file:
            shutil.copyfileobj(data, file, CHUNK_BYTES)

    @contextmanager
    def reading(self, name: str) -> Iterator[BinaryIO]:
        """See `Store`."""
        with self._files.open_input_stream(self._path(name)) as file:
            yield file

    def file(self, name: str) -> Stored:
        """See `Store`."""
        return Stored(self._files, self._path(name), f"{self}/{name}")

    def has(self, name: str) -> bool:
        """See `Store`."""
        return bool(self._files.get_file_info(self._path(name)).type == fs.FileType.File)

    def names(self, folder: str) -> list[str]:
        """See `Store`."""
        found = self._files.get_file_info(fs.FileSelector(self._path(folder), allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def remove(self, name: str) -> None:
        """See `Store`."""
        with suppress(FileNotFoundError):
            self._files.delete_file(self._path(name))

    def open_folder(self, name: str) -> None:
        """See `Store`: names that begin alike need no folder."""

    def drop_folder(self, name: str) -> None:
        """See `Store`."""
        with suppress(FileNotFoundError):
            self._files.delete_dir(self._path(name))

    def scratch(self) -> Path:
        """See `Store`."""
        return Path(tempfile.gettempdir())

    def leftovers(self) -> list[str]:
        """See `Store`: what was not written to its end is no object."""
        return []

    @contextmanager
    def lock(self) -> Iterator[None]:
        """See `Store`.

        A process that is killed keeps its lease until that ends, or until another one on the same machine
        sees that it is gone.
        """
        self._stranger = self._taken_by = None
        self._claim()
        time.sleep(SETTLE_SECONDS)
        lease = self._lease()
        if lease is None or lease["token"] != self._token:
            raise Busy(self._said_of(lease))
        done = threading.Event()
        renewing = threading.Thread(target=self._keep_lease, args=(done,), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            done.set()
            renewing.join()
            self._certain.set()
            if self._stranger is None:
                self.remove(LOCK)

    def owner(self) -> str | None:
        """See `Store`."""
        lease = self._lease()
        if lease is None or time.time() - lease["at"] > LEASE_SECONDS:
            return None
        if lease["host"] == socket.gethostname() and not os.path.exists(f"/proc/{lease['process']}"):
            return None
        return _holder(lease)

    def _claim(self) -> None:
        """Write a lease where nobody has one.

        Of all who come at the same time the last to write has it. So that none writes after another has
        looked, it must be written soon after it was seen that there was none.
        """
        begun = time.monotonic()
        if self.owner() is not None:
            raise Busy(self._said_of(self._lease()))
        self._renew()
        if time.monotonic() - begun > SETTLE_SECONDS:
            self.remove(LOCK)  # whoever it was taken from writes it again
            raise Busy(f"{self} answers too slowly to be locked: try again")

    def _said_of(self, lease: Any) -> str:
        return f"{self} is being written by {_holder(lease)}: wait for it, or stop it"

    def _lease(self) -> Any:
        """The lease that is there, or None."""
        try:
            lease = self.read_json(LOCK)
            float(lease["at"]), str(lease["token"]), str(lease["host"]), int(lease["process"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError):
            return None  # whoever wrote that is nobody of ours
        return lease

    def _renew(self) -> None:
        lease = {
            "token": self._token,
            "host": socket.gethostname(),
            "process": os.getpid(),
            "at": time.time(),
        }
        self.write_json(LOCK, lease)

    def _check_lease(self) -> None:
        """Whose lease it is. Another's may be that of somebody who came too late and withdraws it (`_claim`):
        until it was looked at twice nothing is written."""
        lease = self._lease()
        stranger = None if lease is None or lease["token"] == self._token else lease["token"]
        if stranger is not None and stranger == self._stranger:
            self._taken_by = _holder(lease)
        self._stranger = stranger
        if stranger is None or self._taken_by is not None:
            self._certain.set()
        else:
            self._certain.clear()

    def _keep_lease(self, done: threading.Event) -> None:
        """Renew it until `done`, or until somebody else has it."""
        while not done.wait(RENEW_SECONDS if self._stranger is None else SETTLE_SECONDS):
            with suppress(OSError):  # storage that cannot be reached now may be later
                self._check_lease()
                if self._taken_by is not None:
                    return
                if self._stranger is None:
                    self._renew()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _holder(lease: Any) -> str:
    """Whose lease that is."""
    return "another process" if lease is None else f"process {lease['process']} on {lease['host']}"


def open_bucket(address: str) -> Bucket:
    """The run at an address like s3://bucket/folder.

    Raises ValueError for what is no address of storage that pyarrow or fsspec knows, and ImportError where
    fsspec needs another package for it.
    """
    parts = urlsplit(address)
    called = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    try:
        filesystem, root = fs.FileSystem.from_uri(address)
    except pa.ArrowInvalid as error:
        if "Unrecognized filesystem" not in str(error):
            raise ValueError(f"{called} is no address: {' '.join(str(error).split())}") from error
        filesystem, root = _by_fsspec(address, called)
    if not root:
        raise ValueError(f"{called} names no bucket")
    return Bucket(address, called, filesystem, root)


def _by_fsspec(address: str, called: str) -> tuple[fs.FileSystem, str]:
    import fsspec

    try:
        known, root = fsspec.core.url_to_fs(address)
    except ValueError as error:
        raise ValueError(
            f"{called}: neither pyarrow nor fsspec knows such storage; give a folder, or s3://, gs://, abfs://"
        ) from error
    return fs.PyFileSystem(fs.FSSpecHandler(known)), str(root)
