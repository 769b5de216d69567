"""That the benchmarks and the tests of a GPU run, and what they write: without one, on the pretended one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(plugin: str, folder: str, *arguments: str, **environment: str) -> str:
    """What pytest prints of tests of which none fails and none is skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", *arguments],
        cwd=ROOT / folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout
    return done.stdout


def rehearsed(folder: Path, *files: str) -> Any:
    """The report after these benchmarks."""
    run("rehearsal", "benchmarks", *files, REHEARSAL=str(folder))
    return json.loads((folder / "results" / "a-pretended-gpu.json").read_text())


def test_the_benchmarks_run_and_their_reports_add_up(tmp_path: Path) -> None:
    """One file after the other, as where time on a GPU is short."""
    maps = rehearsed(tmp_path, "bench_gpu.py")
    assert maps["gpu"] == "A pretended GPU"
    whole = rehearsed(tmp_path, "bench_gpu_ops.py")
    floors = json.loads((ROOT / "benchmarks" / "floors.json").read_text())
    expected = {name for name in floors if name.startswith("GPU")}
    assert {row["name"] for row in whole["ratios"]} == expected
    assert [row for row in whole["ratios"] if row in maps["ratios"]] == maps["ratios"]
    names = [row["name"] for row in whole["figures"]]
    assert len(set(names)) == len(names) > len(maps["figures"]) > 10
    table = (tmp_path / "results" / "a-pretended-gpu.md").read_text()
    assert all(name in table for name in (*names, *expected))


def test_the_tests_run() -> None:
    """But for those of a real device's memory."""
    assert "9 passed" in run("rehearsal_of_tests", "tests", "test_gpu.py", "-k", "not memory and not budget")
