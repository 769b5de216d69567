"""Sweeps as they should go: the numbers of `Tracer.trace`, resumed, extended, refused where things changed.

What goes wrong on the way is in test_sweep_faults.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from sweep_helpers import (
    Doing,
    Listener,
    Row,
    again,
    assert_close,
    assert_equal_bits,
    assert_whole,
    files_of,
    numbers,
    order,
    planned_ids,
    python,
    rows_of,
)

import blip_trace
from blip_trace import GaussianNoise, PixelNoise, Tracer, TraceResult, engine
from blip_trace.sites import HEAD_KINDS
from blip_trace.sweep.answers import is_correct
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Local, make_executor
from blip_trace.sweep.plan import Plan, samples_of
from blip_trace.sweep.planning import Changed, Order, estimate
from blip_trace.sweep.sample import Sample
from blip_trace.sweep.settings import Settings
from blip_trace.sweep.sources import DataSet, open_data
from blip_trace.sweep.store import open_store

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


# The numbers of one trace after the other


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


# What is in a shard


def test_sample_of_a_data_set(cheap: Tracer, tmp_path: Path) -> None:
    """A limit draws the same samples whatever the order of the file, others by another seed, and a larger
    limit those of a smaller one and more."""
    samples = [json.dumps({"id": f"q{n}", "image": f"{n // 3}.png", "question": "what"}) for n in range(60)]
    table = tmp_path / "a.jsonl"

    def drawn(name: str, lines: Sequence[str], limit: int, seed: int = 0) -> set[str]:
        table.write_text("\n".join(lines))
        sweep(order("vqa", table, limit=limit, seed=seed), tmp_path / name)
        ids = planned_ids(tmp_path / name)
        assert len(ids) == len(set(ids)) == limit
        return set(ids)

    first = drawn("first", samples, 20)
    shuffled = list(samples)
    random.Random(0).shuffle(shuffled)
    assert drawn("shuffled", shuffled, 20) == first
    assert drawn("first", shuffled, 20) == first  # which is the same run
    assert drawn("more", samples, 40) > first
    assert drawn("other", samples, 20, seed=1) != first


def test_samples_of_an_image_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    """They share a shard and one encoding of their picture, and are read from disk once."""
    encoded: list[int] = []
    encode = engine.encode_image

    def counting(program: Any, ops: Any, embedded: Any) -> Any:
        encoded.append(len(embedded))
        return encode(program, ops, embedded)

    monkeypatch.setattr(engine, "encode_image", counting)
    asked = [{"id": n, "image": f"{n % 6}.png", "question": "what color"} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for number in range(6):
        PIL.Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(tmp_path / f"{number}.png")
    sweep(order(tiny_folder, tmp_path / "a.jsonl", shard_size=7), tmp_path / "run")
    store = open_store(tmp_path / "run")
    plan = Plan.load(store)
    shards = [{sample.image for sample in samples_of(store, shard)} for shard in plan.shards]
    assert len(shards) == 3
    assert sum(len(images) for images in shards) == len(set().union(*shards)) == 6
    assert sum(encoded) == 6
    images = [row["image"] for row in rows_of(tmp_path / "run").values()]
    assert images != sorted(images)  # in an order that the seed draws: a first part is a random part


def test_shards_of_any_size(tmp_path: Path, tiny_folder: Path) -> None:
    """Fault 17: shards and passes of any size hold the same results; what shares a pass in both has the same
    bits."""
    sweep(order(tiny_folder, shard_size=4096), tmp_path / "whole")
    for size in (1, 7):
        sweep(order(tiny_folder, shard_size=size), tmp_path / f"{size}")
        assert_close(tmp_path / f"{size}", tmp_path / "whole")
    assert len(files_of(tmp_path / "1")) > len(files_of(tmp_path / "7")) > len(files_of(tmp_path / "whole"))
    sweep(order(tiny_folder, batch=1, shard_size=4096), tmp_path / "alone")
    sweep(order(tiny_folder, batch=1, shard_size=1), tmp_path / "alone and small")
    assert_close(tmp_path / "alone", tmp_path / "whole")
    assert_equal_bits(tmp_path / "alone", tmp_path / "alone and small")
    values = [numbers(row["text_encoder_hidden_probability"]) for row in rows_of(tmp_path / "whole").values()]
    assert max(value.max() - value.min() for value in values) > 100 * TOLERANCE


def test_executors_agree(tmp_path: Path, tiny_folder: Path) -> None:
    """Fault 17: two processes write byte for byte what one does; the Ray executor's turn is in
    test_sweep_ray.py."""
    given = order(tiny_folder)
    sweep(given, tmp_path / "local", threads=1)
    listener = Listener()
    outcome = sweep(given, tmp_path / "two", make_executor("processes", 2), threads=1, reporter=listener)
    assert outcome.complete
    assert_whole(tmp_path / "two", tmp_path / "local")
    assert listener.samples == outcome.plan.samples
    assert sorted(receipt.number for receipt in listener.receipts) == [0, 1, 2, 3]
    assert all(receipt.made["process"] != os.getpid() for receipt in listener.receipts)


# Going on


def test_finished_run(cheap: Tracer, tmp_path: Path) -> None:
    """Fault 18: a run that is done is left as it is, whether it is named by its order or by its folder."""
    given = order("vqa")
    sweep(given, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    for what in (given, None, replace(given, shard_size=None)):
        outcome, done = again(tmp_path, what)
        assert outcome.complete
        assert not done
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    del before[tmp_path / ".lock"], after[tmp_path / ".lock"]
    assert after == before


def test_going_on(cheap: Tracer, tmp_path: Path) -> None:
    """A run that was stopped goes on with the next shard, by its order or by its folder alone."""
    given = order("vqa")
    sweep(given, tmp_path / "oracle")
    folder = tmp_path / "run"
    for what, count in ((given, 1), (None, 2), (given, None)):
        before = files_of(folder)
        outcome = sweep(what, folder, Doing(Local(), stop_after=count))
        assert outcome.stopped == (count is not None) != outcome.complete
        assert len(files_of(folder)) - len(before) == (count or 1)
        assert before.items() <= files_of(folder).items()
    assert_whole(folder, tmp_path / "oracle")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "settings.seed: planned 0, now 1"),
        ({"window": 2}, "settings.window"),
        ({"corruption": {"samples": 2}}, "settings.corruption.samples: planned 1, now 2"),
        ({"only_correct": True}, "settings.only_correct"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"backend": "hooks"}, 'backend: planned .*, now "hooks"'),
        ({"limit": 7}, "data.limit: planned null, now 7"),
        ({"data": "scenes:3"}, "data set has changed.*had 20 samples and now has 15"),
        ({"data": "scenes:4:1"}, "data set has changed"),
        ({"shard_size": 6}, "shards of 5 samples, not of 6"),
        ({"model.safetensors": b""}, "model.weights"),
        ({"config.json": b" "}, "model.config"),
        ({"tokenizer.json": b" "}, "model.processor"),
        ({"processor_config.json": b" "}, "model.processor"),
    ],
)
def test_refused(
    change: Mapping[str, Any], named: str, cheap: Tracer, tiny_folder: Path, tmp_path: Path
) -> None:
    """Fault 11: a run does not go on with anything that its numbers depend on changed: it says what, touches
    nothing, and goes on with what it was planned with."""
    folder, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    given = order(model)
    sweep(given, folder, Doing(Local(), stop_after=2))
    before = files_of(folder)
    options = dict(change)
    for name in [name for name in change if (model / name).exists()]:
        data = (model / name).read_bytes()
        changed = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith("safetensors") else data + options[name]
        (model / name).write_bytes(changed)
        del options[name]
        with pytest.raises(Changed, match=named):
            sweep(None, folder)
    other = {name: options.pop(name) for name in ("dtype", "backend", "limit") if name in options}
    cheap_backend = other.get("backend", cheap.backend)
    saved, cheap.backend = cheap.backend, cheap_backend
    try:
        with pytest.raises(Changed, match=named) as error:
            sweep(replace(order(model, **options), **other), folder)
    finally:
        cheap.backend = saved
    assert "\n" not in str(error.value)
    assert files_of(folder) == before
    for name in [name for name in change if (model / name).exists()]:
        shutil.copy(tiny_folder / name, model / name)
    assert sweep(given, folder).complete


def test_extend(cheap: Tracer, tmp_path: Path) -> None:
    """Fault 18: a data set that has grown is refused without --extend, and with it only what is new is done;
    samples that are gone or changed cannot be had."""
    samples = [{"id": f"q{n}", "image": f"{n // 5}.png", "question": f"what is {n}"} for n in range(30)]
    table = tmp_path / "a.jsonl"

    def ordered(rows: Sequence[Mapping[str, Any]], **options: Any) -> Order:
        table.write_text("\n".join(map(json.dumps, rows)))
        return order("vqa", table, **options)

    folder = tmp_path / "run"
    sweep(ordered(samples[:18]), folder)
    before = files_of(folder)
    with pytest.raises(Changed, match=r"had 18 samples and now has 30.*--extend"):
        sweep(ordered(samples), folder)
    outcome, done = again(folder, ordered(samples[10:] + samples[:10]), extend=True)
    assert outcome.complete
    assert done == list(range(len(before), len(files_of(folder))))
    assert before.items() <= files_of(folder).items()
    assert sorted(rows_of(folder)) == sorted(planned_ids(folder)) == sorted(row["id"] for row in samples)
    for options in ({}, {"extend": True}):  # it has grown to what there is
        assert again(folder, ordered(samples), **options)[1] == []
    before = files_of(folder)
    with pytest.raises(Changed, match=r"1 of the samples planned .* gone or changed.*q3"):
        sweep(ordered([row for row in samples if row["id"] != "q3"]), folder, extend=True)
    with pytest.raises(Changed, match=r"1 of the samples.*q0$"):
        sweep(ordered([{**samples[0], "question": "other"}, *samples[1:]]), folder, extend=True)
    with pytest.raises(Changed, match=r"data.limit"):
        sweep(ordered(samples, limit=5), folder, extend=True)
    sweep(ordered(samples, limit=5), tmp_path / "part")
    twice = [*samples, *({**row, "id": row["id"] + "b"} for row in samples)]
    with pytest.raises(ValueError, match="drawn at random cannot grow"):
        sweep(ordered(twice, limit=5), tmp_path / "part", extend=True)
    assert files_of(folder) == before
    assert sweep(ordered(samples), folder).complete


def test_retry(tmp_path: Path, tiny_folder: Path) -> None:
    """Shards with failed samples are done again when that is asked for, and the others stay as they are, to
    the time they were written; what was computed well before has the same bits."""
    data, folder = tmp_path / "data", tmp_path / "run"
    data.mkdir()
    scenes = open_data("scenes:4")
    lines = []
    for sample in scenes.samples():
        name = f"{sample.image.removeprefix('scene:')}.png"
        pictures(scenes, sample)["image"].save(data / name)
        lines.append(json.dumps({"id": sample.id, "image": name, "question": sample.question}))
    (data / "a.jsonl").write_text("\n".join(lines))
    given = order(tiny_folder, data / "a.jsonl")
    sweep(given, tmp_path / "oracle")
    (data / "2.png").rename(data / "away.png")
    outcome = sweep(given, folder)
    assert outcome.statuses == {"ok": 15, "error": 5}
    lost = [id for id in rows_of(folder) if id.startswith("2-")]
    assert_equal_bits(folder, tmp_path / "oracle", but=lost)
    before = files_of(folder)
    assert again(folder, given)[1] == []
    assert len(again(folder, given, retry=True)[1]) == 1  # still missing
    (data / "away.png").rename(data / "2.png")
    outcome, done = again(folder, None, retry=True)
    assert outcome.statuses == {"ok": 20}
    assert len(done) == 1
    changed = {name for name, file in files_of(folder).items() if before[name] != file}
    assert changed == {f"{done[0]:06d}.parquet"}
    assert_whole(folder, tmp_path / "oracle")
    assert again(folder, given, retry=True)[1] == []


def test_estimate(tmp_path: Path, tiny_folder: Path) -> None:
    """It counts what a run will have, and writes nothing."""
    given = order(tiny_folder, shard_size=5)
    found = estimate(given, given.tracer())
    sweep(given, tmp_path)
    plan = Plan.load(open_store(tmp_path))
    assert (found.samples, found.images, found.problems) == (20, 4, 0)
    assert found.shards == len(plan.shards)
    cells = sum(
        numbers(row[f"{stack}_hidden_probability"]).size
        for row in rows_of(tmp_path).values()
        for stack in ("text_encoder", "text_decoder")
    )
    assert found.cells == pytest.approx(cells, rel=0.5)  # by a few samples
    assert found.seconds > 0
    assert found.bytes > 0


def test_settings() -> None:
    """Settings come back from a file as they were, and what cannot be is refused in one sentence."""
    settings = Settings(kinds=("mlp",), tokens={"text_encoder": (-1,)}, corruption={"samples": 3}, seed=-5)
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))).to_json() == settings.to_json()
    for wrong, match in (
        ({"seed": 2**70}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"corruption": {"seed": 1}}, "one seed"),
        ({"corrupt": ("pair", "words")}, "pair"),
        ({"store": "int8"}, "int8"),
        ({"batch": 0}, "batch"),
        ({"corruption": {"span": "x"}}, "--span belongs to"),
    ):
        with pytest.raises(ValueError, match=match) as error:
            Settings(**wrong)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no settings of a sweep"):
        Settings.from_json({"colour": 1})


def test_answers() -> None:
    """Answers are compared as the evaluation of VQA does; what it takes away altogether counts as it is."""
    same = {"A dog": "dog", "two": "2", "none": "0", "Yes.": "yes", "t-shirt": "t shirt", "the": "The"}
    for said, right in same.items():
        assert is_correct(said, [right])
    for said, wrong in (("dog", "cat"), ("the", "a"), ("", "the"), ("?", "!"), ("12", "1 2")):
        assert not is_correct(said, [wrong])


def test_a_process_of_its_own(tmp_path: Path, tiny_folder: Path) -> None:
    """Fault 20: an interpreter that swept, and read a part of a file of results, ends."""
    sweep(order(tiny_folder, "scenes:1"), tmp_path)
    code = """
import sys
from blip_trace.sweep.parquet import read_groups
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.store import open_store
groups = read_groups(open_store(sys.argv[1]).file("shards/000000.parquet"))
assert next(groups).num_rows == 5
assert sweep(None, sys.argv[1]).complete
print("done")
"""
    done = python(code, str(tmp_path), limit=50)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
