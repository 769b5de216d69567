"""Watching runs from outside: their files, their processes, and how long they take."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sweep_helpers import files_of


@contextmanager
def ends_within(seconds: int) -> Iterator[None]:
    """Ends what takes too long, and, where even that does not help, all tests with a traceback."""

    def late(*_: object) -> None:
        raise TimeoutError(f"the test has taken {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    faulthandler.dump_traceback_later(seconds + 30, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def running(belongs: Callable[[Path], bool] = lambda _: True) -> dict[int, str]:
    """Processes that are alive and that belong, by their folders in /proc; the first word of each command."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if _stat(folder)[0] != "Z" and belongs(folder):
                command = (folder / "cmdline").read_bytes().split(b"\0")[0]
                found[int(folder.name)] = command.decode(errors="replace")
    return found


def of_session(session: int) -> dict[int, str]:
    """The processes of a session."""
    return running(lambda folder: int(_stat(folder)[3]) == session)


def of_environment(mark: str) -> dict[int, str]:
    """The processes that have this in their environment."""
    return running(lambda folder: mark.encode() in (folder / "environ").read_bytes())


def _stat(folder: Path) -> list[str]:
    return (folder / "stat").read_text().rpartition(")")[2].split()


def kept(before: dict[str, tuple[int, str]], folder: Path) -> bool:
    """Whether files that were committed are still what they were, to the time they were written."""
    return before.items() <= files_of(folder).items()
