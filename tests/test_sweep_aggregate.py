"""Averages are those of a loop over samples, and their intervals hold what they say."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sweep_runs import HEADS, LAYERS, LAYOUT, Row, write_run

from blip_trace.sweep.results import Run, load_run
from blip_trace.sweep.results.aggregate import Average, poisson_weights, unit_keys
from blip_trace.sweep.schema import StackLayout

pytest_plugins = ("sweep_run_fixtures",)

TEXT = "text_encoder"
COLUMN = "text_encoder_hidden_probability"
Floats = npt.NDArray[np.float64]


def by_hand(
    rows: list[Row],
    column: str = COLUMN,
    metric: str = "probability",
    normalized: bool = False,
    labels: str = f"{TEXT}_roles",
) -> tuple[dict[str, list[Floats]], int]:
    """Each role's values over samples, one by one, and how many samples count."""
    values: dict[str, list[Floats]] = defaultdict(list)
    count = 0
    for row in rows:
        if row["status"] != "ok" or (normalized and row["total_effect_vanishes"]):
            continue
        count += 1
        low, high = (
            np.float64(np.float32(row[f"{metric}_low"])),
            np.float64(np.float32(row[f"{metric}_high"])),
        )
        effects = np.float64(np.float32(row[column])) - low
        if normalized:
            effects = effects / (high - low)
        own = np.array([str(label) for label in row[labels]])
        for name in set(own.tolist()):
            values[name].append(effects[..., own == name, :].mean(-2))
    return values, count


def agrees(average: Average, names: tuple[str, ...], values: dict[str, list[Floats]], count: int) -> None:
    assert average.samples == count
    for place, name in enumerate(names):
        own = values.get(name, [])
        assert average.n[place] == len(own)
        if not own:
            assert np.isnan(average.mean[place]).all()
            continue
        assert np.allclose(average.mean[place], np.mean(own, 0), rtol=1e-12, atol=1e-14)
        deviation = np.std(own, 0, ddof=1)
        assert np.allclose(average.standard_deviation[place], deviation, rtol=1e-10)
        assert np.allclose(average.standard_error[place], deviation / len(own) ** 0.5, rtol=1e-10)
        assert (average.lower[place] < average.mean[place]).all()
        assert (average.mean[place] < average.upper[place]).all()


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    ("stack", "kind", "metric"),
    [
        (TEXT, "hidden", "probability"),
        (TEXT, "hidden", "logit"),
        (TEXT, "cross_attn_head", "probability"),
        ("text_decoder", "hidden", "probability"),
    ],
)
def test_averages_are_those_of_a_loop(
    run: Run, rows: list[Row], stack: str, kind: str, metric: str, normalized: bool
) -> None:
    average = run.aggregate(stack, kind, metric, split="type", normalized=normalized)
    assert average.rows == tuple(
        role
        for role in ("first", "question word", "content", "function", "last", "special")
        if stack == TEXT or role == "first"
    )
    heads = (HEADS,) if kind == "cross_attn_head" else ()
    assert average.overall.mean.shape == (len(average.rows), *heads, LAYERS)
    about = (f"{stack}_{kind}_{metric}", metric, normalized, f"{stack}_roles")
    agrees(average.overall, average.rows, *by_hand(rows, *about))
    assert set(average.groups) == {"color", "count", "yes/no"}
    for name, group in average.groups.items():
        agrees(group, average.rows, *by_hand([row for row in rows if row["type"] == name], *about))

    counts = run.counts()
    expected = {status: counts[status] for status in ("filtered", "error", "not_finite")}
    if normalized:
        expected["vanishing"] = sum(row["total_effect_vanishes"] and row["status"] == "ok" for row in rows)
    assert average.overall.excluded == expected
    assert average.overall.samples + sum(expected.values()) == len(rows)
    summed = [sum(group.excluded.get(why, 0) for group in average.groups.values()) for why in expected]
    assert summed == list(expected.values())


def test_the_planted_effect_is_found(run: Run) -> None:
    """And no other: the content of color questions, in the last layer."""
    average = run.aggregate(TEXT, "hidden", split="type", level=0.999)
    for name, group in average.groups.items():
        for place, role in enumerate(average.rows):
            planted = np.zeros(LAYERS)
            planted[-1] = 0.4 * (name == "color" and role == "content")
            assert (group.lower[place] < 0.1 + planted).all()
            assert (group.upper[place] > 0.1 + planted).all()
            assert (group.upper[place] - group.lower[place] < 0.2).all()
    curve = average.layer_curve("content", "color")
    at = average.rows.index("content")
    assert np.array_equal(curve.mean, average.groups["color"].mean[at])
    assert np.array_equal(curve.upper, average.groups["color"].upper[at])
    assert curve.n == average.groups["color"].n[at]
    assert np.array_equal(average.layer_curve().mean, average.overall.mean[at])
    with pytest.raises(KeyError, match="no sample has a token 'answer'"):
        average.layer_curve("answer")
    with pytest.raises(KeyError, match="no group 'shape'"):
        average.layer_curve("content", "shape")


