"""Saved traces: safetensors and JSON, checked when read as what they are, files from anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .files import write_whole
from .metrics import METRICS, Measured
from .result import TraceResult
from .sites import HEAD_KINDS, KINDS

FORMAT = "blip_trace.TraceResult/3"
PARTS = ("cells", "low", "high")

BROKEN = (
    SafetensorError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)
"""What hostile contents raise when they are taken for a trace."""


def write_trace(result: TraceResult, path: Path) -> None:
    """See `TraceResult.save`."""
    tensors = {f"shown/{stack}/{kind}": maps for (stack, kind), maps in result.restored.items()}
    tensors["low_scores"] = result.low_scores
    for metric, measured in result.measured.items():
        for part in PARTS:
            tensors[f"measured/{metric}/{part}"] = getattr(measured, part)
    for (stack, kind), marks in (result.exact or {}).items():
        tensors[f"exact/{stack}/{kind}"] = marks
    if result.picture is not None:
        tensors["picture"] = result.picture
    metadata = {"format": FORMAT, "trace": json.dumps(result.description(), ensure_ascii=False)}
    write_whole(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_trace(path: Path) -> TraceResult:
    """See `TraceResult.load`."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            about = json.loads(metadata["trace"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _trace(about, tensors)
    except BROKEN as error:
        raise ValueError(f"{path} is no saved trace: {error}") from error


def _trace(about: Mapping[str, Any], tensors: dict[str, Tensor]) -> TraceResult:
    low_scores = _checked(tensors, "low_scores", (None,))
    samples = len(low_scores)
    tokens = {stack: _strings(labels, "tokens") for stack, labels in about["tokens"].items()}
    positions = {stack: _numbers(places, "positions") for stack, places in about["positions"].items()}
    if {s: len(p) for s, p in positions.items()} != {s: len(t) for s, t in tokens.items()}:
        raise ValueError("its tokens and their positions do not fit")
    answer_ids = _numbers(about["answer_ids"], "answer_ids")
    maps: dict[tuple[str, str], Tensor] = {}
    exact = {}
    for stack, kind in (_strings(name, "maps") for name in about["maps"]):
        if kind not in KINDS:
            raise ValueError(f"there is no kind {kind!r}")
        heads = (None,) if kind in HEAD_KINDS else ()
        shape = (*heads, len(tokens[stack]), None)
        maps[stack, kind] = _checked(tensors, f"shown/{stack}/{kind}", (samples, *shape))
        if f"exact/{stack}/{kind}" in tensors:
            exact[stack, kind] = _checked(tensors, f"exact/{stack}/{kind}", shape, torch.bool)
    cells = sum(shown[0].numel() for shown in maps.values())
    measured = {}
    for metric in (*_strings(about["metrics"], "metrics"), *_strings([about["metric"]], "metric")):
        if metric not in METRICS:
            raise ValueError(f"there is no metric {metric!r}")
    for metric in about["metrics"]:
        sizes = ((samples, cells), (samples,), ())
        measured[metric] = Measured(
            *(
                _checked(tensors, f"measured/{metric}/{part}", (*size, len(answer_ids)))
                for part, size in zip(PARTS, sizes, strict=True)
            )
        )
    answer_token = about["answer_token"]
    if answer_token is not None and _numbers([answer_token], "answer_token")[0] not in range(len(answer_ids)):
        raise ValueError(f"its answer has no token {answer_token}")
    if not isinstance(about["settings"], dict):
        raise ValueError("its settings are none")
    picture = None
    if "picture" in tensors:
        picture = _checked(tensors, "picture", (None, None, 3), torch.uint8)
    if tensors:
        raise ValueError(f"it holds {next(iter(tensors))}, which no trace has")
    return TraceResult(
        restored=maps,
        low_scores=low_scores,
        high_score=float(about["high_score"]),
        stack_tokens=tokens,
        positions=positions,
        question=_strings([about["question"]], "question")[0],
        answer=_strings([about["answer"]], "answer")[0],
        answer_ids=answer_ids,
        settings=about["settings"],
        metric=about["metric"],
        answer_token=answer_token,
        measured=measured,
        picture=picture,
        exact=exact or None,
    )


def _checked(
    tensors: dict[str, Tensor],
    name: str,
    shape: Sequence[int | None],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Take out a tensor of this shape, None for any number but 0."""
    tensor = tensors.pop(name)
    fits = tensor.dim() == len(shape) and all(
        found == wanted if wanted is not None else found > 0
        for found, wanted in zip(tensor.shape, shape, strict=True)
    )
    if not fits or tensor.dtype != dtype:
        raise ValueError(f"its {name} has the wrong shape {list(tensor.shape)} or type {tensor.dtype}")
    return tensor


def _strings(values: Any, what: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"its {what} are no strings")
    return tuple(values)


def _numbers(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"its {what} are no whole numbers")
    return tuple(values)
