"""What `make gpu` found, written down: benchmarks/results/<name of the GPU>.json, and the same as a table."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).with_name("results")
_figures: list[dict[str, Any]] = []


def figure(name: str, value: float, unit: str) -> None:
    """Note a figure for the report; it is printed too."""
    _figures.append({"name": name, "value": value, "unit": unit})
    print(f"\n{name}: {value:.4g} {unit}")


def write_report(ratios: Sequence[tuple[str, float, float | None]]) -> Path | None:
    """Write all figures and the ratios (name, measured, floor) of this run, if any are of a GPU's. What was
    found there before, by the same versions, and was not measured again, stays."""
    rows = [{"name": name, "value": value, "floor": floor} for name, value, floor in ratios if "GPU" in name]
    if not _figures or not torch.cuda.is_available():
        return None
    import transformers
    import triton

    found = torch.cuda.get_device_properties(0)
    report = {
        "gpu": found.name,
        "multiprocessors": found.multi_processor_count,
        "memory": found.total_memory,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "figures": list(_figures),
        "ratios": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (re.sub(r"\W+", "-", found.name.lower()).strip("-") + ".json")
    if path.exists():
        before = json.loads(path.read_text())
        if before["versions"] == report["versions"]:
            for part in ("figures", "ratios"):
                report[part] = _renewed(before[part], report[part])
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(_table(report))
    return path


def _renewed(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by name, each as it was measured last, in the order of their first measurement."""
    return list({row["name"]: row for row in (*before, *now)}.values())


def _table(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"# {report['gpu']}", "", versions, "", "| figure | | |", "| --- | ---: | --- |"]
    lines += [f"| {own['name']} | {own['value']:.4g} | {own['unit']} |" for own in report["figures"]]
    lines += ["", "| ratio | measured | to reach |", "| --- | ---: | ---: |"]
    for own in report["ratios"]:
        floor = "" if own["floor"] is None else f"{own['floor']:g}"
        lines.append(f"| {own['name']} | {own['value']:.3g} | {floor} |")
    return "\n".join(lines) + "\n"
