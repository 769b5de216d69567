"""Sweeps over what is broken: pictures, rows, models, numbers that are none, too little memory.

One bad sample is a row with a reason; its neighbours have, to the bit, the numbers that they have without it.
The numbers are those of the table of faults, as in test_sweep_stops.py.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_helpers import (
    Listener,
    assert_close,
    assert_equal_bits,
    order,
    planned_ids,
    receipt_file,
    rows_of,
)

from blip_trace import Tracer
from blip_trace.scenes import random_scene
from blip_trace.sweep import shard
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.pictures import Pictures
from blip_trace.sweep.planning import Changed, Order
from blip_trace.sweep.results import load_run
from blip_trace.sweep.shard import is_out_of_memory
from blip_trace.sweep.sources import open_data

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

QUESTION = "what color is the shape ?"


def table(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def scene(number: int) -> PIL.Image.Image:
    return random_scene(Random(number)).render(64)


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 30000 x 30000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


# 7 and 8: pictures


def test_broken_pictures(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 7: a picture that cannot be read fails its sample, with the reason; every other sample has, bit
    for bit, the numbers of a run in which that picture was fine."""
    good = encoded(scene(1), "JPEG")
    broken: dict[str, tuple[bytes | None, str]] = {
        "truncated.jpg": (good[: len(good) * 3 // 4], "cannot be decoded"),
        "empty.png": (b"", "empty file"),
        "missing.png": (None, "there is no image file"),
        "page.jpg": (b"<!DOCTYPE html><html><body>404</body></html>", "no image of a known format"),
        "noise.png": (Random(0).randbytes(500), "no image of a known format"),
        "header.png": (encoded(scene(2))[:60], "header.png cannot be"),
    }
    rows = [
        {"id": f"{name}-{n}", "image": name, "question": QUESTION}
        for name in [*broken, *(f"good-{n}.png" for n in range(6))]
        for n in range(2)
    ]
    data = table(tmp_path / "data", rows)
    for number in range(6):
        (data.parent / f"good-{number}.png").write_bytes(encoded(scene(number)))
    for name in broken:
        (data.parent / name).write_bytes(good)
    given = order(tiny_folder, data, shard_size=8)
    sizes: list[int] = []
    measure = Tracer.measure

    def counting(self: Tracer, request: Any, prepared: Any, *rest: Any) -> Any:
        sizes.append(len(prepared))
        return measure(self, request, prepared, *rest)

    monkeypatch.setattr(Tracer, "measure", counting)
    assert sweep(given, tmp_path / "oracle").statuses == {"ok": 24}
    full = set(sizes)
    sizes.clear()
    for name, (content, _) in broken.items():
        (data.parent / name).unlink() if content is None else (data.parent / name).write_bytes(content)
    outcome = sweep(given, tmp_path / "run")
    assert outcome.statuses == {"ok": 12, "error": 12}
    assert outcome.failed == 12
    assert set(sizes) <= full  # the shape of a pass decides how its sums are rounded
    lost = [f"{name}-{n}" for name in broken for n in range(2)]
    assert_equal_bits(tmp_path / "run", tmp_path / "oracle", but=lost)
    found = rows_of(tmp_path / "run")
    for id in lost:
        name, _ = id.rsplit("-", 1)
        assert found[id]["status"] == "error"
        assert broken[name][1] in found[id]["reason"]
        assert name in found[id]["reason"]
        assert "\n" not in found[id]["reason"]
        assert found[id]["question"] == QUESTION
        assert found[id]["text_encoder_hidden_probability"] is None


def test_unusual_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 7: colours, depths and directions of all kinds are read; of an animation the first picture."""
    base = scene(3)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    grey16 = PIL.Image.fromarray(np.asarray(base.convert("L")).astype(np.uint16) * 257)
    kinds = {
        "cmyk.jpg": encoded(base.convert("CMYK"), "JPEG"),
        "palette.png": encoded(base.convert("P")),
        "grey.png": encoded(base.convert("L")),
        "grey16.png": encoded(grey16),
        "turned.jpg": encoded(base, "JPEG", exif=exif),
        "clear.png": encoded(base.convert("RGBA")),
        "animated.gif": encoded(base, "GIF", save_all=True, append_images=[scene(4)]),
        "still.gif": encoded(base, "GIF"),
        "wrong.jpg": encoded(base),
    }
    rows = [{"id": name, "image": name, "question": QUESTION} for name in kinds]
    data = table(tmp_path / "data", rows)
    for name, content in kinds.items():
        (data.parent / name).write_bytes(content)
    assert sweep(order(tiny_folder, data, batch=1), tmp_path / "run").statuses == {"ok": len(kinds)}
    found = rows_of(tmp_path / "run")
    maps = {name: found[name]["probability_high"] for name in kinds}
    assert maps["grey.png"] == maps["grey16.png"] != maps["wrong.jpg"]
    assert maps["animated.gif"] == maps["still.gif"]
    assert maps["turned.jpg"] != maps["wrong.jpg"]


def test_hostile_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 8: bombs, giants, drawings that are programs, and names that lead elsewhere are refused before
    anything is decoded or fetched; memory stays bounded."""
    (tmp_path / "secret.png").write_bytes(encoded(scene(1)))
    data = tmp_path / "data"
    data.mkdir()
    with open(data / "giant.png", "wb") as file:
        file.truncate(65 * 2**20)
    (data / "bomb.png").write_bytes(bomb())
    (data / "program.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"><script>1</script></svg>')
    (data / "link.png").symlink_to(tmp_path / "secret.png")
    (data / "loop.png").symlink_to(data / "loop.png")
    os.mkfifo(data / "pipe.png")
    (data / "good.png").write_bytes(encoded(scene(1)))
    expected = {
        "bomb.png": "megapixels",
        "giant.png": "larger than 64 MiB",
        "program.svg": "no image of a known format",
        "../secret.png": "leads out of the folder",
        "link.png": "leads out of the folder",
        "/dev/zero": "leads out of the folder",
        "loop.png": "",
        "pipe.png": "no regular file",
        "https://example.invalid/a.png": "is a URL",
        "file:///etc/passwd": "is a URL",
        ".": "",
        "good.png": "",
    }
    rows = [{"id": name, "image": name, "question": QUESTION} for name in expected]
    path = table(data, rows)
    given = Order(open_data(path, images=data), str(tiny_folder), order(tiny_folder).settings)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    statuses = sweep(given, tmp_path / "run").statuses
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 300 * 2**20
    assert statuses == {"ok": 1, "error": len(expected) - 1}
    for name, reason in expected.items():
        row = rows_of(tmp_path / "run")[name]
        assert row["status"] == ("ok" if name == "good.png" else "error")
        assert reason in (row["reason"] or "")


def test_picture_that_memory_does_not_suffice_for(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: a picture that cannot be decoded for want of memory fails its samples, all of them, and takes
    nothing from the passes of the others."""
    given = order(tiny_folder, "scenes:2")
    sweep(given, tmp_path / "oracle")
    prepare = Pictures._prepare

    def small(self: Pictures, reference: str) -> Any:
        if reference == "scene:1":
            raise MemoryError
        return prepare(self, reference)

    monkeypatch.setattr(Pictures, "_prepare", small)
    outcome = sweep(given, tmp_path / "run")
    assert outcome.statuses == {"ok": 5, "error": 5}
    lost = [id for id in planned_ids(tmp_path / "run") if id.startswith("1-")]
    assert all(rows_of(tmp_path / "run")[id]["reason"] == "out of memory" for id in lost)
    assert_equal_bits(tmp_path / "run", tmp_path / "oracle", but=lost)


# 9: numbers that are none


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(model: Path, name: str, work: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one weight."""
    weights = load_file(model / "model.safetensors")
    (key,) = (key for key in weights if key.endswith(name))
    weights[key] = work(weights[key]).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, model: Path, tmp_path: Path) -> None:
    """Fault 9: a model with NaN among its weights is refused by name before anything is planned."""
    change(model, "text_encoder.encoder.layer.1.output.dense.weight", lambda own: own.fill_(value))
    with pytest.raises(ValueError, match=r"weight .*layer.1.output.dense.weight holds NaN or infinity"):
        sweep(order(model), tmp_path / "run")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_numbers_that_are_not_finite(model: Path, tmp_path: Path) -> None:
    """Fault 9: what overflows on the way is kept, flagged, and left out of averages."""
    change(model, "text_decoder.bert.encoder.layer.1.output.dense.weight", lambda own: own * 1e38)
    outcome = sweep(order(model, "scenes:1"), tmp_path / "run")
    assert outcome.statuses == {"not_finite": 5}
    assert outcome.failed == 5
    for row in rows_of(tmp_path / "run").values():
        assert "NaN or infinity" in row["reason"]
        assert row["text_decoder_hidden_probability"] is not None
    assert load_run(tmp_path / "run").counts()["not_finite"] == 5


def test_numbers_too_large_for_half_precision(model: Path, tmp_path: Path) -> None:
    """Fault 9: a number that does not fit the type of the file is not passed off as a good one."""
    change(model, "cls.predictions.bias", lambda own: own + 1e5)
    for store, status in (("float32", "ok"), ("float16", "not_finite")):
        given = order(model, "scenes:1", metrics=("logit",), store=store)
        assert sweep(given, tmp_path / store).statuses == {status: 5}


def test_effects_that_vanish(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 9: samples that the corruption does nothing to say so."""
    given = order(tiny_folder, "scenes:1", corruption={"samples": 1, "std": 0.0})
    assert sweep(given, tmp_path / "none").statuses == {"ok": 5}
    assert all(row["total_effect_vanishes"] for row in rows_of(tmp_path / "none").values())
    sweep(order(tiny_folder, "scenes:4"), tmp_path / "some")
    assert not all(row["total_effect_vanishes"] for row in rows_of(tmp_path / "some").values())


# 10: memory

OUT_OF_MEMORY: dict[str, BaseException] = {
    "python": MemoryError(),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 1"),
    "arrow": pa.ArrowMemoryError("malloc of size 1 failed"),
}


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
@pytest.mark.parametrize("step", ["measure", "prepare", "answers"])
def test_passes_too_large(
    step: str, error: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 10: where more than two questions at once do not fit, half as many are tried until they do; the
    numbers are the same, and the receipt says what happened."""
    given = order(tiny_folder, "scenes:3", shard_size=20)
    assert is_out_of_memory(OUT_OF_MEMORY[error])
    sweep(given, tmp_path / "oracle")
    real, sizes = getattr(Tracer, step), []

    def small(self: Tracer, first: Any, *given: Any, **options: Any) -> Any:
        items = given[0] if step == "measure" else first
        size = 1 if step == "prepare" else len(items)
        sizes.append(size)
        if size > 2 or (step == "prepare" and len(sizes) == 3):
            raise OUT_OF_MEMORY[error]
        return real(self, first, *given, **options)

    monkeypatch.setattr(Tracer, step, small)
    listener = Listener()
    assert sweep(given, tmp_path / "run", reporter=listener).statuses == {"ok": 15}
    assert_close(tmp_path / "run", tmp_path / "oracle")
    notes = json.loads(receipt_file(tmp_path / "run", 0).read_bytes())["notes"]
    assert any("out of memory: at most" in note for note in notes)
    assert sizes.count(8) <= 2  # it does not try again and again what did not fit
    assert max(sizes[-3:]) <= 2


def test_sample_too_large(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: a sample that does not fit even alone is a failed row; passes are made smaller first, and the
    others keep their numbers."""
    given, measure, memory = order(tiny_folder, "scenes:2"), Tracer.measure, []
    sweep(given, tmp_path / "oracle")

    def small(self: Tracer, request: Any, prepared: Any, *rest: Any) -> Any:
        memory.append(self.memory)
        if any("square" in own.asked.question or "circle" in own.asked.question for own in prepared):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return measure(self, request, prepared, *rest)

    monkeypatch.setattr(Tracer, "measure", small)
    statuses = sweep(given, tmp_path / "run").statuses
    assert statuses["error"] in range(1, 10)
    assert statuses.total() == 10
    rows = rows_of(tmp_path / "run")
    failed = [id for id, row in rows.items() if row["status"] == "error"]
    assert all(rows[id]["reason"] == "out of memory" for id in failed)
    oracle = rows_of(tmp_path / "oracle")
    for id in rows.keys() - set(failed):
        assert rows[id]["probability_high"] == pytest.approx(oracle[id]["probability_high"], abs=1e-5)
    assert min(own for own in memory if own) == shard.LEAST_MEMORY


def test_error_in_a_pass(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes wrong with one sample of a pass is said of that one alone, by its class too."""
    given, measure = order(tiny_folder, "scenes:2"), Tracer.measure
    sweep(given, tmp_path / "oracle")

    odd = [sample.id for sample in given.data.samples() if "triangle" in sample.question]
    assert 0 < len(odd) < 5

    def triangle(self: Tracer, request: Any, prepared: Any, *rest: Any) -> Any:
        if any("triangle" in own.asked.question for own in prepared):
            raise ZeroDivisionError("triangles\nare odd")
        return measure(self, request, prepared, *rest)

    monkeypatch.setattr(Tracer, "measure", triangle)
    sweep(given, tmp_path / "run")
    rows, oracle = rows_of(tmp_path / "run"), rows_of(tmp_path / "oracle")
    assert sorted(id for id in rows if rows[id]["status"] == "error") == sorted(odd)
    for id, row in rows.items():
        if id in odd:
            assert row["reason"] == "ZeroDivisionError: triangles are odd"
        else:
            assert row["probability_low"] == pytest.approx(oracle[id]["probability_low"], abs=1e-5)


# 11: models


def test_broken_models(model: Path, tmp_path: Path) -> None:
    """Fault 11: a checkpoint that lacks a weight, has others, or belongs to another head is refused by the
    names of what is wrong."""
    weights = load_file(model / "model.safetensors")
    lost = "text_encoder.encoder.layer.1.attention"
    lacking = {key: own for key, own in weights.items() if lost not in key}
    shorter = {key: own[:-1].clone() if own.dim() == 1 else own for key, own in weights.items()}
    wrong: dict[str, dict[str, torch.Tensor]] = {
        r"missing: text_encoder.encoder.layer.1.attention": lacking,
        r"1 unexpected: other": {**weights, "other": torch.zeros(2)},
        "of another shape": shorter,
    }
    for match, content in wrong.items():
        save_file(content, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            sweep(order(model), tmp_path / "run")
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json}      ")
    with pytest.raises(ValueError, match="cannot be loaded"):
        sweep(order(model), tmp_path / "run")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model"):
        sweep(order(model), tmp_path / "run")


def test_another_tokenizer(cheap: Tracer, model: Path, tmp_path: Path) -> None:
    """Fault 11: another tokenizer in the same folder makes another run."""
    sweep(order(model), tmp_path / "run")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for given in (None, order(model)):
        with pytest.raises(Changed, match=r"model.processor: planned .*, now "):
            sweep(given, tmp_path / "run")


# 13 and 14: rows


def test_strange_texts(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 13: ids that are missing, the same or of any letters each name one row; questions that are empty
    or longer than the model can take fail, with the reason."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(encoded(scene(1)))
    rows: list[dict[str, Any]] = [
        {"id": "a", "question": QUESTION},
        {"id": "a", "question": "is the shape red ?"},
        {"id": "a#2", "question": QUESTION},
        {"id": None, "question": QUESTION},
        {"question": QUESTION},
        {"id": 7, "question": QUESTION},
        {"id": "größe 🐈 \u202e x", "question": "größe 🐈 ?"},
        {"id": "nul\0", "question": "what \0 is"},
        {"id": "half \ud800", "question": QUESTION},
        {"id": "in half", "question": "what \udfff color"},
        {"id": "empty", "question": ""},
        {"id": "blank", "question": " \n "},
        {"id": "long", "question": "what " * 600},
        {"id": "very long", "question": "what " * 100_000},
        {"id": "../../etc", "question": QUESTION},
    ]
    data = table(tmp_path / "data", [{**row, "image": "x.png"} for row in rows])
    outcome = sweep(order(tiny_folder, data), tmp_path / "run")
    found = rows_of(tmp_path / "run")
    assert len(found) == len(rows) == outcome.statuses.total()
    assert {"a", "a#2", "a#2#2", "row-3", "row-4", "7", "half ?", "../../etc"} <= found.keys()
    assert "größe 🐈 \u202e x" in found
    reasons = {id: row["reason"] for id, row in found.items() if row["status"] != "ok"}
    assert reasons.keys() == {"half ?", "in half", "empty", "blank", "long", "very long"}
    assert "600" in reasons["long"] or "602" in reasons["long"]
    assert "the model takes 16" in reasons["very long"]
    assert "question is empty" in reasons["empty"]
    assert "not UTF-8" in reasons["in half"]
    assert all("\n" not in reason for reason in reasons.values())
    assert sweep(None, tmp_path / "run").complete


def test_broken_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 14: a row that is none is a failed row that names its line; those beside it are traced."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x.png").write_bytes(encoded(scene(1)))
    good = json.dumps({"id": "good", "image": "x.png", "question": QUESTION})
    lines = [good, "{broken", "[1, 2]", '"text"', "null", good.replace("good", "last")]
    (tmp_path / "data" / "a.jsonl").write_text("\n".join(lines))
    outcome = sweep(order(tiny_folder, tmp_path / "data" / "a.jsonl"), tmp_path / "run")
    rows = rows_of(tmp_path / "run")
    assert rows["good"]["status"] == rows["last"]["status"] == "ok"
    broken = [row for row in rows.values() if row["status"] == "error"]
    assert len(broken) == outcome.failed == 4
    assert all("a.jsonl" in row["reason"] for row in broken)
    assert len({row["reason"] for row in broken}) == 4  # each names its line
    given = replace(order(tiny_folder, tmp_path / "data" / "a.jsonl"), on_error="stop")
    with pytest.raises(ValueError, match=r"a\.jsonl"):
        sweep(given, tmp_path / "strict")
    assert not (tmp_path / "strict" / "plan.json").exists()


def test_broken_data(tmp_path: Path) -> None:
    """Fault 14: a file that is broken as a whole is named, in one sentence, before anything is planned."""
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"a\.parquet"):
        sweep(order("vqa", tmp_path / "a.parquet"), tmp_path / "run")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b\.jsonl"):
        sweep(order("vqa", tmp_path / "b.jsonl"), tmp_path / "run")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_folders_that_are_no_text(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 15: data may lie in a folder whose name is no UTF-8, also where a reason names it."""
    strange = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    data = table(strange, [{"id": str(n), "image": f"{n}.png", "question": QUESTION} for n in range(2)])
    (strange / "0.png").write_bytes(encoded(scene(1)))
    given = order(tiny_folder, data)
    assert sweep(given, tmp_path / "run").statuses == {"ok": 1, "error": 1}
    assert "caf?" in rows_of(tmp_path / "run")["1"]["reason"]
    assert sweep(None, tmp_path / "run").complete
