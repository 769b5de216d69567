"""What the pages about other tools show is what happens: their code runs, and prints what they say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PAGES = sorted((Path(__file__).parents[1] / "docs" / "other-tools").glob("*.md"))
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


@pytest.mark.filterwarnings("ignore:Module '.*' has a submodule named 'output'")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict[str, Any] = {}
    printed, said = io.StringIO(), []
    for kind, code in BLOCK.findall(page.read_text()):
        if kind == "python":
            file = tmp_path / f"{len(said)}-{len(code)}.py"  # nnsight reads a trace's source
            file.write_text(code)
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(file), "exec"), names)
        elif not kind:
            said.append(code)
    assert said
    found = [float(number) for number in NUMBER.findall(printed.getvalue())]
    for block in said:
        expected = [float(number) for number in NUMBER.findall(block)]
        places = range(len(found) - len(expected) + 1)
        # the last digits are the machine's
        assert any(
            np.allclose(found[first : first + len(expected)], expected, rtol=2e-3, atol=2e-4)
            for first in places
        ), block
