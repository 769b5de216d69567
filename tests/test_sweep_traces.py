"""Rows of a sweep are what `Tracer.trace` says of each sample alone, for every kind of question and model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sweep_helpers import (
    Row,
    numbers,
    order,
    rows_of,
)

import blip_trace
from blip_trace import GaussianNoise, PixelNoise, TraceResult
from blip_trace.sites import HEAD_KINDS
from blip_trace.sweep.answers import is_correct
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Order
from blip_trace.sweep.sample import Sample
from blip_trace.sweep.sources import DataSet, open_data

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

TOLERANCE = 1e-5


def pictures(data: DataSet, sample: Sample) -> dict[str, Any]:
    """A sample's picture, and the other one of its pair."""
    from blip_trace.images import decode_image

    names = {"image": sample.image, "corrupt_image": sample.corrupt_image}
    return {role: decode_image(data.media.read(name), name) for role, name in names.items() if name}


def assert_row(row: Row, result: TraceResult, metrics: Sequence[str], tolerance: float = TOLERANCE) -> float:
    """A row says what a trace says, within the tolerance (of logits: of their size); returns how much its
    maps' cells differ among themselves, by the same measure."""
    assert row["status"] == "ok"
    assert row["reason"] is None
    assert row["answer"] == result.answer
    assert row["answer_ids"] == list(result.answer_ids)
    assert row["question"] == result.question
    assert row["samples"] == len(result.low_scores)
    assert row["total_effect_vanishes"] == result.total_effect_vanishes
    spread = 0.0
    for metric in metrics:
        shown = result.by(metric)
        scale = max(1.0, abs(shown.high_score), *(float(own.abs().max()) for own in shown.restored.values()))
        allowed = tolerance * scale
        assert row[f"{metric}_high"] == pytest.approx(shown.high_score, abs=allowed)
        assert row[f"{metric}_low"] == pytest.approx(shown.low_score, abs=allowed)
        for stack, kind in result.restored:
            expected = shown.grid(stack, kind).numpy()
            found = numbers(row[f"{stack}_{kind}_{metric}"])
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() <= allowed
            spread = max(spread, float(expected.max() - expected.min()) / scale)
            if len(result.low_scores) > 1:
                error = shown.standard_error(stack, kind).numpy()
                assert np.abs(numbers(row[f"{stack}_{kind}_{metric}_se"]) - error).max() <= allowed
    for stack, labels in result.stack_tokens.items():
        assert row[f"{stack}_tokens"] == list(labels)
        assert row[f"{stack}_positions"] == list(result.positions[stack])
        assert len(row[f"{stack}_roles"]) == len(labels)
    return spread


def swept(given: Order, folder: Path) -> tuple[dict[str, Row], dict[str, Sample]]:
    """A run's rows, and its samples."""
    outcome = sweep(given, folder)
    assert outcome.complete
    assert not outcome.stopped
    assert outcome.statuses.total() == outcome.plan.samples
    return rows_of(folder), {sample.id: sample for sample in given.data.samples()}


def test_rows_are_traces(tmp_path: Path) -> None:
    """Packed into passes, in shards, each sample has the numbers of a trace of its own, its noise drawn by
    the seed that the row names; seeds differ."""
    given = order("vqa", "scenes:3", corruption={"samples": 2}, metrics=("probability", "rank"))
    rows, samples = swept(given, tmp_path)
    tracer, spreads = given.tracer(), []
    for id, row in rows.items():
        picture = pictures(given.data, samples[id])["image"]
        noise = GaussianNoise(samples=2, seed=row["seed"])
        result = tracer.trace(
            picture, samples[id].question, corruption=noise, metrics=("probability", "rank")
        )
        spreads.append(assert_row(row, result, ("probability",)))
        assert row["answers"] == list(samples[id].answers)
        assert row["type"] == samples[id].type
        assert row["model_answer"] == tracer.answers([tracer.ask(picture, samples[id].question)])[0]
        assert row["correct"] == is_correct(row["model_answer"], samples[id].answers)
        assert len(row["image_sha256"]) == 64
    assert len(rows) == 15
    assert min(spreads) > 100 * TOLERANCE
    assert len({row["seed"] for row in rows.values()}) == len(rows)


