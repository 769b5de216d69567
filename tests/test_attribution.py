"""Approximate maps: right to first order, exact where they say so, and honest about what they miss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_parity import IMAGE, TOLERANCE, ask, largest_difference, tracer
from torch import Tensor

import blip_trace
from blip_trace import GaussianNoise, Tracer, TraceResult
from blip_trace.attribution import Attribution, Screen, rank_correlation

QUESTION = ask("color").text
NOISE = GaussianNoise(samples=3)
KINDS = ("hidden", "self_attn", "mlp", "cross_attn_head")


def traced(backend: str = "native", dtype: str = "float32", **options: Any) -> TraceResult:
    settings: dict[str, Any] = {"corruption": NOISE, "kinds": KINDS, **options}
    return tracer(backend, dtype).trace(IMAGE, QUESTION, **settings)


def effects(result: TraceResult) -> Tensor:
    """Of all maps, in one row."""
    return torch.cat([result.indirect_effect(*name).flatten() for name in result.restored])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("stack", "kinds"), [("text_encoder", KINDS), ("vision", ("hidden", "self_attn", "mlp"))]
)
def test_estimates_are_right_to_first_order(stack: str, kinds: tuple[str, ...], direction: str) -> None:
    """Of a change t times as small the estimate's error is t^2 times as small, relative to the effect t
    times."""

    def error(std: float, steps: int) -> float:
        options: dict[str, Any] = {
            "corruption": blip_trace.PatchNoise(std=std, samples=1),
            "stacks": (stack,),
            "kinds": kinds,
            "metrics": ("logit_difference",),
            "foil": "blue",
            "patch_group": 4,
            "direction": direction,
        }
        exact = effects(traced("reference", "float64", **options))
        guessed = effects(traced("reference", "float64", method=Attribution(steps), **options))
        return float((guessed - exact).abs().max() / exact.abs().max())

    large, small = error(0.1, 1), error(0.01, 1)
    assert small < 0.1
    assert small < large / 4
    assert error(0.01, 8) < 0.1


def test_words_can_be_corrupted() -> None:
    options: dict[str, Any] = {"corruption": blip_trace.TokenNoise(std=0.05, samples=2), "metrics": ["logit"]}
    exact, guessed = (traced("reference", "float64", method=m, **options) for m in ("exact", "attribution"))
    assert (effects(guessed) - effects(exact)).abs().max() < 0.1 * effects(exact).abs().max()


def test_low_and_high_are_those_of_the_exact_trace() -> None:
    exact, guessed = traced(), traced(method="attribution")
    assert (exact.low_scores - guessed.low_scores).abs().max() <= TOLERANCE
    assert exact.high_score == pytest.approx(guessed.high_score, abs=TOLERANCE)
    assert guessed.exact is not None
    assert not any(bool(marks.any()) for marks in guessed.exact.values())
    assert exact.exact is None


def test_a_screen_does_its_largest_cells_exactly() -> None:
    exact, screened = traced(), traced(method=Screen(top=30))
    assert screened.exact is not None
    assert sum(int(marks.sum()) for marks in screened.exact.values()) == 30
    differs = 0.0
    for name, marks in screened.exact.items():
        difference = (screened.restored[name] - exact.restored[name]).abs().amax(0)
        assert float((difference * marks).max()) <= TOLERANCE
        differs = max(differs, float(difference.max()))
    assert differs > 1e-2  # the others are estimates
    everything = traced(method=Screen(top=10_000))
    assert everything.exact is None
    assert largest_difference(everything, exact) <= TOLERANCE


def test_a_screen_says_on_request_what_it_missed() -> None:
    exact, guessed = effects(traced()), effects(traced(method="attribution"))
    told = traced(method=Screen(top=20, check=True)).settings["screen"]
    assert told["rank_correlation"] == pytest.approx(rank_correlation(guessed, exact), abs=1e-6)
    best = set(exact.abs().topk(20).indices.tolist())
    found = set(guessed.abs().topk(20).indices.tolist())
    assert told["missed"] == pytest.approx(1 - len(best & found) / 20)
    assert "screen" not in traced(method=Screen(top=20)).settings


def test_ranks_of_ties() -> None:
    assert rank_correlation(torch.tensor([1.0, 2, 2, 3]), torch.tensor([1.0, 2, 2, 9])) == pytest.approx(1)
    # ranks 1, 2.5, 2.5, 4 against 4, 3, 2, 1
    assert rank_correlation(torch.tensor([1.0, 2, 2, 3]), torch.tensor([9.0, 8, 7, 6])) == pytest.approx(
        -4.5 / (4.5 * 5) ** 0.5
    )


def test_the_model_is_left_as_it_was() -> None:
    made = tracer("native")
    before = [weight.requires_grad for weight in made.model.parameters()]
    traced(method="attribution")
    assert [weight.requires_grad for weight in made.model.parameters()] == before
    assert all(weight.grad is None for weight in made.model.parameters())
    assert not any(module._forward_hooks for module in made.model.modules())


def test_answers_of_several_tokens() -> None:
    question = ask("position").text
    options: dict[str, Any] = {"corruption": NOISE, "metrics": ("log_probability", "kl_divergence")}
    guessed = tracer("native").trace(IMAGE, question, "top left", method="attribution", **options)
    parts = [guessed.by("log_probability", token).grid("text_encoder", "hidden") for token in (0, 1)]
    torch.testing.assert_close(parts[0] + parts[1], guessed.grid("text_encoder", "hidden"))


def test_a_screen_survives_saving(tmp_path: Any) -> None:
    screened = traced(method=Screen(top=5))
    screened.save(tmp_path / "trace.safetensors")
    loaded = TraceResult.load(tmp_path / "trace.safetensors")
    assert loaded.exact is not None
    assert screened.exact is not None
    assert all(torch.equal(loaded.exact[name], marks) for name, marks in screened.exact.items())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "guess"}, "unknown method 'guess'"),
        ({"method": 3}, "a method is a name"),
        ({"method": "attribution", "metrics": ("rank",)}, "a rank has no gradient"),
        ({"method": "screen", "window": 3}, "one layer at a time"),
        ({"method": "screen", "sever": ("mlp",)}, "one layer at a time"),
    ],
)
def test_bad_input(tiny_tracer: Tracer, picture: Any, options: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_tracer.trace(picture, "what color is the red", **options)


def test_bad_numbers() -> None:
    with pytest.raises(ValueError, match="steps must be a whole number"):
        Attribution(0)
    with pytest.raises(ValueError, match="top must be a whole number"):
        Screen(top=0)
