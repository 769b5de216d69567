"""A disk that tells every step by which a run changes it, and that can end, fail or forget at any of them."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from blip_trace.sweep import disk as real


class Crash(BaseException):
    """The process has ended, as far as the disk can tell."""


@dataclass(frozen=True)
class Step:
    """create, write, fsync, replace, unlink, mkdir, or syncdir."""

    kind: str
    path: str
    data: bytes = b""
    to: str = ""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Disk:
    """Stands between the store and the disk.

    at: the moment at which `end` is called: 2 n is before the nth step, 2 n + 1 behind it, of several writes
    in a row only the first counted; of what is written then, half arrives. A `Crash` that it raises is raised
    again by every later step.
    """

    at: int | None = None
    end: Callable[[], None] = kill
    steps: list[Step] = field(default_factory=list)
    dead: bool = False
    failed: bool = False
    moments: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._fsync, self._replace = os.fsync, os.replace
        self._unlink, self._mkdir = Path.unlink, Path.mkdir
        disk = self

        def unlink(path: Path, missing_ok: bool = False) -> None:
            if not disk.dead and missing_ok and not path.exists():
                return
            disk._step(Step("unlink", str(path)), lambda: disk._unlink(path, missing_ok))

        def mkdir(path: Path, *given: Any, **options: Any) -> None:
            if not path.exists():
                disk._step(Step("mkdir", str(path)), lambda: disk._mkdir(path, *given, **options))

        monkeypatch.setattr(real, "open", self._open, raising=False)
        monkeypatch.setattr(os, "fsync", self._synced)
        monkeypatch.setattr(os, "replace", self._replaced)
        monkeypatch.setattr(Path, "unlink", unlink)
        monkeypatch.setattr(Path, "mkdir", mkdir)

    def _open(self, path: Path, mode: str = "r", **options: Any) -> Any:
        if mode != "wb":
            return open(path, mode, **options)
        return self._step(Step("create", str(path)), lambda: _File(self, path))

    def _synced(self, descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        kind = "syncdir" if os.path.isdir(path) else "fsync"
        self._step(Step(kind, path), lambda: self._fsync(descriptor))

    def _replaced(self, source: str | Path, target: str | Path) -> None:
        step = Step("replace", str(source), to=str(target))
        self._step(step, lambda: self._replace(source, target))

    def _step(self, step: Step, work: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        if self.dead:
            raise Crash
        first = step.kind != "write" or self.steps[-1].kind != "write"
        if first and self.at == self.moments:
            if half is not None:
                half()
            self._end()
        self.steps.append(step)
        done = work()
        if first and self.at == self.moments + 1:
            self._end()
        self.moments += 2 * first
        return done

    def _end(self) -> None:
        self.failed = True
        try:
            self.end()
        except Crash:
            self.dead = True
            raise


class _File(io.FileIO):
    def __init__(self, disk: Disk, path: Path) -> None:
        super().__init__(path, "wb")
        self._disk, self._path = disk, str(path)

    def write(self, data: Any) -> int:
        content = bytes(data)
        write = super().write
        done: int = self._disk._step(
            Step("write", self._path, content),
            lambda: write(content),
            lambda: write(content[: len(content) // 2]),
        )
        return done


def after_power_cut(steps: Sequence[Step], root: Path, target: Path, names_kept: bool) -> None:
    """Write into `target` what is on the disk of `root` if the power fails behind these steps.

    What was never made durable is lost: contents of files always, names of files, and that they were renamed
    or removed, unless `names_kept`, for disks do that in any order.
    """
    content: dict[int, bytes] = {}
    durable_content: dict[int, bytes] = {}
    names: dict[str, int] = {}  # 0: a folder
    durable_names: dict[str, int] = {str(root.parent): 0}
    for number, step in enumerate(steps, start=1):
        match step.kind:
            case "create":
                names[step.path] = number
                content[number] = b""
            case "write":
                content[names[step.path]] += step.data
            case "fsync":
                durable_content[names[step.path]] = content[names[step.path]]
            case "replace":
                names[step.to] = names.pop(step.path)
            case "unlink":
                names.pop(step.path, None)
            case "mkdir":
                names[step.path] = 0
            case "syncdir":
                inside = {path for path in {*names, *durable_names} if os.path.dirname(path) == step.path}
                for path in inside:
                    durable_names.pop(path, None)
                durable_names |= {path: names[path] for path in inside if path in names}
    target.mkdir()
    kept = names if names_kept else durable_names
    for path, inode in sorted(kept.items()):
        place = target / os.path.relpath(path, root)
        if path == str(root) or not path.startswith(f"{root}/"):
            continue
        if inode == 0:
            place.mkdir(exist_ok=True)
        elif place.parent.is_dir():
            place.write_bytes(durable_content.get(inode, b""))
