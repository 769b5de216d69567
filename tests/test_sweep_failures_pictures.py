"""Sweeps over broken, strange and hostile pictures.

The samples of a bad picture are rows with a reason; their neighbours have, to the bit, the numbers that they
have without it. The numbers of faults are those of the table, as in test_sweep_stops.py.
"""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pytest
from sweep_data import QUESTION, encoded, scene, table
from sweep_helpers import assert_equal_bits, order, planned_ids, rows_of

from blip_trace import Tracer
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.pictures import Pictures
from blip_trace.sweep.planning import Order
from blip_trace.sweep.sources import open_data

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 30000 x 30000."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(10**6)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


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
