"""From the last stack's states to what is read of the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

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


class Ending(NamedTuple):
    """What a pass makes of the last stack's states before it is over: `function` of them [rows, C] and
    `inputs`, tensors on the same device. One name, one function and one number of inputs."""

    name: str
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]


def ending(head: Head, ops: OpSet, asked: Sequence[Asked], rows: int, device: torch.device) -> Ending | None:
    """The ending of a pass in whose `rows` these questions are answered, for `answers`; None where it takes
    more than the answers' own words, or cannot be known without waiting: see `read_answers`."""
    open_ended = any(question.answer_ids[-1] == OWN for question in asked)
    if any(question.reads != "answer" for question in asked):
        return None
    if open_ended and any(question.foil_ids is not None for question in asked):
        return None
    tokens, owner = _tokens(rows, asked)
    if not open_ended:
        return Ending("known answers", partial(_read, head, ops), (send(tokens, device),))
    inputs = tuple(send(own, device) for own in (tokens, owner, _clean_ends(asked)))
    return Ending("answers of its own", partial(_read, head, ops), inputs)


def _read(
    head: Head,
    ops: OpSet,
    states: Tensor,
    tokens: Tensor,
    owner: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """What `answers` takes. tokens, owner: see `_tokens`; ends: see `_clean_ends`, None where all answers are
    known."""
    hidden = _hidden(head, ops, states)
    best = None if ends is None else _most_probable(head, ops, hidden, ends)
    scores, _, _ = _scores(head, ops, hidden, tokens, owner, best)
    return _flat(scores, best)


def answers(asked: Sequence[Asked], found: Tensor) -> list[tuple[Tensor, Readings]]:
    """The answer [A] of each question, and the readings [runs, A] of its runs. found, on the CPU: scores
    [3, rows], flat, and behind them the token of each question that was to choose one itself."""
    open_ended = any(question.answer_ids[-1] == OWN for question in asked)
    scores, best = found.split((len(found) - open_ended * len(asked), open_ended * len(asked)))
    if open_ended:
        asked = _known(asked, best.long())
    log_probability, logit, foil_logit = scores.view(3, -1)
    read: list[tuple[Tensor, Readings]] = []
    for question in asked:
        rows = question.rows
        readings = {"log_probability": log_probability[rows], "logit": logit[rows]}
        if question.foil_ids is not None:
            readings["foil_logit"] = foil_logit[rows]
        read.append((question.answer_ids, readings))
    return read


def read_answers(head: Head, ops: OpSet, states: Tensor, asked: Sequence[Asked]) -> Pending:
    """Read the answers of all questions of a pass, whatever is read of them; states [rows, C]. A GPU is not
    waited for, unless a foil is to be compared with an answer that is not known."""
    hidden = _hidden(head, ops, states)
    if all(question.reads == "logits" for question in asked):
        waiting = [_everything(head, ops, hidden, question) for question in asked]
        return lambda: [wait() for wait in waiting]
    best = None
    if any(question.answer_ids[-1] == OWN for question in asked):
        best = _most_probable(head, ops, hidden, send(_clean_ends(asked), hidden.device))
        if any(question.foil_ids is not None for question in asked):
            asked = _known(asked, fetch(best)())
            best = None
    tokens, owner = (send(own, hidden.device) for own in _tokens(len(hidden), asked))
    scores, tokens, log_sum_exp = _scores(head, ops, hidden, tokens, owner, best)
    over_vocabulary = {
        number: fetch(_over_vocabulary(head, ops, hidden, log_sum_exp, question.rows, tokens))
        for number, question in enumerate(asked)
        if question.reads == "vocabulary"
    }
    found = fetch(_flat(scores, best))

    def wait() -> list[tuple[Tensor, Readings]]:
        read = answers(asked, found())
        for number, more in over_vocabulary.items():
            answer, readings = read[number]
            divergence, rank = more()
            read[number] = answer, {**readings, "kl_divergence": divergence, "rank": rank}
        return read

    return wait


def _hidden(head: Head, ops: OpSet, states: Tensor) -> Tensor:
    """What the vocabulary is multiplied with [rows, C]."""
    if head.dense is None:
        return states
    assert head.norm is not None
    return layer_norm(ops.linear_gelu(states, head.dense.weight, head.dense.bias), head.norm)


def _clean_ends(asked: Sequence[Asked]) -> Tensor:
    """Where the clean run of each question [questions] says the last token of its answer."""
    return torch.stack([question.rows[0, -1] for question in asked])


def _most_probable(head: Head, ops: OpSet, hidden: Tensor, ends: Tensor) -> Tensor:
    """For each question [questions] the most probable token there, from the logits of all words."""
    return _all_logits(head, ops, hidden[ends]).argmax(-1)


def _scores(
    head: Head, ops: OpSet, hidden: Tensor, tokens: Tensor, owner: Tensor | None, best: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the log-probability and the logit of its answer's token and the logit of its foil's
    [3, rows]; the tokens, with those that the questions chose put in; and the log-sum-exp [rows]."""
    if best is not None:
        tokens = torch.where(tokens == OWN, best[owner][:, None], tokens)
    logits, log_sum_exp = ops.token_logits(hidden, head.decoder.weight, head.decoder.bias, tokens)
    return (
        torch.stack((logits[:, 0] - log_sum_exp, logits[:, 0], logits[:, 1])),
        tokens,
        log_sum_exp,
    )


def _flat(scores: Tensor, best: Tensor | None) -> Tensor:
    """One tensor to fetch: numbers of tokens are whole in float64 too."""
    flat = scores.flatten()
    return flat if best is None else torch.cat((flat, best.to(flat.dtype)))


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
