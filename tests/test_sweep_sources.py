"""Which format a data set has, and what is told of it before it is traced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from click.testing import Result
from rich.console import Console
from sweep_data import COCO_CSV, png, read, refused, write
from typer.testing import CliRunner

from blip_trace import BackendUnavailableError
from blip_trace.cli import app
from blip_trace.cli_errors import one_sentence_errors
from blip_trace.sweep.describe import describe
from blip_trace.sweep.sources import FORMATS, DataSet, open_data


def test_scenes() -> None:
    """A set that takes no space: the same for a seed, another for another."""
    samples = read("scenes:3")
    assert len(samples) == 15
    assert len({sample.id for sample in samples}) == 15
    assert [sample.image for sample in samples[::5]] == ["scene:0", "scene:1", "scene:2"]
    assert {sample.type for sample in samples} == {"color", "shape", "position", "count", "presence"}
    assert all(sample.answers for sample in samples)
    assert read("scenes:1:4")[0].image == "scene:4000000"
    assert open_data("scenes:1").media.exists("scene:0")
    for name in ("scenes:0", "scenes:", "scenes:1:-1", "scenes:1000001"):
        refused(name, "names no scenes")
    refused("scenes:1", "leave out --images", split="train")


def test_unknown_formats(tmp_path: Path) -> None:
    """What cannot be told is asked for; nothing is guessed."""
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        open_data(tmp_path / "none")
    write(tmp_path / "a.csv", "image,question\n")
    with pytest.raises(FileNotFoundError, match="no folder of images"):
        open_data(tmp_path / "a.csv", images=tmp_path / "none")
    refused(tmp_path, "is of no format that is known here, name it with --format: table .*; scenes")
    refused(tmp_path / "a.csv", "there is no format 'coco'; there are table, coco-qa", "coco")
    for name in FORMATS.keys() - {"table"}:
        refused(tmp_path / "a.csv", re.escape(str(tmp_path / "a.csv")), name)
    write(tmp_path / "both.csv", COCO_CSV.strip() + ",Image_IDs,Questions_Answers\n")
    refused(tmp_path / "both.csv", "could be coco-qa or clevr: say which with --format")


def test_without_torch() -> None:
    """Looking at data takes no seconds of imports."""
    script = (
        "import sys, blip_trace.cli, blip_trace.sweep.sources, blip_trace.sweep.describe\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# Describing


@pytest.fixture
def data(tmp_path: Path) -> DataSet:
    rows = [
        "1,a.png,one two three,red,color,b.png,x,blue,y",
        "2,a.png,one,red,color,,,,",
        "2,missing.png,one two,blue,shape,gone.png,,,",
        "4,a.png,one,,,,,,",
        "5,a.png",
    ]
    head = "id,image,question,answer,type,corrupt_image,corrupt_question,foil,subject\n"
    write(tmp_path / "a.png", png())
    write(tmp_path / "b.png", png())
    return open_data(write(tmp_path / "a.csv", head + "\n".join(rows) + "\n"))


def test_describe(data: DataSet) -> None:
    """Every number, of a set small enough to count by hand."""
    found = describe(data).to_dict()
    assert found.pop("first_problems") == ["a.csv line 6: it has 2 columns, the header 9"]
    assert found == {
        "format": "table",
        "path": data.path,
        "samples": 5,
        "problems": 1,
        "repeated_ids": 1,
        "images": 4,
        "missing_images": 2,
        "first_missing": ["missing.png", "gone.png"],
        "questions_per_image": 2.0,
        "most_questions_per_image": 3,
        "question_words": 1.75,
        "most_question_words": 3,
        "types": 2,
        "common_types": {"color": 2, "shape": 1},
        "answers": 2,
        "common_answers": {"red": 2, "blue": 1},
        "without_answer": 1,
        "with_corrupt_image": 2,
        "with_corrupt_question": 1,
        "with_foil": 1,
        "with_subject": 1,
    }
    assert describe(data, limit=2).samples == 2


def test_describe_nothing(tmp_path: Path) -> None:
    """A table without rows has numbers too."""
    found = describe(open_data(write(tmp_path / "a.csv", "image,question\n")))
    assert (found.samples, found.images, found.questions_per_image) == (0, 0, 0.0)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["data", "describe", *map(str, arguments)])


def test_command(data: DataSet) -> None:
    """What is printed, for people and for programs."""
    result = call(data.path)
    assert result.exit_code == 0, result.output
    for text in ("table", "missing.png", "a.csv line 6", "2: red 2, blue 1", "1.8, at most 3"):
        assert text in result.stdout
    result = call(data.path, "--json", "--limit", 3)
    assert json.loads(result.stdout) == describe(data, 3).to_dict()
    assert call("scenes:2", "--format", "scenes").exit_code == 0


def test_markup_of_the_data(tmp_path: Path) -> None:
    """Texts of the data are printed as they are, not taken as the terminal's markup."""
    write(tmp_path / "[red].csv", "image,question,answer\n[bold]x.png,q,[/bold]\n")
    result = call(tmp_path / "[red].csv")
    assert result.exit_code == 0, result.output
    for text in ("[red].csv", "[bold]x.png", "[/bold] 1"):
        assert text in result.stdout


def test_command_refuses(tmp_path: Path) -> None:
    """Bad input: exit code 2 and one sentence."""
    write(tmp_path / "a.csv", "text\nx\n")
    for arguments, match in (
        ((tmp_path / "none",), "there is no file or folder"),
        ((tmp_path / "a.csv",), "name it with --format"),
        ((tmp_path / "a.csv", "--format", "table"), "has no column image"),
        ((tmp_path / "a.csv", "--format", "nonsense"), "there is no format 'nonsense'"),
        (("scenes:x",), "names no scenes"),
    ):
        result = call(*arguments)
        assert result.exit_code == 2, result.output
        assert len(result.stderr.strip().splitlines()) == 1
        assert match in result.stderr
        assert not result.stdout


def test_one_sentence_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend that is not there is bad input too; other runtime errors are bugs and stay visible."""
    for error, code in ((BackendUnavailableError("not\nbuilt"), 2), (KeyboardInterrupt(), 130)):
        with pytest.raises(typer.Exit) as end, one_sentence_errors(Console(stderr=True)):
            raise error
        assert end.value.exit_code == code
    assert capsys.readouterr().err == "blip-trace: not built\ninterrupted\n"
    with pytest.raises(RuntimeError, match="bug"), one_sentence_errors(Console(stderr=True)):
        raise RuntimeError("bug")
