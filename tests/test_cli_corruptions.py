"""The command line's corruptions: those of Python, with the options that belong to them and no others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from typer.testing import CliRunner

from blip_trace import GaussianNoise, PatchNoise, PixelNoise, Tracer, TraceResult
from blip_trace.cli import app
from blip_trace.corruption import (
    Corruption,
    ImageAblation,
    ImageRegion,
    ImageSwap,
    Together,
    TokenNoise,
    TokenSwap,
)

QUESTION = "what color is the shape ?"
OTHER = "what shape is the color ?"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, picture: PIL.Image.Image) -> str:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    picture.save(path)
    return str(path)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, picture: PIL.Image.Image) -> str:
    path = tmp_path_factory.mktemp("images") / "other.png"
    picture.rotate(90).point(lambda value: 255 - value).save(path)
    return str(path)


def trace(model: Path, image: str, out: Path, *options: Any) -> Any:
    given = ("--model", model, "--image", image, "--question", QUESTION, "--out", out)
    arguments = ("run", *given, "--backend", "reference", "--stacks", "text_decoder", *options)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


NOISE = ("--samples", 2, "--mean", 0.5, "--std", 2, "--mode", "multiply", "--seed", 3)
MADE: list[tuple[tuple[Any, ...], Callable[[str], Corruption]]] = [
    ((), lambda other: GaussianNoise()),
    (("--corrupt", "embeddings", *NOISE), lambda other: GaussianNoise(0.5, 2, "multiply", 2, 3)),
    (("--corrupt", "pixels"), lambda other: PixelNoise()),
    (("--corrupt", "pixels", *NOISE), lambda other: PixelNoise(0.5, 2, "multiply", 2, 3)),
    (("--corrupt", "patches", *NOISE), lambda other: PatchNoise(0.5, 2, "multiply", 2, 3)),
    (("--corrupt", "words"), lambda other: TokenNoise()),
    (("--corrupt", "words", "--span", "the shape", "--std", 4, "--absolute", "--distribution", "uniform",
      "--samples", 2, "--seed", 3),
     lambda other: TokenNoise("the shape", 4, False, "uniform", 2, 3)),
    (("--corrupt", "words", "--span", "2:4"), lambda other: TokenNoise((2, 4))),
    (("--corrupt", "swap-image", "--swap", "OTHER"), lambda other: ImageSwap(other)),
    (("--corrupt", "swap-question", "--swap-question", OTHER), lambda other: TokenSwap(OTHER)),
    (("--corrupt", "ablate"), lambda other: ImageAblation()),
    (("--corrupt", "ablate", "--ablation", "mean", "--reference", "OTHER", "--reference", "OTHER"),
     lambda other: ImageAblation("mean", (other, other))),
    (("--corrupt", "ablate", "--ablation", "resample", "--reference", "OTHER", "--reference", "OTHER",
      "--interval", 0.9),
     lambda other: ImageAblation("resample", (other, other))),
    (("--corrupt", "hide", "--box", "0.1, 0,0.5,1"), lambda other: ImageRegion((0.1, 0, 0.5, 1))),
    (("--corrupt", "hide", "--box", "0,0,1,1", "--blur", 2),
     lambda other: ImageRegion((0, 0, 1, 1), blur=2)),
    (("--corrupt", "pixels", "--corrupt", "words", "--samples", 2, "--mean", 1, "--interval", 0.9),
     lambda other: Together(PixelNoise(1, samples=2), TokenNoise(samples=2))),
    (("--corrupt", "hide,swap-question", "--box", "0,0,1,1", "--swap-question", OTHER),
     lambda other: Together(ImageRegion((0, 0, 1, 1)), TokenSwap(OTHER))),
]  # fmt: skip


@pytest.mark.parametrize(("options", "make"), MADE)
def test_is_that_of_python(
    tiny_folder: Path, tiny_tracer: Tracer, image: str, other: str, tmp_path: Path, options: Any, make: Any
) -> None:
    given = [other if option == "OTHER" else option for option in options]
    done = trace(tiny_folder, image, tmp_path, *given)
    assert done.exit_code == 0, done.output
    expected = tiny_tracer.trace(image, QUESTION, corruption=make(other), stacks=["text_decoder"])
    assert json.loads((tmp_path / "trace.json").read_text())["low_scores"] == expected.low_scores.tolist()
    # its values alone do not tell what is the model's and what the default's
    saved = TraceResult.load(tmp_path / "trace.safetensors")
    assert _numbers(saved.settings["corruption"]) == _numbers(expected.settings["corruption"])


def _numbers(description: str) -> str:
    """Whole numbers as such: 2.0 is 2."""
    return re.sub(r"(\d)\.0\b", r"\1", description)


TYPED = {
    "--mean": 0, "--std": 1, "--mode": "add", "--samples": 2, "--seed": 1, "--span": "the shape",
    "--distribution": "uniform", "--swap": "x.png", "--swap-question": OTHER, "--ablation": "zero",
    "--reference": "x.png", "--box": "0,0,1,1", "--blur": 2,
}  # fmt: skip
OWN = {
    "embeddings": "--mean --std --mode --samples --seed",
    "pixels": "--mean --std --mode --samples --seed",
    "patches": "--mean --std --mode --samples --seed",
    "words": "--span --std --absolute --distribution --samples --seed",
    "swap-image": "--swap",
    "swap-question": "--swap-question",
    "ablate": "--ablation --reference",
    "hide": "--box --blur",
}
MISPLACED = [
    (name, option)
    for name, own in OWN.items()
    for option in (*TYPED, "--absolute")
    if option not in own.split()
]


@pytest.mark.parametrize(("name", "option"), MISPLACED)
def test_a_misplaced_option_is_refused(
    tiny_folder: Path, image: str, tmp_path: Path, name: str, option: str
) -> None:
    value = [TYPED[option]] if option in TYPED else []
    done = trace(tiny_folder, image, tmp_path / "out", "--corrupt", name, option, *value)
    owners = [owner for owner, own in OWN.items() if option in own.split()]
    either = " or ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
    assert done.exit_code == 2
    assert done.stderr == f"blip-trace: {option} belongs to --corrupt {either}, not to {name}\n"
    assert not done.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--corrupt", "nothing"), "unknown corruption 'nothing'"),
        (
            ("--corrupt", "pixels,words", "--box", "0,0,1,1"),
            "--box belongs to --corrupt hide, not to pixels or",
        ),
        (("--corrupt", "swap-image"), "--corrupt swap-image needs --swap"),
        (("--corrupt", "swap-question"), "--corrupt swap-question needs --swap-question"),
        (("--corrupt", "hide", "--blur", 2), "--corrupt hide needs --box"),
        (("--corrupt", "hide", "--box", "0,0,1"), "--box takes four numbers"),
        (("--corrupt", "hide", "--box", "0,0,1,right"), "--box takes four numbers"),
        (("--corrupt", "hide", "--box", "0.5,0,0.2,1"), "is not .left, top, right, bottom. within 0 to 1"),
        (("--corrupt", "hide", "--box", "0,0,1,1", "--interval", 0.9), "a single sample has no interval"),
        (("--corrupt", "ablate", "--ablation", "mean"), "takes reference images"),
        (("--corrupt", "ablate", "--ablation", "melt"), "unknown ablation 'melt'"),
        (("--corrupt", "words", "--span", "the giraffe"), "does not occur in the question"),
        (("--corrupt", "words", "--span", "5:99"), "is not within the question's 8 tokens"),
        (("--corrupt", "words", "--distribution", "flat"), "unknown distribution 'flat'"),
        (("--corrupt", "pixels,patches"), "two corruptions of the same input"),
        (("--corrupt", "hide,words", "--box", "0,0,1,1"), "as many samples each"),
        (("--corrupt", "swap-image", "--swap", "missing.png"), "there is no image file missing.png"),
    ],
)
def test_what_it_refuses(tiny_folder: Path, image: str, tmp_path: Path, options: Any, match: str) -> None:
    done = trace(tiny_folder, image, tmp_path / "out", *options)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.strip().splitlines()
    assert re.search(match, line)
    assert not any(tmp_path.iterdir())
