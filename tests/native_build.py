"""Targets of the native build that are made for tests alone."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "build" / "native"


def built(target: str) -> Path:
    """Build a target, or see that nothing has changed, and return the folder of the build."""
    cmake = shutil.which("cmake", path=os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"])))
    if cmake is None or not (FOLDER / "build.ninja").is_file():
        pytest.fail("the native build is not there: run `make build`")
    with (FOLDER / "tests.lock").open("w") as lock:  # test files run side by side
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run([cmake, "--build", FOLDER, "--target", target], capture_output=True, text=True)
    if done.returncode:
        pytest.fail(f"target {target} does not build:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    return FOLDER