def test_averages_by_position(run: Run, rows: list[Row]) -> None:
    average = run.aggregate(TEXT, "hidden", by="position")
    longest = max(len(row[f"{TEXT}_tokens"]) for row in rows if row["status"] == "ok")
    assert average.rows == tuple(map(str, range(longest)))
    values, count = by_hand(rows, labels=f"{TEXT}_positions")
    assert average.overall.n[0] == count > average.overall.n[-1] > 1
    agrees(average.overall, average.rows, values, count)


def test_splits(run: Run, rows: list[Row]) -> None:
    ok = [row for row in rows if row["status"] == "ok"]
    part = run.aggregate(TEXT, "hidden", split="part", draws=20)
    assert {name: group.samples for name, group in part.groups.items()} == {
        name: sum(json.loads(row["extra"])["part"] == name for row in ok) for name in ("train", "val")
    }
    correct = run.aggregate(TEXT, "hidden", split="correct", draws=20).groups
    assert set(correct) == {"true", "false", "(none)"}
    assert correct["true"].samples == sum(row["correct"] is True for row in ok)
    assert correct["(none)"].samples == 0
    assert np.isnan(correct["(none)"].mean).all()
    status = run.aggregate(TEXT, "cross_attn_head", split="status", draws=20).groups
    assert status["error"].samples == 0
    assert status["error"].excluded == {"error": run.counts()["error"]}
    assert status["error"].mean.shape == status["ok"].mean.shape
    assert run.aggregate(TEXT, "hidden", draws=20).groups == {}
    for split, match in {
        "nothing": "neither a column of the run nor a key of extra",
        "sample_id": "more than 200 different values",
        "answers": "cannot split",
        "probability_high": "cannot split",
    }.items():
        with pytest.raises(ValueError, match=match):
            run.aggregate(TEXT, "hidden", split=split, draws=2)


