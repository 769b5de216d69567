"""The command line: what it writes and prints, and how it fails."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import blip_trace
from blip_trace import Tracer, TraceResult
from blip_trace.cli import app

QUESTION = "what color is the shape ?"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory, picture: PIL.Image.Image) -> Path:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    picture.save(path)
    return path


def call(*arguments: Any, **options: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def trace(model: Path, image: Path, out: Path, *more: Any, question: str = QUESTION) -> Result:
    given = ("--model", model, "--image", image, "--question", question, "--out", out)
    return call("run", *given, "--backend", "reference", "--samples", 2, *more)


def refused(result: Result, match: str) -> None:
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert re.search(match, lines[0])
    assert "Traceback" not in result.output
    assert not result.stdout


def test_writes_and_prints(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = trace(tiny_folder, image, out, "--kinds", "hidden, mlp", "--answer", "red", "--window", 2)
    assert result.exit_code == 0, result.output
    maps = [f"{stack}-{kind}.png" for stack in ("text_encoder", "text_decoder") for kind in ("hidden", "mlp")]
    assert sorted(file.name for file in out.iterdir()) == sorted([*maps, "trace.json", "trace.safetensors"])
    for name in maps:
        with PIL.Image.open(out / name) as picture:
            picture.load()

    saved = TraceResult.load(out / "trace.safetensors")
    numbers = json.loads((out / "trace.json").read_text())
    assert numbers == json.loads(json.dumps(saved.to_dict()))
    assert numbers["answer"] == "red"
    assert numbers["settings"]["window"] == 2
    assert saved.samples("text_encoder", "mlp").shape == (2, 8, 2)

    for text in (
        QUESTION,
        "red",
        "text_encoder, mlp",
        "text_decoder, hidden",
        "[CLS]",
        "strongest",
        str(out),
    ):
        assert text in result.stdout
    assert f"P(answer) = {saved.high_score:.4g}" in result.stdout
    assert "\x1b" not in result.stdout  # no colours where there is no terminal
    assert not result.stderr


def test_heads_at_chosen_tokens(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    given = ("--kinds", "cross_attn_head", "--tokens", -1, "--tokens", 1, "--stacks", "text_encoder")
    result = trace(tiny_folder, image, tmp_path, *given)
    assert result.exit_code == 0, result.output
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert saved.grid("text_encoder", "cross_attn_head").shape == (2, 2, 2)  # heads, tokens, layers
    assert saved.positions["text_encoder"][1] == 1
    assert "head 0" in result.stdout


def test_options_reach_the_trace(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        given = ("--kinds", "mlp", "--kinds", "self_attn", "--stacks", "text_decoder", "--dtype", "bfloat16",
                 "--samples", 3, "--mean", 0, "--std", 2, "--mode", "add", "--seed", 7, "--threads", 1,
                 "--memory", 64, "--direction", "noise")  # fmt: skip
        assert trace(tiny_folder, image, tmp_path, *given).exit_code == 0
    finally:
        torch.set_num_threads(threads)
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert set(saved.restored) == {("text_decoder", "mlp"), ("text_decoder", "self_attn")}
    assert saved.settings["dtype"] == "bfloat16"
    assert saved.settings["threads"] == 1
    assert saved.settings["direction"] == "noise"
    noise = blip_trace.GaussianNoise(mean=0.0, std=2.0, mode="add", samples=3, seed=7)
    assert saved.settings["corruption"] == repr(noise)


def test_the_model_that_ships(image: Path, tmp_path: Path) -> None:
    result = call("run", "--image", image, "--question", "what color is the circle", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert saved.tokens("text_encoder") == ("[CLS]", "what", "color", "is", "the", "circle", "[SEP]")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--kinds", "attention"), "unknown kind 'attention'"),
        (("--kinds", "hidden,"), "unknown kind ''"),
        (("--direction", "both"), "unknown direction 'both'"),
        (("--tokens", 40), "no token 40"),
        (("--stacks", "vision"), "vision"),
        (("--backend", "fast"), "unknown backend 'fast'"),
        (("--dtype", "float64"), "unknown dtype 'float64'"),
        (("--window", "0"), "window must be"),
        (("--samples", "0"), "samples must be"),
        (("--std", "nan"), "std must be"),
        (("--mode", "divide"), "unknown noise mode"),
        (("--answer", "giraffe"), "outside the model's vocabulary"),
        (("--question", " "), "the question is empty"),
        (("--question", "what " * 20), "the question has 22 tokens"),
        (("--image", "missing.png"), "there is no image file missing.png"),
        (("--image", "."), "is a folder"),
        (("--image", __file__), "is no image of a known format"),
        (("--model", "missing"), "there is no model folder 'missing'"),
        (("--model", "."), "holds no config.json"),
        (("--model", __file__), "is a file"),
    ],
)
def test_bad_input(tiny_folder: Path, image: Path, tmp_path: Path, options: Any, match: str) -> None:
    out = tmp_path / "out" / "deeper"
    refused(trace(tiny_folder, image, out, *options), match)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options", [(), ("--image", "a.png"), ("--threads", "0"), ("--samples", "many"), ("--colour", "red")]
)
def test_bad_usage(options: tuple[str, ...]) -> None:
    result = call("run", *options)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_folders_that_cannot_be_written(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/blip-trace"), Path("/dev/full")):
        # found out before any work: the model is not even looked for
        refused(trace(Path("missing"), image, out), "Not a directory|is a file|No such file|denied")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_what_was_there(
    tiny_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trace.json").write_text("older")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TraceResult, "save", full)
    refused(trace(tiny_folder, image, tmp_path), "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]
    assert (tmp_path / "trace.json").read_text() == "older"


def test_native_where_it_is_not_built(
    tiny_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("ops", "tracer"):
        monkeypatch.setattr(f"blip_trace.{module}.native_unavailable_reason", lambda: "Not built: make it.")
    refused(trace(tiny_folder, image, tmp_path / "out", "--backend", "native"), "Not built: make it.")
    result = trace(tiny_folder, image, tmp_path / "out", "--backend", "auto")
    assert result.exit_code == 0
    assert result.stderr.strip().splitlines() == [
        "note: tracing with the slower reference backend: Not built: make it."
    ]


def test_ctrl_c(tiny_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real signal, in the middle of the work."""
    whole = Tracer.trace

    def interrupted(*arguments: Any, **options: Any) -> TraceResult:
        options["progress"] = lambda share: signal.raise_signal(signal.SIGINT)
        return whole(*arguments, **options)

    monkeypatch.setattr(Tracer, "trace", interrupted)
    result = trace(tiny_folder, image, tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert not any(tmp_path.iterdir())


def test_help_and_version() -> None:
    assert call("--version").stdout == f"blip-trace {blip_trace.__version__}\n"
    top, run = call("--help").stdout, call("run", "--help").stdout
    assert "run" in top
    assert "doctor" in top
    for option in ("--model", "--image", "--question", "--out", "--backend", "--dtype", "--samples", "--std",
                   "--window", "--tokens", "--direction", "--kinds", "--stacks", "--seed",
                   "--answer", "--threads"):  # fmt: skip
        assert option in run
    assert "Salesforce/blip-vqa-base" in run


def test_doctor() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for word in ("torch", "transformers", "native", "reference"):
        assert word in result.stdout


def test_as_a_process(image: Path, tmp_path: Path) -> None:
    """`python -m blip_trace` on a broken model: one line on stderr, nothing else, exit code 2."""
    command = [sys.executable, "-m", "blip_trace", "run", "--model", tmp_path, "--image", image]
    done = subprocess.run(
        [*command, "--question", "what", "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"blip-trace: {tmp_path} is no model folder: it holds no config.json\n"
    assert not any(tmp_path.iterdir())