def test_expected_answers_and_heads(tmp_path: Path) -> None:
    """Of expected answers all tokens count; maps of heads have an axis for them."""
    settings: dict[str, Any] = {"kinds": HEAD_KINDS, "tokens": {"text_encoder": (-1,)}, "window": 2}
    given = order("vqa", "scenes:2", answer="expected", **settings)
    rows, samples = swept(given, tmp_path)
    tracer = given.tracer()
    for id, row in rows.items():
        result = tracer.trace(
            pictures(given.data, samples[id])["image"],
            samples[id].question,
            samples[id].answers[0],
            GaussianNoise(samples=1, seed=row["seed"]),
            **settings,
        )
        assert assert_row(row, result, ("probability",)) > 10 * TOLERANCE
        assert numbers(row["text_encoder_cross_attn_head_probability"]).shape == (4, 1, 4)
    assert any(len(row["answer_ids"]) > 1 for row in rows.values())


def test_only_correct(tmp_path: Path) -> None:
    """What the model answers wrongly is left out, says why, and is no failure; the others are traced."""
    folder = tmp_path / "data"
    folder.mkdir()
    asked = list(open_data("scenes:2").samples())
    table = [{"id": s.id, "image": "x.png", "question": s.question, "answer": s.answers[0]} for s in asked]
    table[0]["answer"], table[1]["answer"] = "a banana", ""
    data = open_data("scenes:2")
    from PIL import Image

    picture: Image.Image = pictures(data, asked[0])["image"]
    picture.save(folder / "x.png")
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    given = order("vqa", folder / "a.jsonl", only_correct=True)
    rows, _ = swept(given, tmp_path / "run")
    tracer = given.tracer()
    for row in table:
        said = tracer.answers([tracer.ask(picture, row["question"])])[0]
        found = rows[row["id"]]
        assert found["model_answer"] == said
        right = bool(row["answer"]) and is_correct(said, [row["answer"]])
        assert found["status"] == ("ok" if right else "filtered")
        assert (found["text_encoder_hidden_probability"] is not None) == right
    assert "the model says" in rows[table[0]["id"]]["reason"]
    assert rows[table[0]["id"]]["correct"] is False
    assert rows[table[1]["id"]]["correct"] is None
    statuses = Counter(row["status"] for row in rows.values())
    assert statuses["ok"] > 2
    assert statuses["filtered"] > 1
    assert sweep(None, tmp_path / "run").failed == 0


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Minimal pairs with foils and subjects; the last ones lack what they need."""
    folder = tmp_path_factory.mktemp("pairs")
    data = open_data("scenes:4")
    lines = []
    for number, sample in enumerate(s for s in data.samples() if s.type == "color"):
        pictures(data, sample)["image"].save(folder / f"{number}.png")
        row: dict[str, Any] = {"id": f"p{number}", "image": f"{number}.png"}
        row |= {"question": "what color is the square?", "answer": "red", "foil": "blue", "subject": "square"}
        if number % 2:
            row["corrupt_image"] = f"{(number + 1) % 4}.png"
        else:
            row["corrupt_question"] = "what color is the star?"
        lines.append(row)
    lines.append({**lines[0], "id": "no foil", "foil": ""})
    lines.append({**lines[0], "id": "no half", "corrupt_image": "", "corrupt_question": "", "subject": ""})
    lines.append({**lines[0], "id": "no subject", "subject": "circle", "corrupt_image": "1.png"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder / "pairs.jsonl"


def test_pairs_and_foils(pairs: Path, tmp_path: Path) -> None:
    """The other half of a pair takes the place of a picture or a question, and logits are compared with the
    foil's; a sample that lacks one fails alone, with the reason."""
    metrics = ("logit_difference", "probability", "logit")
    given = order("vqa", pairs, corrupt=("pair",), corruption={}, metrics=metrics, answer="expected")
    rows, samples = swept(given, tmp_path)
    tracer = given.tracer()
    for id in ("p0", "p1", "p2", "p3"):
        seen, sample = pictures(given.data, samples[id]), samples[id]
        corruption: Any = (
            blip_trace.ImageSwap(seen["corrupt_image"])
            if sample.corrupt_image
            else blip_trace.TokenSwap(sample.corrupt_question or "")
        )
        result = tracer.trace(seen["image"], sample.question, "red", corruption, foil="blue", metrics=metrics)
        spread = assert_row(rows[id], result, metrics)
        assert spread > 100 * TOLERANCE or not result.total_effect
        assert rows[id]["foil"] == "blue"
    reasons = {id: row["reason"] for id, row in rows.items() if row["status"] == "error"}
    assert reasons.keys() == {"no foil", "no half", "no subject"}
    assert "no foil" in reasons["no foil"]
    assert "no other half" in reasons["no half"]
    assert "'circle' does not occur" in reasons["no subject"]


