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
DECIMAL = re.compile(r"-?\d+\.\d*(?:e[+-]?\d+)?")


def parts(text: str) -> tuple[str, list[float]]:
    """All that must be as it is, integers too, without white space; and the decimals that stand in it."""
    return "".join(DECIMAL.sub("#", text).split()), [float(number) for number in DECIMAL.findall(text)]


def check(page: Path, folder: Path) -> None:
    """Run a page's code. A block without a language is what the code before it prints, all of it; where the
    page says "Both print", each of the two pieces before."""
    text, end = page.read_text(), 0
    names: dict[str, Any] = {}
    printed: list[str] = []
    checked = 0
    for block in BLOCK.finditer(text):
        prose, end = text[end : block.start()], block.end()
        kind, content = block.groups()
        if kind == "python":
            file = folder / f"{len(printed)}.py"  # nnsight reads a trace's source
            file.write_text(content)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(content, str(file), "exec"), names)
            printed.append(output.getvalue())
        elif kind:
            assert kind.startswith("python no-run: "), kind
        else:
            ways = 2 if "Both print" in prose else 1
            assert len(printed) >= ways
            words, numbers = parts(content)
            for own_words, own_numbers in map(parts, printed[-ways:]):
                assert own_words == words
                # the last digits are the machine's
                np.testing.assert_allclose(own_numbers, numbers, rtol=2e-3, atol=2e-4)
            checked += 1
    assert checked


@pytest.mark.filterwarnings("ignore:Module '.*' has a submodule named 'output'")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_prints_what_the_page_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    check(page, tmp_path)


def page_of(folder: Path, ways: tuple[str, ...], said: str) -> Path:
    """A page whose pieces of code print these texts, and which says that they print another one."""
    pieces = [f"```python\nprint({way!r})\n```\n\nAs fast: 2.5\n\n" for way in ways]
    verb = "Both print" if len(ways) == 2 else "prints"
    page = folder / "page.md"
    page.write_text(f"{''.join(pieces)}{verb}\n\n```\n{said}\n```\n")
    return page


@pytest.mark.parametrize("ways", [1, 2])
@pytest.mark.parametrize(
    ("printed", "said"),
    [
        ("torch.Size([4, 3, 51])", "torch.Size([4, 3, 51])"),
        ("circle [0.12341, 1.]", "circle [ 0.1234,\n  0.9999]"),
        ("-2.2160e-04 7", "-2.2161e-04 7"),
    ],
)
def test_pages_that_are_right(printed: str, said: str, ways: int, tmp_path: Path) -> None:
    check(page_of(tmp_path, (printed,) * ways, said), tmp_path)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("torch.Size([4, 3, 51])", "torch.Size([4, 3, 52])"),
        ("torch.Size([4, 9])", "torch.Size([9])"),
        ("577", "576"),
        ("0.1234", "0.1334"),
        ("0.1234", "-0.1234"),
        ("[0.1234, 0.5678]", "[0.1234]"),
        ("circle 0.1234", "square 0.1234"),
        ("1", ""),
    ],
)
def test_pages_that_are_wrong(right: str, wrong: str, tmp_path: Path) -> None:
    """Be it of the one way, of the first of two or of the second."""
    for printed, said in ((right, wrong), (wrong, right)):
        for ways in ((printed,), (printed, said), (said, printed)):
            with pytest.raises(AssertionError):
                check(page_of(tmp_path, ways, said), tmp_path)


@pytest.mark.parametrize("page", ["", "```python\nprint(1)\n```\n", "```\n1\n```\n", "```text\n1\n```\n"])
def test_pages_that_say_nothing_that_could_be_wrong(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    with pytest.raises(AssertionError):
        check(path, tmp_path)
