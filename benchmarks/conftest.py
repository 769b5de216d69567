"""Options, the report table, and the gate: every ratio must have a committed floor and reach it."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from gpu_report import write_report

FLOORS = Path(__file__).with_name("floors.json")
ROWS: list[tuple[str, float, float | None]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="fewer rounds and cells: about two minutes in all")


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def gpu() -> Iterator[None]:
    """These benchmarks need one; with FAIL_WITHOUT_CUDA=1 its absence is an error. The CPU helps it with all
    its cores."""
    if not torch.cuda.is_available():
        without = "there is no GPU"
        pytest.fail(without) if os.environ.get("FAIL_WITHOUT_CUDA") == "1" else pytest.skip(without)
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


Gate = Callable[[dict[str, float]], None]


@pytest.fixture(scope="session")
def gate() -> Gate:
    """Record ratios, all of them, then fail where one is below its floor or has none."""
    floors = json.loads(FLOORS.read_text())

    def check(found: dict[str, float]) -> None:
        ROWS.extend((name, value, floors.get(name)) for name, value in found.items())
        for name, value in found.items():
            floor = floors.get(name)
            assert floor is not None, f"{name} = {value:.3g} has no floor in {FLOORS.name}: commit one"
            assert value >= floor, f"{name} = {value:.3g} is below its floor of {floor:.3g}"

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    if written := write_report(ROWS):
        write(f"written: {os.path.relpath(written)} and the same as a table")
    terminalreporter.section("times of the others over the engine's")
    write(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {_capability()}")
    write(f"{'':58}{'measured':>10}{'floor':>10}")
    for name, value, floor in ROWS:
        write(f"{name:58}{value:>10.3g}{'none' if floor is None else f'{floor:.3g}':>10}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _capability() -> str:
    from blip_trace import ops

    reason = ops.native_unavailable_reason()
    return "native kernels" if reason is None else f"no native kernels: {reason}"