def test_noise_on_subjects(pairs: Path, tmp_path: Path) -> None:
    """Noise on each sample's own subject; its token is the content of the question."""
    given = order(
        "vqa", pairs, corrupt=("words",), corruption={"samples": 2, "span": "@subject"}, metrics=("logit",)
    )
    rows, samples = swept(given, tmp_path)
    tracer = given.tracer()
    spreads = []
    for id in ("p0", "p1", "p2", "p3"):
        noise = blip_trace.TokenNoise("square", samples=2, seed=rows[id]["seed"])
        picture = pictures(given.data, samples[id])["image"]
        result = tracer.trace(picture, samples[id].question, corruption=noise, metrics=("logit",))
        spreads.append(assert_row(rows[id], result, ("logit",)))
        roles = dict(zip(rows[id]["text_encoder_tokens"], rows[id]["text_encoder_roles"], strict=True))
        assert roles["square"] == "content"
        assert roles["color"] == "other"
    assert max(spreads) > 100 * TOLERANCE
    assert "names no subject" in rows["no half"]["reason"]


def test_vision_in_half_precision(tmp_path: Path) -> None:
    """Patches of the image stack, noise on pixels, maps kept in float16."""
    options: dict[str, Any] = {"stacks": ("vision", "text_decoder"), "patch_group": 4}
    noise = {"samples": 1, "std": 2.0, "mean": 0.0}
    given = order("vqa", "scenes:1", corrupt=("pixels",), corruption=noise, store="float16", **options)
    rows, samples = swept(given, tmp_path)
    tracer = given.tracer()
    for id, row in rows.items():
        picture = pictures(given.data, samples[id])["image"]
        noisy = PixelNoise(**noise, seed=row["seed"])
        result = tracer.trace(picture, samples[id].question, corruption=noisy, **options)
        spread = assert_row(row, result, ("probability",), tolerance=1e-3)  # of float16
        assert spread > 1e-2
        assert set(row["vision_roles"]) == {"class", "patch"}


@pytest.mark.parametrize("model", ["caption", "match"])
def test_other_models(model: str, tmp_path: Path) -> None:
    """A captioning model goes on with a beginning, a matching one says whether a text fits."""
    data = open_data("scenes:2")
    beginning = {"caption": "a", "match": "the circle is at the top"}[model]
    sample = next(data.samples())
    pictures(data, sample)["image"].save(tmp_path / "x.png")
    table = [{"id": str(n), "image": "x.png", "question": beginning} for n in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    given = order(model, tmp_path / "a.jsonl")
    rows, _ = swept(given, tmp_path / "run")
    tracer = given.tracer()
    spreads = []
    for row in rows.values():
        noise = GaussianNoise(samples=1, seed=row["seed"])
        result = tracer.trace(str(tmp_path / "x.png"), beginning, corruption=noise)
        spreads.append(assert_row(row, result, ("probability",)))
        assert row["model_answer"]
    assert max(spreads) > 10 * TOLERANCE
