"""Where actors of a run leave notes for those that come after them, and learn that the run has ended.

A folder of the run's, of one command: it is there as long as that command wants shards done. Notes are not
made durable, for they outlive the processes that write them but need not outlive a machine.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from .processes import DEATHS, Assignment
from .shard import Stopped

FOLDER = ".computing"
START = "start"


class Desk:
    """The notes: of each shard that is being done, what is computed and how often that went wrong before; of
    each process that has not loaded the model yet, that it began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._own: Assignment | None = None

    @classmethod
    @contextmanager
    def set_up(cls, root: str) -> Iterator[Desk]:
        """A new one. Those of commands that were killed go, so that none of their actors commits any more."""
        cls.clear(root)
        folder = Path(root, FOLDER, uuid.uuid4().hex)
        folder.mkdir(parents=True)
        desk = cls(folder)
        try:
            yield desk
        finally:
            desk.close()

    @staticmethod
    def clear(root: str | Path) -> None:
        """Take away what a run that was killed has left."""
        shutil.rmtree(Path(root, FOLDER), ignore_errors=True)

    def close(self) -> None:
        """Take it away: renamed first, for then it is gone at once for all who write into it."""
        if self.open():
            self.folder.rename(self.folder.with_name("gone"))
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def open(self) -> bool:
        """Whether the run goes on."""
        return self.folder.is_dir()

    def untouched(self) -> bool:
        """Whether nobody has left a note."""
        return not any(self.folder.iterdir())

    def starting(self) -> int:
        """Say that this process begins; returns how many do that or died of it, since one last succeeded."""
        self._write(self.folder / f"{START}-{socket.gethostname()}-{os.getpid()}", {})
        return len(list(self.folder.glob(f"{START}-*")))

    def started(self) -> None:
        """Say that this process has loaded the model."""
        for path in self.folder.glob(f"{START}-*"):
            path.unlink(missing_ok=True)

    def take(self, number: int) -> Assignment:
        """Begin a shard; if there is a note of it, the process that wrote that has died.

        Raises ChildProcessError where that has happened again and again.
        """
        own = Assignment(number)
        path = self._path(number)
        if path.exists():
            note = json.loads(path.read_bytes())
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
        self._write(self._path(own.number), {**note, "computing": list(ids)})

    def leave(self, number: int) -> None:
        """The shard is committed."""
        self._path(number).unlink(missing_ok=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _write(self, path: Path, content: object) -> None:
        part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        try:
            part.write_text(json.dumps(content), encoding="utf-8")
            part.replace(path)
        except FileNotFoundError:
            raise Stopped from None
