"""NOTICE's circuit: the heads whose mean effect at the correct answer's token stands out from the others."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

METRIC = 0
"""P_patched(correct), by which NOTICE compares heads; 2 is the difference of logit differences."""
DEVIATIONS = 2


def selected_scores(
    flow: Mapping[str, Any], processor: Any, correct_answer: str, metric: int = METRIC
) -> npt.NDArray[np.float32] | None:
    """One metric of a result at the token where the correct answer begins in the question: float32 [layers];
    None where it does not stand there. metric: 0 to 3, in the order of the scores."""
    asked = processor.tokenizer(flow["question"]).input_ids
    answer = processor.tokenizer(correct_answer, add_special_tokens=False).input_ids
    for place in range(len(asked) - len(answer) + 1):
        if answer and asked[place : place + len(answer)] == answer:
            scores: npt.NDArray[np.float32] = flow["scores"][place, :, metric].numpy()
            return scores
    return None


def head_scores(
    flows: Sequence[Sequence[Mapping[str, Any]]],
    processor: Any,
    correct_answers: Sequence[str],
    metric: int = METRIC,
) -> npt.NDArray[np.float32]:
    """Of what `debug_head_flows` gives [heads][rows] the scores that `get_circuits` takes: float32
    [rows, layers, heads].

    Questions in which their answer does not stand are left out, with a warning. Raises ValueError where that
    leaves none, and where there are not as many answers as rows.
    """
    by_row = list(zip(*flows, strict=True))
    selected = []
    for heads, answer in zip(by_row, correct_answers, strict=True):
        own = [selected_scores(flow, processor, answer, metric) for flow in heads]
        if all(scores is not None for scores in own):
            selected.append(np.stack([scores for scores in own if scores is not None], axis=1))
    if not selected:
        raise ValueError("in no question stands its correct answer")
    if len(selected) < len(by_row):
        warnings.warn(
            f"{len(by_row) - len(selected)} of {len(by_row)} questions are left out: their correct answer "
            "does not stand in them",
            stacklevel=2,
        )
    return np.stack(selected)


def get_circuits(scores: npt.ArrayLike) -> set[tuple[int, int]]:
    """The heads (layer, head) whose mean absolute score over the questions is at least the mean over all
    heads and two standard deviations of that.

    scores [questions, layers, heads]. Raises ValueError for another shape and for NaN, which patching effects
    without a total effect are: leave those questions out, or put 0 there as NOTICE does.
    """
    array = np.abs(np.asarray(scores))
    if array.ndim != 3 or not array.size:
        raise ValueError(f"scores must be [questions, layers, heads], not {list(array.shape)}")
    if np.isnan(array).any():
        raise ValueError("the scores hold NaN: leave those questions out, or use numpy.nan_to_num as NOTICE")
    by_head = array.mean(axis=0)
    threshold = by_head.mean() + DEVIATIONS * by_head.std()
    return {(int(layer), int(head)) for layer, head in np.argwhere(by_head >= threshold)}