def test_wrong_settings_are_refused(run: Run) -> None:
    for wrong, match in (
        ({"level": 1.0}, "between 0 and 1"),
        ({"draws": 1}, "no interval"),
        ({"draws": 0}, "at least 1"),
        ({"unit": "word"}, "unknown unit"),
        ({"by": "word"}, "unknown grouping"),
    ):
        with pytest.raises(ValueError, match=match):
            run.aggregate(TEXT, "hidden", **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("unit", ["sample", "image"])
def test_neither_order_nor_files_matter(
    run: Run, rows: list[Row], tmp_path: Path, unit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shuffled = rows.copy()
    random.Random(3).shuffle(shuffled)
    other = load_run(write_run(tmp_path / "run", shuffled, (5, 200, 230)))
    one = run.aggregate(TEXT, "hidden", split="type", unit=unit)
    monkeypatch.setattr("blip_trace.sweep.results.profiles.CHUNK", 17)
    two = other.aggregate(TEXT, "hidden", split="type", unit=unit)
    assert one.rows == two.rows
    pairs = [(one.overall, two.overall), *((group, two.groups[name]) for name, group in one.groups.items())]
    for mine, theirs in pairs:
        for part in ("n", "mean", "standard_deviation", "standard_error", "lower", "upper"):
            assert np.allclose(getattr(mine, part), getattr(theirs, part), rtol=1e-12, atol=1e-13), part
    seeded = run.aggregate(TEXT, "hidden", unit=unit, seed=1)
    assert np.allclose(seeded.overall.mean, one.overall.mean, rtol=1e-12)
    assert not np.allclose(seeded.overall.lower, one.overall.lower, rtol=1e-6)


def test_weights_are_poisson_and_independent() -> None:
    weights = poisson_weights(unit_keys([f"unit {number}" for number in range(4000)], seed=0), 1001)
    assert weights.shape == (4000, 1001)
    share = np.bincount(weights.astype(int).ravel(), minlength=6)[:6] / weights.size
    assert np.allclose(share, [math.exp(-1) / math.factorial(k) for k in range(6)], atol=5e-4)
    assert np.allclose(weights.mean(0), 1, atol=5.5 / 4000**0.5)  # of every draw
    assert np.allclose(weights.mean(1), 1, atol=5.5 / 1001**0.5)  # of every unit
    for correlation in (np.corrcoef(weights[:200]), np.corrcoef(weights[:, :200].T)):
        off = correlation[~np.eye(200, dtype=bool)]
        assert abs(off.mean()) < 1e-3
        assert abs(off).max() < 0.2
    again = poisson_weights(unit_keys(["unit 7"], seed=0), 20)
    assert np.array_equal(again[0], weights[7, :20])  # whatever else there is
    assert not np.array_equal(poisson_weights(unit_keys(["unit 7"], seed=1), 1001)[0], weights[7])


def flat_run(folder: Path, effects: Floats, images: list[str]) -> Run:
    """A run whose content has these effects [samples, layers]."""
    layout = replace(
        LAYOUT, stacks=(StackLayout("text_encoder", effects.shape[1]),), kinds=("hidden",),
        metrics=("probability",), spread=False,
    )  # fmt: skip
    made = [
        {
            "sample_id": f"s{number}",
            "status": "ok",
            "image": images[number],
            "probability_low": 0.0,
            "probability_high": 1.0,
            "total_effect_vanishes": False,
            "text_encoder_tokens": ["dog"],
            "text_encoder_roles": ["content"],
            "text_encoder_positions": [1],
            COLUMN: effects[number][None].tolist(),
        }
        for number in range(len(effects))
    ]
    return load_run(write_run(folder, made, (), layout))


def coverage(average: Average, truth: float) -> float:
    return float(((average.lower <= truth) & (truth <= average.upper)).mean())


def test_intervals_hold_the_truth_as_often_as_they_say(tmp_path: Path) -> None:
    """A thousand experiments at once, one in each layer: means of 80 samples of a skewed distribution."""
    samples = np.random.default_rng(0).gamma(4.0, 1.0, (80, 1000))
    run = flat_run(tmp_path / "run", samples, [f"{number}" for number in range(80)])
    for level in (0.5, 0.9, 0.95):
        average = run.aggregate(TEXT, "hidden", level=level).overall
        assert abs(coverage(average, 4.0) - level) < 0.03
    assert np.allclose(average.standard_error, 2 / 80**0.5, rtol=0.6)


def test_questions_about_one_image_are_no_independent_samples(tmp_path: Path) -> None:
    """Of 60 images with 5 questions each that agree, intervals over images hold the truth; those over
    questions are far too narrow."""
    rng = np.random.default_rng(1)
    samples = np.repeat(rng.normal(0, 1, (60, 600)), 5, axis=0) + rng.normal(0, 0.1, (300, 600))
    run = flat_run(tmp_path / "run", samples, [f"image {number // 5}" for number in range(300)])
    by_image = run.aggregate(TEXT, "hidden", unit="image").overall
    assert abs(coverage(by_image, 0.0) - 0.95) < 0.03
    assert np.allclose(by_image.standard_error.mean(), 60**-0.5, rtol=0.05)
    by_sample = run.aggregate(TEXT, "hidden").overall
    assert coverage(by_sample, 0.0) < 0.75
    assert np.array_equal(by_image.mean, by_sample.mean)


def test_few_samples_have_no_interval(tmp_path: Path) -> None:
    one = flat_run(tmp_path / "one", np.ones((1, 3)), ["a"]).aggregate(TEXT, "hidden").overall
    assert np.array_equal(one.mean, np.ones((1, 3)))
    assert np.isnan([one.standard_error, one.standard_deviation, one.lower, one.upper]).all()
    values = np.array([[0.0], [1.0]])
    two = flat_run(tmp_path / "two", values, ["a", "b"]).aggregate(TEXT, "hidden").overall
    assert (two.mean, two.lower, two.upper) == (0.5, 0.0, 1.0)  # though some draws leave out both


def test_infinity_in_a_map_that_counts_as_ok(rows: list[Row], tmp_path: Path) -> None:
    spoilt = [dict(row) for row in rows[:30]]
    which = next(row for row in spoilt if row["status"] == "ok")
    which[COLUMN] = [[math.inf] * LAYERS, *which[COLUMN][1:]]
    run = load_run(write_run(tmp_path / "run", spoilt))
    average = run.aggregate(TEXT, "hidden", draws=20).overall
    assert np.isfinite(average.mean).all()
    clean = load_run(write_run(tmp_path / "clean", rows[:30])).aggregate(TEXT, "hidden", draws=20).overall
    assert average.excluded["not_finite"] == clean.excluded["not_finite"] + 1
    assert average.samples == clean.samples - 1
