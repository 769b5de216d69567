"""Where actors of a run leave notes for those that come after them, and learn that the run has ended.

A folder of the run's, of one command, with an `OPEN` in it as long as that command wants shards done. Notes
are not made durable, for they outlive the processes that write them but need not outlive a machine.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from .processes import DEATHS, Assignment
from .shard import Stopped
from .store import Store

FOLDER = ".computing"
START = "start"
OPEN = "open"


class Desk:
    """The notes: of each shard that is being done, what is computed and how often that went wrong before; of
    each process that has not loaded the model yet, that it began."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self.name = name
        self._folder = f"{FOLDER}/{name}"
        self._own: Assignment | None = None

    @classmethod
    @contextmanager
    def set_up(cls, store: Store) -> Iterator[Desk]:
        """A new one. Those of commands that were killed go, so that none of their actors commits any more."""
        cls.clear(store)
        desk = cls(store, uuid.uuid4().hex)
        store.open_folder(desk._folder)
        store.write(desk._path(OPEN), b"", durable=False)
        try:
            yield desk
        finally:
            desk.close()

    @staticmethod
    def clear(store: Store) -> None:
        """Take away what a run that was killed has left."""
        store.drop_folder(FOLDER)

    def close(self) -> None:
        """Take it away."""
        self._store.remove(self._path(OPEN))
        self.clear(self._store)

    def open(self) -> bool:
        """Whether the run goes on."""
        return self._store.has(self._path(OPEN))

    def untouched(self) -> bool:
        """Whether nobody has left a note."""
        return set(self._store.names(self._folder)) <= {OPEN}

    def starting(self) -> int:
        """Say that this process begins; returns how many do that or died of it, since one last succeeded."""
        self._write(f"{START}-{socket.gethostname()}-{os.getpid()}", {})
        return len(self._starts())

    def started(self) -> None:
        """Say that this process has loaded the model."""
        for name in self._starts():
            self._store.remove(self._path(name))

    def _starts(self) -> list[str]:
        return [name for name in self._store.names(self._folder) if name.startswith(f"{START}-")]

    def take(self, number: int) -> Assignment:
        """Begin a shard; if there is a note of it, the process that wrote that has died.

        Raises ChildProcessError where that has happened again and again.
        """
        own = Assignment(number)
        note = self._note(number)
        if note is not None:
            sets = {name: set(note[name]) for name in ("seen", "suspects", "lost")}
            own = Assignment(number, note["deaths"], **sets)
            own.died(note["computing"])
            if own.deaths >= DEATHS:
                raise ChildProcessError(f"{DEATHS} processes ended during shard {number}")
        self._own = own
        self.tell((), 0)
        return own

    def tell(self, ids: Sequence[str], done: int) -> None:
        """Note what is computed from now on. Raises Stopped where that is not wanted any more, and so keeps
        whoever was forgotten from committing. done: not noted."""
        own = self._own
        assert own is not None
        note = {
            name: sorted(value) if isinstance(value, set) else value for name, value in asdict(own).items()
        }
        self._write(_note_name(own.number), {**note, "computing": list(ids)})

    def leave(self, number: int) -> None:
        """The shard is committed."""
        self._store.remove(self._path(_note_name(number)))

    def _note(self, number: int) -> Any:
        try:
            return self._store.read_json(self._path(_note_name(number)))
        except FileNotFoundError:
            return None

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _write(self, name: str, content: object) -> None:
        if not self.open():
            raise Stopped
        try:
            self._store.write_json(self._path(name), content, durable=False)
        except FileNotFoundError:
            raise Stopped from None


def _note_name(number: int) -> str:
    return f"{number:06d}.json"
