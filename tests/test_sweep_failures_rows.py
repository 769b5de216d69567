"""Sweeps over tables with strange texts and broken rows.

Each is a row with a reason; a table that is broken as a whole is refused by name before anything is planned.
The numbers of faults are those of the table, as in test_sweep_stops.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep_data import QUESTION, encoded, scene, table
from sweep_helpers import order, rows_of

from blip_trace.sweep.driver import sweep

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


def test_strange_texts(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 13: ids that are missing, the same or of any letters each name one row; questions that are empty
    or longer than the model can take fail, with the reason."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(encoded(scene(1)))
    rows: list[dict[str, Any]] = [
        {"id": "a", "question": QUESTION},
        {"id": "a", "question": "is the shape red ?"},
        {"id": "a#2", "question": QUESTION},
        {"id": None, "question": QUESTION},
        {"question": QUESTION},
        {"id": 7, "question": QUESTION},
        {"id": "größe 🐈 \u202e x", "question": "größe 🐈 ?"},
        {"id": "nul\0", "question": "what \0 is"},
        {"id": "half \ud800", "question": QUESTION},
        {"id": "in half", "question": "what \udfff color"},
        {"id": "empty", "question": ""},
        {"id": "blank", "question": " \n "},
        {"id": "long", "question": "what " * 600},
        {"id": "very long", "question": "what " * 100_000},
        {"id": "../../etc", "question": QUESTION},
    ]
    data = table(tmp_path / "data", [{**row, "image": "x.png"} for row in rows])
    outcome = sweep(order(tiny_folder, data), tmp_path / "run")
    found = rows_of(tmp_path / "run")
    assert len(found) == len(rows) == outcome.statuses.total()
    assert {"a", "a#2", "a#2#2", "row-3", "row-4", "7", "half ?", "../../etc"} <= found.keys()
    assert "größe 🐈 \u202e x" in found
    reasons = {id: row["reason"] for id, row in found.items() if row["status"] != "ok"}
    assert reasons.keys() == {"half ?", "in half", "empty", "blank", "long", "very long"}
    assert "600" in reasons["long"] or "602" in reasons["long"]
    assert "the model takes 16" in reasons["very long"]
    assert "question is empty" in reasons["empty"]
    assert "not UTF-8" in reasons["in half"]
    assert all("\n" not in reason for reason in reasons.values())
    assert sweep(None, tmp_path / "run").complete


def test_broken_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 14: a row that is none is a failed row that names its line; those beside it are traced."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(encoded(scene(1)))
    good = json.dumps({"id": "good", "image": "x.png", "question": QUESTION})
    lines = [good, "{broken", "[1, 2]", '"text"', "null", good.replace("good", "last")]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    outcome = sweep(order(tiny_folder, tmp_path / "data" / "a.jsonl"), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows["good"]["status"] == rows["last"]["status"] == "ok"
    broken = [row for row in rows.values() if row["status"] == "error"]
    assert len(broken) == outcome.failed == 4
    assert all("a.jsonl" in row["reason"] for row in broken)
    assert len({row["reason"] for row in broken}) == 4  # each names its line
    given = replace(order(tiny_folder, tmp_path / "data" / "a.jsonl"), on_error="stop")
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        sweep(given, tmp_path / "strict")
    assert not (tmp_path / "strict" / "plan.json").exists()


def test_broken_data(tmp_path: Path) -> None:
    """Fault 14: a file that is broken as a whole is named, in one sentence, before anything is planned."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        sweep(order("vqa", tmp_path / "a.parquet"), tmp_path / "run")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        sweep(order("vqa", tmp_path / "b.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_folders_that_are_no_text(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 15: data may lie in a folder whose name is no UTF-8, also where a reason names it."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    data = table(strange, [{"id": str(n), "image": f"{n}.png", "question": QUESTION} for n in range(2)])
    (strange / "0.png").write_bytes(encoded(scene(1)))
    given = order(tiny_folder, data)
    assert sweep(given, tmp_path / "run").statuses == {"ok": 1, "error": 1}
    assert "caf?" in rows_of(tmp_path / "run")["1"]["reason"]
    assert sweep(None, tmp_path / "run").complete
