"""From the last stack's states to what is read of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .devices import fetch, send
from .embedding import layer_norm
from .metrics import OWN, Readings, Reads, check_foil, completed, vocabulary_readings
from .ops import OpSet
from .program import Head

BLOCK_BYTES = 2**25
"""Of logits of the whole vocabulary that are in memory at once."""


Pending = Callable[[], list[tuple[Tensor, Readings]]]
"""Waits for the device: the answer [A] of each question, and the readings [runs, A] of its runs."""


@dataclass(frozen=True)
class Asked:
    """What is read of one question: `rows` [runs, A] hold its answers, first those of the clean run. Answer
    and foil: token ids, the last of the answer perhaps `metrics.OWN`. All on the CPU."""

    rows: Tensor
    answer_ids: Tensor
    foil_ids: Tensor | None
    reads: Reads


def read_answers(head: Head, ops: OpSet, hidden: Tensor, asked: Sequence[Asked]) -> Pending:
    """Read the answers of all questions of a pass; hidden [rows, C]. A GPU is not waited for, unless a foil
    is to be compared with an answer that is not known."""
    if head.dense is not None:
        assert head.norm is not None
        hidden = ops.linear_gelu(hidden, head.dense.weight, head.dense.bias)
        hidden = layer_norm(hidden, head.norm)  # [rows, C]
    if all(question.reads == "logits" for question in asked):
        waiting = [_everything(head, ops, hidden, question) for question in asked]
        return lambda: [wait() for wait in waiting]
    best = _most_probable(head, ops, hidden, asked)
    if best is not None and any(question.foil_ids is not None for question in asked):
        asked = _known(asked, fetch(best)())
        best = None
    tokens, owner = _tokens(len(hidden), asked)
    tokens = send(tokens, hidden.device)
    if best is not None:
        own = best[send(owner, hidden.device)][:, None]
        tokens = torch.where(tokens == OWN, own, tokens)
    logits, log_sum_exp = ops.token_logits(hidden, head.decoder.weight, head.decoder.bias, tokens)
    over_vocabulary = {
        number: fetch(_over_vocabulary(head, ops, hidden, log_sum_exp, question.rows, tokens))
        for number, question in enumerate(asked)
        if question.reads == "vocabulary"
    }
    values = fetch(torch.stack((logits[:, 0] - log_sum_exp, logits[:, 0], logits[:, 1])))
    found = None if best is None else fetch(best)

    def wait() -> list[tuple[Tensor, Readings]]:
        known = asked if found is None else _known(asked, found())
        log_probability, logit, foil_logit = values()
        read: list[tuple[Tensor, Readings]] = []
        for number, question in enumerate(known):
            rows = question.rows
            readings = {"log_probability": log_probability[rows], "logit": logit[rows]}
            if question.foil_ids is not None:
                readings["foil_logit"] = foil_logit[rows]
            if number in over_vocabulary:
                readings["kl_divergence"], readings["rank"] = over_vocabulary[number]()
            read.append((question.answer_ids, readings))
        return read

    return wait


def _most_probable(head: Head, ops: OpSet, hidden: Tensor, asked: Sequence[Asked]) -> Tensor | None:
    """For each question [questions] the most probable token at the end of its clean run's answer; None where
    all answers are known: then the logits of all words need not be computed."""
    if all(question.answer_ids[-1] != OWN for question in asked):
        return None
    rows = send(torch.stack([question.rows[0, -1] for question in asked]), hidden.device)
    return _all_logits(head, ops, hidden[rows]).argmax(-1)


def _known(asked: Sequence[Asked], best: Tensor) -> list[Asked]:
    """The questions with answers of the model's own put in."""
    return [
        replace(question, answer_ids=torch.where(question.answer_ids == OWN, own, question.answer_ids))
        for question, own in zip(asked, best, strict=True)
    ]


def _tokens(rows: int, asked: Sequence[Asked]) -> tuple[Tensor, Tensor]:
    """For each row the tokens [rows, 2] of answer and foil that are read there, and whose they are [rows]."""
    tokens = torch.zeros(rows, 2, dtype=torch.int64)
    owner = torch.zeros(rows, dtype=torch.int64)
    for number, question in enumerate(asked):
        answer, foil = question.answer_ids, question.foil_ids
        tokens[question.rows] = torch.stack((answer, answer if foil is None else check_foil(answer, foil)), 1)
        owner[question.rows] = number
    return tokens, owner


def _everything(
    head: Head, ops: OpSet, hidden: Tensor, question: Asked
) -> Callable[[], tuple[Tensor, Readings]]:
    """The answer [A] and the logits [runs, A, V]; runs that share rows share the work."""
    distinct, of_run = question.rows.unique(return_inverse=True)
    logits = fetch(_all_logits(head, ops, hidden[send(distinct, hidden.device)]))

    def wait() -> tuple[Tensor, Readings]:
        known = logits()
        return completed(question.answer_ids, known[of_run[0, -1]]), {"logits": known[of_run]}

    return wait


def _all_logits(head: Head, ops: OpSet, hidden: Tensor) -> Tensor:
    """Logits [rows, V], in float32 or better."""
    logits = ops.linear(hidden, head.decoder.weight, None)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide) + head.decoder.bias.to(wide)


def _over_vocabulary(
    head: Head, ops: OpSet, hidden: Tensor, log_sum_exp: Tensor, rows: Tensor, tokens: Tensor
) -> Tensor:
    """KL divergence and rank [2, runs, A] of a question whose answers are in `rows` [runs, A]; runs that
    share rows share the work. tokens [all rows, 2]: see `_tokens`."""
    device = hidden.device
    readings = torch.empty(2, *rows.shape, dtype=torch.float64, device=device)
    block = max(1, BLOCK_BYTES // (4 * len(head.decoder.bias)))
    for place in range(rows.shape[1]):
        distinct, of_run = rows[:, place].unique(return_inverse=True)
        clean_row = int(rows[0, place])
        clean = _all_logits(head, ops, hidden[clean_row][None])[0]
        parts = [
            vocabulary_readings(
                _all_logits(head, ops, hidden[own]),
                log_sum_exp[own],
                clean,
                log_sum_exp[clean_row],
                tokens[clean_row, 0],
            )
            for own in send(distinct, device).split(block)
        ]
        for number, part in enumerate(zip(*parts, strict=True)):
            readings[number, :, place] = torch.cat(part)[send(of_run, device)]
    return readings
