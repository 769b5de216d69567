"""The command line: what it writes and prints, and how it fails."""

from __future__ import annotations

import inspect
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
from blip_trace import Tracer, TraceResult, cli
from blip_trace.cli import app
from blip_trace.cli_progress import duration

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
    assert numbers.pop("by_metric") == {"probability": {name: numbers[name] for name in
                                                        ("high_score", "low_score", "maps")}}  # fmt: skip
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


def test_the_image_encoder_is_drawn_on_the_picture(
    tiny_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ("--corrupt", "pixels", "--stacks", "vision,text_encoder", "--patch-group", 2)
    assert trace(tiny_folder, image, tmp_path / "few", *given).exit_code == 0
    few = ["text_encoder-hidden.png", "vision-hidden-image.png", "vision-hidden.png"]
    assert sorted(file.name for file in (tmp_path / "few").glob("*.png")) == few
    saved = TraceResult.load(tmp_path / "few" / "trace.safetensors")
    assert saved.tokens("vision") == ("class", "0,0", "0,1", "1,0", "1,1")

    monkeypatch.setattr("blip_trace.terminal.MAX_ROWS", 16)
    result = trace(tiny_folder, image, tmp_path / "many", "--corrupt", "pixels", "--stacks", "vision")
    assert [file.name for file in (tmp_path / "many").glob("*.png")] == ["vision-hidden-image.png"]
    assert "(17 rows, not printed)" in result.stdout
    assert "strongest" in result.stdout


def test_several_metrics(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    given = ("--metrics", "probability,logit_difference", "--answer", "red", "--foil", "blue")
    result = trace(tiny_folder, image, tmp_path, "--stacks", "text_encoder", *given)
    assert result.exit_code == 0, result.output
    names = ["text_encoder-hidden-logit_difference.png", "text_encoder-hidden.png"]
    assert sorted(file.name for file in tmp_path.glob("*.png")) == names
    numbers = json.loads((tmp_path / "trace.json").read_text())
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    for metric in ("probability", "logit_difference"):
        shown = saved.by(metric)
        expected = {name: shown.to_dict()[name] for name in ("high_score", "low_score", "maps")}
        assert numbers["by_metric"][metric] == expected
    assert "P(answer)" in result.stdout
    assert "logit" not in result.stdout.split("wrote")[0]


def test_a_screen_says_what_is_exact(tiny_folder: Path, image: Path, tmp_path: Path) -> None:
    given = ("--method", "screen", "--top", 2, "--steps", 2)
    result = trace(tiny_folder, image, tmp_path, *given)
    assert result.exit_code == 0, result.output
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert saved.settings["method"] == "Screen(top=2, steps=2, check=False)"
    cells = sum(maps[0].numel() for maps in saved.restored.values())
    assert f"2 of {cells} cells; ~ marks estimates" in result.stdout
    assert re.search(r" ~-?\d", result.stdout)
    assert "rank correlation" not in result.stdout

    result = trace(tiny_folder, image, tmp_path, *given, "--check")
    screen = TraceResult.load(tmp_path / "trace.safetensors").settings["screen"]
    expected = f"rank correlation {screen['rank_correlation']:.2f}, {100 * screen['missed']:.0f} % of the"
    assert expected in result.stdout


@pytest.mark.parametrize("method", ["attribution", "integrated_gradients"])
def test_estimates_are_marked(tiny_folder: Path, image: Path, tmp_path: Path, method: str) -> None:
    result = trace(tiny_folder, image, tmp_path, "--stacks", "text_encoder", "--method", method)
    assert result.exit_code == 0, result.output
    assert "0 of 16 cells" in result.stdout
    strongest = result.stdout.split("strongest")[1].split("wrote")[0].strip().splitlines()[1:]
    assert len(strongest) == 5
    assert all("~" in line for line in strongest)


def test_severed_paths_intervals_and_tokens_of_any_stack(
    tiny_folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    plot = TraceResult.plot

    def watched(*arguments: Any, **options: Any) -> Any:
        levels.append(options["level"])
        return plot(*arguments, **options)

    monkeypatch.setattr(TraceResult, "plot", watched)
    given = ("--sever", "self_attn, mlp", "--interval", 0.9, "--tokens", "0,-1", "--tokens", "text_decoder:0")
    result = trace(tiny_folder, image, tmp_path, *given)
    assert result.exit_code == 0, result.output
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert saved.settings["sever"] == ["self_attn", "mlp"]
    assert saved.positions == {"text_encoder": (0, 7), "text_decoder": (0,)}
    assert levels == [0.9, 0.9]


@pytest.mark.parametrize(
    ("options", "announced"),
    [((), True), (("--method", "screen", "--check"), True), (("--method", "attribution"), False)],
)
def test_long_work_is_announced(
    tiny_folder: Path,
    image: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: Any,
    announced: bool,
) -> None:
    monkeypatch.setattr("blip_trace.cli.ANNOUNCED_SECONDS", 0.0)
    result = trace(tiny_folder, image, tmp_path, *options)
    assert result.exit_code == 0, result.output
    assert bool(re.fullmatch(r"36 cells, about \d+ s\n", result.stderr)) == announced, result.stderr


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4 s"), (89, "89 s"), (170, "3 min"), (5300, "88 min"), (9000, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("name", "question"), [("match", "a red circle"), ("caption", "")])
def test_the_other_models_that_ship(image: Path, tmp_path: Path, name: str, question: str) -> None:
    result = call("run", "--model", name, "--image", image, "--question", question, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    (stack,) = TraceResult.load(tmp_path / "trace.safetensors").stack_tokens
    assert stack == {"match": "text_encoder", "caption": "text_decoder"}[name]


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
        (("--tokens", "first"), "--tokens takes NUMBER or STACK:NUMBER, not 'first'"),
        (("--tokens", "vision:1"), "unknown stack 'vision'"),
        (("--stacks", "text_decoder", "--tokens", "text_encoder:0"), "unknown stack 'text_encoder'"),
        (("--patch-group", 2), "--patch-group belongs to --stacks vision"),
        (("--sever", "hidden"), "unknown severed kind 'hidden'"),
        (("--metrics", "surprise"), "unknown metric 'surprise'"),
        (("--metrics", "logit_difference"), "logit_difference and a foil answer go together"),
        (("--foil", "blue"), "logit_difference and a foil answer go together"),
        (("--interval", 1.5), "level of an interval lies between 0 and 1"),
        (("--samples", 1, "--interval", 0.9), "a single sample has no interval"),
        (("--method", "guess"), "unknown method 'guess'"),
        (("--top", 5), "--top belongs to --method screen, not to exact"),
        (("--method", "attribution", "--check"), "--check belongs to --method screen, not to attribution"),
        (("--method", "integrated_gradients", "--steps", 2), "belongs to --method attribution or screen"),
        (("--method", "screen", "--top", 0), "top must be"),
        (("--method", "screen", "--window", 2), "windows and severed paths need"),
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
    monkeypatch.setattr("blip_trace.ops.native_unavailable_reason", lambda device: "Not built: make it.")
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
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # ignored where a shell's & began the tests
    try:
        result = trace(tiny_folder, image, tmp_path / "out")
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"
    assert not any(tmp_path.iterdir())


def test_help_and_version() -> None:
    assert call("--version").stdout == f"blip-trace {blip_trace.__version__}\n"
    top, run = call("--help").stdout, call("run", "--help").stdout
    assert "run" in top
    assert "doctor" in top
    for option in inspect.signature(cli.run).parameters.keys() - {"context"}:
        assert f"--{option.replace('_', '-')}" in run
    for panel in ("Corruption", "What to restore", "What to measure", "Method", "Engine", "Examples"):
        assert panel in run
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
