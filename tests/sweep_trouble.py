"""Trouble for whoever traces, in whatever process: a folder of files says what is to go wrong.

Workers of a Ray cluster are started by others and see nothing that a test has patched. But every interpreter
imports `sitecustomize`, and one that finds that of a `Trouble` looks into its folder before each pass.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = "SWEEP_TROUBLE"
SLOW, KILL, KILL_AT = "slow", "kill", "kill at"
Measure = Callable[..., Any]


class Trouble:
    """What goes wrong from now on until `end`, in all processes that were started with the environment."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sitecustomize.py").write_text("import sweep_trouble\nsweep_trouble.install()\n")
        paths = [str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"PYTHONPATH": os.pathsep.join(paths), FOLDER: str(folder)}

    def slow(self, seconds: float) -> None:
        """Each pass takes so much longer."""
        (self.folder / SLOW).write_text(str(seconds))

    def kill_one(self) -> None:
        """The process that comes to a pass next is killed."""
        (self.folder / KILL).touch()

    def has_killed(self) -> bool:
        """Whether one was."""
        return not (self.folder / KILL).exists()

    def kill_at(self, question: str) -> None:
        """Every process is killed that comes to a pass with this question."""
        (self.folder / KILL_AT).write_text(question)

    def end(self) -> None:
        """All goes well again."""
        for name in (SLOW, KILL, KILL_AT):
            (self.folder / name).unlink(missing_ok=True)


def install() -> None:
    """In an interpreter that begins: nothing, until it imports the tracer."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "blip_trace.tracer":
            return None
        spec = PathFinder.find_spec(fullname, path)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module.Tracer.measure = troubled(module.Tracer.measure, Path(os.environ[FOLDER]))

        loader.exec_module = exec_module
        return spec


def troubled(measure: Measure, folder: Path) -> Measure:
    """`Tracer.measure`, for which things go wrong."""

    def measured(self: Any, request: Any, prepared: Any, *rest: Any) -> Any:
        _meet(folder, [own.asked.question for own in prepared])
        return measure(self, request, prepared, *rest)

    return measured


def _meet(folder: Path, questions: Sequence[str]) -> None:
    with suppress(FileNotFoundError):
        time.sleep(float((folder / SLOW).read_text()))
    with suppress(FileNotFoundError):
        (folder / KILL).unlink()  # which only one process can
        os.kill(os.getpid(), signal.SIGKILL)
    with suppress(FileNotFoundError):
        if (folder / KILL_AT).read_text() in questions:
            os.kill(os.getpid(), signal.SIGKILL)
