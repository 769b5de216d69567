"""What the tests of data sets share: small files and pictures, and data sets that are read and refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import PIL.Image
import pyarrow as pa
import pytest

from blip_trace.scenes import random_scene
from blip_trace.sweep.sample import Sample
from blip_trace.sweep.sources import open_data

COCO_CSV = ",train_image_id_count,question_count,answer_count\n"
"""The first line of a table of the causal-tracing tool."""
QUESTION = "what color is the shape ?"


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def png(grey: int = 0) -> bytes:
    data = BytesIO()
    PIL.Image.new("RGB", (4, 3), (grey, grey, grey)).save(data, "PNG")
    return data.getvalue()


def encoded(image: PIL.Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def scene(number: int) -> PIL.Image.Image:
    return random_scene(Random(number)).render(64)


def table(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """A data set of these rows, in the folder."""
    folder.mkdir(exist_ok=True)
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path | str, *given: Any, **options: Any) -> list[Sample]:
    """All samples, which a second reading and one that is broken off repeat."""
    data = open_data(path, *given, **options)
    samples = list(data.samples())
    assert list(islice(data.samples(), 1)) == samples[:1]
    assert list(data.samples()) == samples
    for sample in samples:
        json.dumps(vars(sample), ensure_ascii=False).encode()  # no lone surrogates
        assert sample.id
        assert sample.problem is None or "\n" not in sample.problem
    return samples


def refused(path: Path | str, match: str, *given: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=match) as error:
        list(open_data(path, *given, **options).samples())
    assert "\n" not in str(error.value)


def hf_table(rows: int = 5, **more: Any) -> pa.Table:
    """As Hugging Face writes images: structs, some of which name a file, and some of which are null."""
    cells: list[Any] = [{"bytes": png(row), "path": None} for row in range(rows)]
    cells[1] = {"bytes": None, "path": "file.png"}
    cells[2] = None
    columns = {"image": cells, "question": [f"q{row}" for row in range(rows)], "answers": [["a", "b"]] * rows}
    return pa.table({**columns, **more})
