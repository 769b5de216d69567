"""What is read from the answers of runs, and the metrics made of it: probability, logit difference, rank, …

A *reading* is a number for each token of the answer. Logits and log-probabilities are read always; a foil's
logit where there is a foil; divergence and rank, which take the logits of the whole vocabulary, where they
are asked for. Or those logits themselves are read, and nothing else, for metrics of one's own. A *metric* is
made of readings, and joins those of several tokens to one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .sites import check_names

Readings = Mapping[str, Tensor]
"""By name, tensors [..., A] over the answer's tokens, in float64: log_probability, logit and, where they were
asked for, foil_logit, kl_divergence, rank; or logits [..., A, V] alone, in float32 or better."""

Reads = Literal["answer", "vocabulary", "logits"]
"""What is read: what takes the logits of the answer (and the foil), also what takes those of all words, or
those of all words themselves."""


OWN = -1
"""In the place of an answer's last token: whichever is most probable there in the clean run."""


def _sum(values: Tensor) -> Tensor:
    return values.sum(-1)


@dataclass(frozen=True)
class Metric:
    """of_token [..., A] of readings, and joint [...] of that. `title`: as plots say it. `falls`: the better
    the answer comes back, the smaller it is. `vocabulary`: it takes the logits of all words."""

    title: str
    of_token: Callable[[Readings], Tensor]
    joint: Callable[[Tensor], Tensor] = _sum
    falls: bool = False
    vocabulary: bool = False


METRICS: dict[str, Metric] = {
    "probability": Metric(
        "P(answer)", lambda read: read["log_probability"].exp(), lambda values: values.prod(-1)
    ),
    "log_probability": Metric("log P(answer)", lambda read: read["log_probability"]),
    "logit": Metric("logit of the answer", lambda read: read["logit"]),
    "logit_difference": Metric(
        "logit(answer) - logit(foil)", lambda read: read["logit"] - read["foil_logit"]
    ),
    "kl_divergence": Metric(
        "KL(clean || run)", lambda read: read["kl_divergence"], falls=True, vocabulary=True
    ),
    "rank": Metric(
        "rank of the answer", lambda read: read["rank"], lambda values: values.amax(-1), True, True
    ),
}


def check_metrics(metrics: Sequence[str], foil: object) -> tuple[str, ...]:
    """Metrics as a tuple without repetitions.

    Raises ValueError for an empty list and an unknown name, and where a logit difference has no foil or a
    foil no logit difference.
    """
    metrics = check_names("metric", metrics, METRICS)
    if ("logit_difference" in metrics) != (foil is not None):
        raise ValueError("the metric logit_difference and a foil answer go together: give both or neither")
    return metrics


def reads_of(metrics: Sequence[str]) -> Reads:
    """What must be read for these."""
    return "vocabulary" if any(METRICS[metric].vocabulary for metric in metrics) else "answer"


def completed(answer: Tensor, logits: Tensor) -> Tensor:
    """An answer [A] whose last token may be `OWN`; `logits`: those [V] of the clean run at its place."""
    if answer[-1] != OWN:
        return answer
    return torch.cat((answer[:-1], logits.argmax(-1, keepdim=True).cpu()))


def check_foil(answer: Tensor, foil: Tensor) -> Tensor:
    """Tokens [A] to compare the answer's [A] with: the answer's own but for the first at which the two part,
    so that both have the same words before them.

    Raises ValueError where they never part.
    """
    for place, (own, other) in enumerate(zip(answer.tolist(), foil.tolist(), strict=False)):
        if own != other:
            compared = answer.clone()
            compared[place] = other
            return compared
    raise ValueError("the foil is the answer, or one begins with the other: no token tells them apart")


def vocabulary_readings(
    logits: Tensor, log_sum_exp: Tensor, clean: Tensor, clean_log_sum_exp: Tensor, token: Tensor
) -> tuple[Tensor, Tensor]:
    """KL divergence from the clean distribution, the sum of p_clean (log p_clean - log p) over the
    vocabulary, and the rank of a token, 1 + how many words are more probable: [n] each, in float64.

    logits [n, V] of runs and clean [V], in float32 or better; log_sum_exp [n], clean_log_sum_exp [] and
    token [].
    """
    wide = clean.double()
    probabilities = (wide - clean_log_sum_exp).exp()
    divergence = (wide - logits) @ probabilities + (log_sum_exp - clean_log_sum_exp)
    divergence.clamp_(min=0)  # rounding may put that of a run and itself just below
    rank = 1 + (logits > logits.index_select(1, token.view(1))).sum(-1)
    return divergence, rank.double()


@dataclass(frozen=True)
class Measured:
    """One metric of every run of a trace, for each token of the answer: float32 cells [samples, cells, A],
    low [samples, A] of the corrupted runs and high [A] of the clean one."""

    cells: Tensor
    low: Tensor
    high: Tensor


def joined(measured: Mapping[str, Measured], metric: str, token: int | None) -> tuple[Tensor, Tensor, float]:
    """Cells [samples, cells], low [samples] and high of one token of the answer, or of all of them jointly.

    Raises KeyError for a metric that is not among those measured, ValueError for a token that the answer does
    not have.
    """
    if metric not in measured:
        raise KeyError(f"{metric!r} was not measured: there are {', '.join(measured)}")
    own, join = measured[metric], METRICS[metric].joint
    if token is not None:
        if not -own.high.shape[-1] <= token < own.high.shape[-1]:
            raise ValueError(f"the answer has no token {token}: it has {own.high.shape[-1]}")

        def join(values: Tensor) -> Tensor:
            return values[..., token]

    return join(own.cells), join(own.low), float(join(own.high))


def measure_all(
    metrics: Sequence[str], clean: Readings, corrupted: Readings, patched: Readings
) -> dict[str, Measured]:
    """Metrics of readings [A], [samples, A] and [samples, cells, A]."""
    return {
        metric: Measured(
            *(METRICS[metric].of_token(read).to(torch.float32) for read in (patched, corrupted, clean))
        )
        for metric in metrics
    }
