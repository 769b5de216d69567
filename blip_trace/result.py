"""What a trace returns: the maps, their samples, and enough about the run to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .metrics import METRICS, Measured, joined
from .sites import check_tokens
from .uncertainty import Comparison, bootstrap_interval, paired_test, standard_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VANISHING = 0.01
"""A total effect below this (1 % probability) is too small to divide by."""


class MapView(NamedTuple):
    """One map of a trace, ready to be shown: float32 [rows, layers], the rows' labels, and where it was cut
    ("" for all of it): `token`, by its place in a map of heads."""

    grid: Tensor
    labels: tuple[str, ...]
    where: str
    token: int | None = None

    def cut(self, values: Tensor) -> Tensor:
        """Of values of the whole map's shape those that are shown: [rows, layers]."""
        return values if self.token is None else values[:, self.token]


@dataclass(frozen=True)
class TraceResult:
    """A trace of one question: of one metric, usually the answer's probability.

    Metrics are of the whole answer: of several tokens the product of their probabilities (teacher forcing),
    the sum of their logits, differences and divergences, the largest of their ranks; `by` gives another
    metric of those that were asked for, or a token of the answer alone. `restored` holds, for each (stack,
    kind), float32 [samples, tokens, layers]: the metric of the corrupted run with that cell's states put back
    to their clean values. Kinds of heads have [samples, heads, tokens, layers], and everything that is said
    of [tokens, layers] below is [heads, tokens, layers] for them. `stack_tokens` are the labels of the traced
    tokens (of the vision stack: of groups of patches), `positions` where they, or the first of each group,
    stand in their stack. In a trace with direction "noise" a cell holds the metric of the clean run with the
    corrupted states in it, and its effect is what that took away.

    `metric`, `answer_token`: what is shown (None: the whole answer). `measured`: all metrics, for each token
    of the answer. `picture`, uint8 [H, W, 3], is what the model saw, kept where its patches were traced.
    `exact`, bool of the maps' shape without samples: which cells were done exactly, where not all were.
    """

    restored: Mapping[tuple[str, str], Tensor]
    low_scores: Tensor
    high_score: float
    stack_tokens: Mapping[str, tuple[str, ...]]
    positions: Mapping[str, tuple[int, ...]]
    question: str
    answer: str
    answer_ids: tuple[int, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    metric: str = "probability"
    answer_token: int | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)
    picture: Tensor | None = None
    exact: Mapping[tuple[str, str], Tensor] | None = None

    def by(self, metric: str, token: int | None = None) -> TraceResult:
        """The same trace by another metric, of one token of the answer or of the whole of it.

        By the logit difference, `normalized` is the patching effect of NOTICE: (restored - corrupted) /
        (clean - corrupted). Raises KeyError for a metric that was not asked for, ValueError for a token that
        the answer does not have.
        """
        cells, low, high = joined(self.measured, metric, token)
        maps, first = {}, 0
        for name, now in self.restored.items():
            count = now[0].numel()
            maps[name] = cells[:, first : first + count].reshape(now.shape)
            first += count
        return replace(
            self, restored=maps, low_scores=low, high_score=high, metric=metric, answer_token=token
        )

    def samples(self, stack: str, kind: str) -> Tensor:
        """The metric of every cell and sample: float32 [samples, tokens, layers]. Raises KeyError where the
        map was not traced."""
        try:
            return self.restored[stack, kind]
        except KeyError:
            traced = ", ".join(f"({s!r}, {k!r})" for s, k in self.restored)
            message = f"no map of kind {kind!r} in stack {stack!r} was traced: there are {traced}"
            raise KeyError(message) from None

    def grid(self, stack: str, kind: str) -> Tensor:
        """The metric with that state restored, mean over samples: float32 [tokens, layers]."""
        return self.samples(stack, kind).mean(0)

    def color_range(self, stack: str, kind: str) -> tuple[float, float]:
        """Values between which the colours of a map run: from no effect, the low score (noising: the high
        one), to the largest effect, but over no less than a quarter of the total effect, so that noise is not
        blown up. The first is larger where the metric falls when the answer returns, or in noising."""
        grid = self.grid(stack, kind)
        least = max(abs(self.total_effect) / 4, 1e-6)
        none = self.high_score if self.noising else self.low_score
        if self.noising != METRICS[self.metric].falls:
            return none, min(float(grid.min()), none - least)
        return none, max(float(grid.max()), none + least)

    @property
    def low_score(self) -> float:
        """The metric of the corrupted run, mean over samples."""
        return float(self.low_scores.mean())

    @property
    def total_effect(self) -> float:
        """High score minus low score."""
        return self.high_score - self.low_score

    @property
    def total_effect_vanishes(self) -> bool:
        """Whether the total effect is too small to divide by: below `VANISHING`, or, of several samples,
        below two standard errors of the low score."""
        samples = len(self.low_scores)
        error = float(self.low_scores.std()) / samples**0.5 if samples > 1 else 0.0
        return abs(self.total_effect) < max(VANISHING, 2 * error)

    def indirect_effect(self, stack: str, kind: str) -> Tensor:
        """Restored minus low score (noising: high score minus what is left), mean over samples: float32
        [tokens, layers]."""
        return self.effects(stack, kind).mean(0)

    def normalized(self, stack: str, kind: str) -> Tensor:
        """Indirect over total effect: float32 [tokens, layers], 1 where restoring brings all of the answer
        back (noising: takes all of it away). All NaN where `total_effect_vanishes`."""
        if self.total_effect_vanishes:
            return torch.full_like(self.grid(stack, kind), float("nan"))
        return self.indirect_effect(stack, kind) / self.total_effect

    def standard_error(self, stack: str, kind: str) -> Tensor:
        """Standard error of the indirect effect: float32 [tokens, layers], NaN for a single sample."""
        return standard_error(self.effects(stack, kind))

    def interval(
        self, stack: str, kind: str, level: float = 0.95, draws: int = 2000, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Bootstrap interval of the indirect effect, over samples of the noise: see
        `uncertainty.bootstrap_interval`. Raises ValueError for a single sample."""
        return bootstrap_interval(self.effects(stack, kind), level, draws, seed)

    def compare(
        self,
        stack: str,
        kind: str,
        other: TraceResult | None = None,
        other_kind: str | None = None,
        *,
        normalized: bool = False,
    ) -> Comparison:
        """Test cell by cell whether two maps' indirect effects differ, paired by sample: another kind of this
        trace, or another trace (of another model, say) under the same noise. See `uncertainty.paired_test`.

        normalized: of effects divided by each trace's total effect, for models whose answers are not equally
        sure. Raises ValueError where the maps have other shapes, too few samples, or a total effect vanishes
        that is divided by.
        """
        theirs = self if other is None else other
        for what in ("corruption", "direction"):
            if self.settings.get(what) != theirs.settings.get(what) or self.metric != theirs.metric:
                raise ValueError(
                    "samples are paired where both traces have the same corruption, direction and metric"
                )
        if other is None and other_kind is None:
            raise ValueError("compare with another trace, another kind, or both")
        if normalized and (self.total_effect_vanishes or theirs.total_effect_vanishes):
            raise ValueError("a vanishing total effect cannot be divided by")
        scales = [result.total_effect if normalized else 1.0 for result in (self, theirs)]
        one, two = self.effects(stack, kind), theirs.effects(stack, other_kind or kind)
        return paired_test(one / scales[0], two / scales[1])

    def effects(self, stack: str, kind: str) -> Tensor:
        """The indirect effect of every sample: float32 [samples, tokens, layers]."""
        samples = self.samples(stack, kind)
        if self.noising:
            return self.high_score - samples
        effects: Tensor = samples - self.low_scores.view(-1, *[1] * (samples.dim() - 1))
        return effects

    @property
    def noising(self) -> bool:
        """Whether corrupted states were put into the clean run."""
        return self.settings.get("direction") == "noise"

    def view(self, stack: str, kind: str, token: int | None = None) -> MapView:
        """A map as one looks at it: rows are tokens or, of a kind of heads, the heads at one token: the one
        with the largest effect, unless `token` names another by its place in the map.

        Raises KeyError where the map was not traced, ValueError for a token that is not in it or given for
        a map without heads.
        """
        grid, labels = self.grid(stack, kind), self.tokens(stack)
        if grid.dim() == 2:
            if token is not None:
                raise ValueError(f"{kind} maps show all tokens at once: no token can be chosen")
            return MapView(grid, labels, "")
        if token is None:
            effect = self.indirect_effect(stack, kind) * (-1 if METRICS[self.metric].falls else 1)
            token = int(effect.amax((0, 2)).argmax())
        (token,) = check_tokens([token], len(labels))
        heads = tuple(f"head {head}" for head in range(len(grid)))
        where = f" at {labels[token]!r} ({self.positions[stack][token]})"
        return MapView(grid[:, token], heads, where, token)

    def tokens(self, stack: str) -> tuple[str, ...]:
        """Labels of a stack's tokens. Raises KeyError where the stack was not traced."""
        if stack not in self.stack_tokens:
            raise KeyError(f"stack {stack!r} was not traced: there are {', '.join(self.stack_tokens)}")
        return self.stack_tokens[stack]

    def plot(
        self,
        stack: str,
        kind: str,
        path: str | Path | None = None,
        token: int | None = None,
        level: float | None = None,
    ) -> Figure:
        """Heatmap of the metric, token x layer or head x layer (see `view`); saved to `path` if given (png,
        pdf, svg). level: cells are crossed out whose bootstrap interval of this level holds no effect."""
        from .plotting import plot_map

        return plot_map(self, stack, kind, path, token, level)

    def plot_image(
        self, kind: str = "hidden", path: str | Path | None = None, layers: Sequence[int] | None = None
    ) -> Figure:
        """The vision stack's map over the picture, one panel for each layer (all of them unless `layers` are
        given), the class token's effect above it. Raises KeyError where the vision stack was not traced."""
        from .plotting_image import plot_image

        return plot_image(self, kind, path, layers)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the maps and, in its metadata, everything else; whole or not at all.

        Raises OSError where the file cannot be written.
        """
        from .trace_file import write_trace

        write_trace(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> TraceResult:
        """Read what `save` wrote. Raises ValueError where the file is something else, OSError where it cannot
        be read."""
        from .trace_file import read_trace

        return read_trace(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain numbers and strings, for JSON: means over samples, and what `save` describes."""
        maps = {f"{stack}/{kind}": self.grid(stack, kind).tolist() for stack, kind in self.restored}
        return {
            **self.description(),
            "low_score": self.low_score,
            "low_scores": self.low_scores.tolist(),
            "total_effect_vanishes": self.total_effect_vanishes,
            "maps": maps,
        }

    def description(self) -> dict[str, Any]:
        """All of it but the maps' numbers, for JSON."""
        return {
            "question": self.question,
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "high_score": self.high_score,
            "metric": self.metric,
            "answer_token": self.answer_token,
            "metrics": list(self.measured),
            "maps": [list(name) for name in self.restored],
            "tokens": {stack: list(labels) for stack, labels in self.stack_tokens.items()},
            "positions": {stack: list(places) for stack, places in self.positions.items()},
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class Restored:
    """What `Tracer.restore` returns: one metric of each cell, of the whole answer unless `answer_token` is
    given.

    scores float32 [samples, cells], low_scores [samples] of the corrupted run, high_score of the clean one.
    `measured`: all metrics that were asked for, for each token of the answer.
    """

    scores: Tensor
    low_scores: Tensor
    high_score: float
    question: str
    answer: str
    answer_ids: tuple[int, ...]
    settings: Mapping[str, Any]
    metric: str
    answer_token: int | None
    measured: Mapping[str, Measured]

    def by(self, metric: str, token: int | None = None) -> Restored:
        """As `TraceResult.by`."""
        cells, low, high = joined(self.measured, metric, token)
        return replace(self, scores=cells, low_scores=low, high_score=high, metric=metric, answer_token=token)


@dataclass(frozen=True)
class Logits:
    """What `Tracer.logits` returns: float32 logits over the model's words at each token of the answer, which
    says what stands before it.

    cells [samples, cells, A, V], low [samples, A, V] of the corrupted runs, high [A, V] of the clean one.
    """

    cells: Tensor
    low: Tensor
    high: Tensor
    answer_ids: tuple[int, ...]
    settings: Mapping[str, Any]
