"""Files that claim to be traces: read as what they are, files from anywhere."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_result import make, make_measured

from blip_trace import TraceResult
from blip_trace.trace_file import FORMAT


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    make().save(path)
    whole = path.read_bytes()
    header = struct.unpack("<Q", whole[:8])[0]
    for broken in (
        b"",
        b"\x80\x04pickle",
        whole[:20],
        whole[:-1],
        (2**62).to_bytes(8, "little") + whole[8:],
        whole[:8] + b"{" * header,
    ):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no saved trace"):
            TraceResult.load(path)
    with pytest.raises(FileNotFoundError):
        TraceResult.load(tmp_path / "missing")


def described(**changes: Any) -> dict[str, Any]:
    """What changes of the description of a saved trace."""
    return {"about": changes, "tensors": {}}


def stored(**changes: Any) -> dict[str, Any]:
    """What changes of its tensors; None: it is missing."""
    return {"about": {}, "tensors": {name.replace("__", "/"): tensor for name, tensor in changes.items()}}


def write_changed(path: Path, changes: dict[str, Any], **metadata: str | None) -> None:
    result = make_measured()
    result.save(path)
    tensors = {**load_file(path), **changes["tensors"]}
    about = json.dumps({**result.description(), **changes["about"]})
    given = {"format": FORMAT, "trace": about, **metadata}
    save_file(
        {name: tensor for name, tensor in tensors.items() if tensor is not None},
        path,
        {name: text for name, text in given.items() if text is not None},
    )


def test_what_the_broken_files_are_made_from_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    for unchanged in (described(), stored(picture=None)):
        write_changed(path, unchanged)
        assert TraceResult.load(path).question == "what ?"


@pytest.mark.parametrize(
    "changes",
    [
        {"format": None},
        {"format": "blip_trace.TraceResult/2"},
        {"trace": None},
        {"trace": "{"},
        {"trace": "[]"},
        {"trace": "[" * 100_000},
    ],
)
def test_safetensors_without_a_trace(tmp_path: Path, changes: dict[str, str | None]) -> None:
    path = tmp_path / "trace.safetensors"
    write_changed(path, described(), **changes)
    with pytest.raises(ValueError, match="is no saved trace"):
        TraceResult.load(path)


@pytest.mark.parametrize(
    "changes",
    [
        described(tokens=3),
        described(positions={"text_encoder": [0], "text_decoder": [0, 1]}),
        described(positions={"text_encoder": [0, 1, 2]}),
        described(positions={"text_encoder": [0, 1, math.inf], "text_decoder": [0, 1]}),
        described(answer_ids=None),
        described(answer_ids=[10]),  # fewer than were measured
        described(high_score="high"),
        described(high_score=10**400),
        described(metric="loudness"),
        described(metric=["rank"]),
        described(metrics=["probability", "loudness"]),
        described(metrics=["probability", "logit"]),  # which the file does not hold
        described(metrics=3),
        described(metrics=[]),  # which leaves tensors that belong to nothing
        stored(low_scores=None),
        stored(low_scores=torch.zeros(2)),
        stored(low_scores=torch.zeros(3, 1)),
        stored(shown__text_encoder__hidden=torch.zeros(2, 5)),
        stored(shown__text_encoder__hidden=torch.zeros(3, 3, 5)),  # fewer cells were measured
        stored(shown__text_encoder__hidden=torch.zeros(3, 2, 4)),
        stored(shown__text_encoder__hidden=None),
        stored(shown__text_encoder__mlp=torch.zeros(3, 2, 3, 4)),  # a map without heads that has some
        stored(shown__vision__hidden=torch.zeros(3, 1, 4)),  # its tokens have no labels
        stored(measured__rank__cells=None),
        stored(measured__rank__cells=torch.zeros(3, 20)),
        stored(measured__rank__cells=torch.zeros(3, 19, 2)),
        stored(measured__rank__cells=torch.zeros(2, 20, 2)),
        stored(measured__rank__low=torch.zeros(3, 3)),
        stored(measured__rank__low=torch.zeros(2)),
        stored(measured__rank__high=torch.zeros(())),
        stored(measured__rank__high=torch.zeros(3)),
        stored(picture=torch.zeros(6, 8, dtype=torch.uint8)),
        stored(picture=torch.zeros(3, 6, 8, dtype=torch.uint8)),
        stored(picture=torch.zeros(6, 8, 3)),
    ],
    ids=lambda changes: "-".join(f"{name}" for part in changes.values() for name in part),
)
def test_safetensors_that_are_no_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "trace.safetensors"
    write_changed(path, changes)
    with pytest.raises(ValueError, match="is no saved trace"):
        TraceResult.load(path)
