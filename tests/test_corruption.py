"""Every corruption at its place: the engine gives the hooks' numbers, and what is left clean is shared."""

from __future__ import annotations

from random import Random
from typing import Any

import PIL.Image
import pytest
import torch
from test_parity import ENGINES, IMAGE, TOLERANCE, ask, assert_spread, largest_difference, tracer

import blip_trace
from blip_trace import Tracer, engine
from blip_trace.scenes import random_scene

OTHER = random_scene(Random(4)).render(64)
MORE = [random_scene(Random(n)).render(64) for n in (5, 6, 7)]
QUESTION = ask("color").text
MASK = torch.zeros(64, 64, dtype=torch.bool)
MASK[:, 5:] = True
CORRUPTIONS: dict[str, Any] = {
    "pixel noise": blip_trace.PixelNoise(std=1.5, samples=3),
    "patch noise": blip_trace.PatchNoise(std=1.0, samples=3),
    "token noise": blip_trace.TokenNoise(samples=3),
    "noise on a phrase": blip_trace.TokenNoise(span="what color", std=6.0, distribution="uniform", samples=3),
    "noise on tokens": blip_trace.TokenNoise(span=(1, 6), std=3.0, relative=False, samples=3),
    "image swap": blip_trace.ImageSwap(OTHER),
    "token swap": blip_trace.TokenSwap(QUESTION.replace("color", "shape")),
    "zeros": blip_trace.ImageAblation(),
    "mean": blip_trace.ImageAblation("mean", MORE),
    "resample": blip_trace.ImageAblation("resample", MORE),
    "box": blip_trace.ImageRegion(box=(0.0, 0.0, 1.0, 0.95)),
    "mask, blurred": blip_trace.ImageRegion(mask=MASK, blur=20.0),
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_parity(name: str, direction: str) -> None:
    def traced(backend: str, dtype: str) -> Any:
        return tracer(backend, dtype).trace(
            IMAGE,
            QUESTION,
            corruption=CORRUPTIONS[name],
            kinds=("hidden", "self_attn"),
            direction=direction,
        )

    truth, theirs = traced("hooks", "float64"), traced("hooks", "float32")
    allowed = max(TOLERANCE, 2 * largest_difference(theirs, truth))
    assert allowed <= 10 * TOLERANCE
    assert_spread(truth, TOLERANCE)
    for backend in ENGINES:
        assert largest_difference(traced(backend, "float32"), truth) <= allowed


def test_a_clean_image_is_projected_once_for_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: plans.append(args[3]) or run(*args))
    tracer("native").trace(IMAGE, QUESTION, corruption=CORRUPTIONS["token noise"])
    tracer("native").trace(IMAGE, QUESTION, corruption=CORRUPTIONS["resample"])
    sets = [len(plan.stacks[0].steps[1].state_starts) - 1 for plan in plans]
    assert sets == [1, 4]


def test_what_was_changed_is_told() -> None:
    swapped = tracer("native").trace(IMAGE, QUESTION, corruption=CORRUPTIONS["token swap"])
    assert swapped.settings["corrupted"] == "token 2 was color"
    spoilt = tracer("native").trace(IMAGE, QUESTION, corruption=CORRUPTIONS["noise on a phrase"])
    assert spoilt.settings["corrupted"] == "tokens 1 to 2: what color"


def test_the_first_samples_do_not_depend_on_how_many_are_drawn() -> None:
    for kind in (blip_trace.PixelNoise, blip_trace.PatchNoise, blip_trace.TokenNoise):
        few, many = (tracer("native").trace(IMAGE, QUESTION, corruption=kind(samples=n)) for n in (2, 4))
        assert (few.low_scores - many.low_scores[:2]).abs().max() <= TOLERANCE


def test_several_questions_under_token_noise() -> None:
    pairs = [(IMAGE, QUESTION), (OTHER, ask("position").text)]
    together = tracer("native").trace_batch(pairs, corruption=blip_trace.TokenNoise(samples=2))
    for pair, packed in zip(pairs, together, strict=True):
        alone = tracer("native").trace(*pair, corruption=blip_trace.TokenNoise(samples=2))
        assert largest_difference(packed, alone) <= TOLERANCE


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: blip_trace.TokenNoise(span="a dragon"), "does not occur in the question"),
        (lambda: blip_trace.TokenNoise(span=""), "does not occur"),
        (lambda: blip_trace.TokenNoise(span=(3, 99)), "not within the question's"),
        (lambda: blip_trace.TokenNoise(span=(3, 3)), "not within the question's"),
        (lambda: blip_trace.TokenNoise(std=float("nan")), "finite number"),
        (lambda: blip_trace.TokenNoise(samples=0), "at least 1"),
        (lambda: blip_trace.TokenNoise(distribution="cauchy"), "unknown distribution"),  # type: ignore[arg-type]
        (lambda: blip_trace.TokenSwap("what color"), "equal length"),
        (lambda: blip_trace.TokenSwap("what color is the red"), "have the same tokens"),
        (lambda: blip_trace.ImageSwap(3), "image"),
        (lambda: blip_trace.ImageAblation("mean"), "takes reference images"),
        (lambda: blip_trace.ImageAblation("zero", [3]), "takes no reference images"),
        (lambda: blip_trace.ImageAblation("half"), "unknown ablation"),  # type: ignore[arg-type]
        (lambda: blip_trace.ImageRegion(), "one of the two"),
        (lambda: blip_trace.ImageRegion(box=(0.5, 0, 0.2, 1)), "is not .left, top, right, bottom."),
        (lambda: blip_trace.ImageRegion(box=(0.5, 0, 0.501, 1)), "holds no pixel"),
        (lambda: blip_trace.ImageRegion(mask=torch.ones(3, 3, dtype=torch.bool)), r"must be bool \[32, 32\]"),
        (lambda: blip_trace.ImageRegion(box=(0, 0, 1, 1), blur=0.0), "above 0"),
        (lambda: blip_trace.PixelNoise(mode="swirl"), "unknown noise mode"),  # type: ignore[arg-type]
    ],
)
def test_bad_corruptions(tiny_tracer: Tracer, picture: PIL.Image.Image, make: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_tracer.trace(picture, "what color is the red", corruption=make())


def test_many_noisy_images_are_encoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = blip_trace.PatchNoise(std=1.0, samples=9)
    together = tracer("native").trace(IMAGE, QUESTION, corruption=noise)
    sizes = []
    encode = engine.encode_image
    monkeypatch.setattr(engine, "encode_image", lambda *args: sizes.append(len(args[2])) or encode(*args))
    small = Tracer.from_pretrained(blip_trace.shipped_model(), backend="native", memory=2**20)
    parts = small.trace(IMAGE, QUESTION, corruption=noise)
    assert sizes == [1, 4, 4, 1]  # the clean one, then the samples
    assert largest_difference(parts, together) <= TOLERANCE
