"""Fixtures of a run made up for tests: see sweep_runs.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from sweep_runs import Row, make_rows, write_run

from blip_trace.sweep.results import Run, load_run


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_rows(240)


@pytest.fixture(scope="module")
def folder(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", rows, (70, 71, 150))


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return load_run(folder)
