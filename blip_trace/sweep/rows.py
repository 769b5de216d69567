"""From traces and failures to result rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..result import TraceResult
from ..tracer import Tracer
from ..uncertainty import standard_error
from .roles import roles_of
from .schema import Layout
from .settings import Settings

if TYPE_CHECKING:
    from .shard import Case


def failed_row(case: Case) -> dict[str, Any]:
    """Of a sample that could not be traced."""
    return {**_known(case), "status": "error", "reason": case.problem or "it was not computed"}


def left_out_row(case: Case) -> dict[str, Any]:
    """Of a sample that was to be left out, for the model answers it wrongly."""
    right = " or ".join(case.sample.answers) or "nothing is known to be right"
    return {**_known(case), "status": "filtered", "reason": f"the model says {case.said!r}, not {right}"}


def traced_row(
    layout: Layout, settings: Settings, tracer: Tracer, case: Case, result: TraceResult
) -> dict[str, Any]:
    """Of a sample that was traced: maps are arrays [tokens, layers]; of heads [heads, tokens, layers]."""
    sample = case.sample
    row = {
        **_known(case),
        "status": "ok",
        "answer": result.answer,
        "answer_ids": list(result.answer_ids),
        "foil": sample.foil,
        "corrupted": str(result.settings["corrupted"]),
        "seed": settings.noise_seed(sample),
        "samples": len(result.low_scores),
        "total_effect_vanishes": result.total_effect_vanishes,
    }
    for metric in layout.metrics:
        shown = result.by(metric)
        row[f"{metric}_high"], row[f"{metric}_low"] = shown.high_score, shown.low_score
        if layout.spread:
            row[f"{metric}_low_se"] = float(standard_error(shown.low_scores))
        for stack, kind in shown.restored:
            column = layout.map_column(stack, kind, metric)
            row[column] = shown.grid(stack, kind).numpy()
            if layout.spread:
                row[f"{column}_se"] = shown.standard_error(stack, kind).numpy()
    for stack, labels in result.stack_tokens.items():
        row[f"{stack}_tokens"] = list(labels)
        row[f"{stack}_positions"] = list(result.positions[stack])
        row[f"{stack}_roles"] = list(_roles(tracer, case, stack, result))
    if not all(np.isfinite(values).all() for values in _numbers(row, layout.store)):
        row.update(status="not_finite", reason=f"the model gives NaN or infinity, in {layout.store}")
    return row


def _known(case: Case) -> dict[str, Any]:
    """What every row has: its sample, and what was found out about it on the way."""
    sample = case.sample
    return {
        "sample_id": sample.id,
        "image": sample.image,
        "image_sha256": None if case.picture is None else case.picture.sha256,
        "question": sample.question,
        "type": sample.type,
        "answers": list(sample.answers),
        "extra": json.dumps(dict(sample.extra), ensure_ascii=False),
        "model_answer": case.said,
        "correct": case.correct,
    }


def _roles(tracer: Tracer, case: Case, stack: str, result: TraceResult) -> Sequence[str]:
    """Of the tokens of a stack that were traced."""
    if stack == "vision":
        return roles_of(stack, result.tokens(stack), ())
    assert case.asked is not None
    inputs = tracer.inputs
    ids = tracer.token_ids(case.asked, result.answer_ids)[stack]
    subject = None
    if case.sample.subject is not None and stack == tracer.stacks[1]:
        subject = inputs.find(case.sample.subject, case.asked.text_ids)
    text = len(case.asked.text_ids) if tracer.program.task == "continue" else None
    roles = roles_of(stack, inputs.labels(ids), inputs.special_tokens, subject, text)
    return [roles[place] for place in result.positions[stack]]


def _numbers(row: Mapping[str, Any], store: str) -> Iterator[npt.NDArray[np.floating[Any]]]:
    """Everything in a row that was measured, maps in the type in which they are kept."""
    with np.errstate(over="ignore"):
        for value in row.values():
            if isinstance(value, np.ndarray | float):
                yield np.asarray(value, dtype=store if isinstance(value, np.ndarray) else np.float32)
