"""From the last stack's states to what is read of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .embedding import layer_norm
from .metrics import OWN, Readings, Reads, check_foil, completed, vocabulary_readings
from .ops import OpSet
from .program import Head

BLOCK_BYTES = 2**25
"""Of logits of the whole vocabulary that are in memory at once."""


@dataclass(frozen=True)
class Asked:
    """What is read of one question: `rows` [runs, A] hold its answers, first those of the clean run. Answer
    and foil: token ids, the last of the answer perhaps `metrics.OWN`."""

    rows: Tensor
    answer_ids: Tensor
    foil_ids: Tensor | None
    reads: Reads


def read_answers(
    head: Head, ops: OpSet, hidden: Tensor, asked: Sequence[Asked]
) -> list[tuple[Tensor, Readings]]:
    """The answer [A] of each question, and the readings [runs, A] of its runs; hidden [rows, C]."""
    if head.dense is not None:
        assert head.norm is not None
        hidden = ops.linear_gelu(hidden, head.dense.weight, head.dense.bias)
        hidden = layer_norm(hidden, head.norm)  # [rows, C]
    if all(question.reads == "logits" for question in asked):
        return [_everything(head, ops, hidden, question) for question in asked]
    answers = [_answer(head, ops, hidden, question) for question in asked]
    tokens = torch.zeros(len(hidden), 2, dtype=torch.int64)  # of the answer and of the foil
    for question, answer in zip(asked, answers, strict=True):
        foil = answer if question.foil_ids is None else check_foil(answer, question.foil_ids)
        tokens[question.rows] = torch.stack((answer, foil), dim=1)
    logits, log_sum_exp = ops.token_logits(hidden, head.decoder.weight, head.decoder.bias, tokens)
    found: list[tuple[Tensor, Readings]] = []
    for question, answer in zip(asked, answers, strict=True):
        rows = question.rows
        readings = {
            "log_probability": logits[rows, 0] - log_sum_exp[rows],
            "logit": logits[rows, 0],
        }
        if question.foil_ids is not None:
            readings["foil_logit"] = logits[rows, 1]
        if question.reads == "vocabulary":
            readings |= _over_vocabulary(head, ops, hidden, log_sum_exp, rows, answer)
        found.append((answer, readings))
    return found


def _everything(head: Head, ops: OpSet, hidden: Tensor, question: Asked) -> tuple[Tensor, Readings]:
    """The answer [A] and the logits [runs, A, V]; runs that share rows share the work."""
    distinct, of_run = question.rows.unique(return_inverse=True)
    logits = _all_logits(head, ops, hidden[distinct])
    return completed(question.answer_ids, logits[of_run[0, -1]]), {"logits": logits[of_run]}


def _answer(head: Head, ops: OpSet, hidden: Tensor, question: Asked) -> Tensor:
    if question.answer_ids[-1] != OWN:  # known: its logits alone will be computed, not those of all words
        return question.answer_ids
    return completed(question.answer_ids, _all_logits(head, ops, hidden[question.rows[0, -1:]])[0])


def _all_logits(head: Head, ops: OpSet, hidden: Tensor) -> Tensor:
    """Logits [rows, V], in float32 or better."""
    logits = ops.linear(hidden, head.decoder.weight, None)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) + head.decoder.bias.to(wide)


def _over_vocabulary(
    head: Head, ops: OpSet, hidden: Tensor, log_sum_exp: Tensor, rows: Tensor, answer: Tensor
) -> dict[str, Tensor]:
    """KL divergence and rank [runs, A]; runs that share rows share the work."""
    readings = torch.empty(2, *rows.shape, dtype=torch.float64)
    block = max(1, BLOCK_BYTES // (4 * len(head.decoder.bias)))
    for place, token in enumerate(answer.tolist()):
        distinct, of_run = rows[:, place].unique(return_inverse=True)
        clean_row = rows[0, place]
        clean = _all_logits(head, ops, hidden[clean_row][None])[0]
        parts = [
            vocabulary_readings(
                _all_logits(head, ops, hidden[own]), log_sum_exp[own], clean, log_sum_exp[clean_row], token
            )
            for own in distinct.split(block)
        ]
        for number, part in enumerate(zip(*parts, strict=True)):
            readings[number, :, place] = torch.cat(part)[of_run]
    return {"kl_divergence": readings[0], "rank": readings[1]}
