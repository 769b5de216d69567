"""Sweeps as they should go: what is in a shard, and how a run is gone on with, extended, or refused.

What their numbers are is in test_sweep_traces.py, what every executor does in test_sweep_executors.py, and
what goes wrong on the way in test_sweep_stops.py, test_sweep_damage.py, test_sweep_disks.py and
test_sweep_failures_*.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from sweep_helpers import (
    Doing,
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

from blip_trace import Tracer, engine
from blip_trace.sweep.answers import is_correct
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Local
from blip_trace.sweep.plan import Plan, samples_of
from blip_trace.sweep.planning import Changed, Order, estimate
from blip_trace.sweep.settings import Settings
from blip_trace.sweep.store import open_store

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


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

    def counting(program: Any, ops: Any, embedded: Any, *rest: Any) -> Any:
        encoded.append(len(embedded))
        return encode(program, ops, embedded, *rest)

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
    assert max(value.max() - value.min() for value in values) > 1e-3


# Going on


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
