"""What a trace returns: the maps, their samples, and enough about the run to make it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .sites import HEAD_KINDS, check_tokens

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "blip_trace.TraceResult/2"


class MapView(NamedTuple):
    """One map of a trace, ready to be shown: float32 [rows, layers], the rows' labels, and where it was cut
    ("" for all of it)."""

    grid: Tensor
    labels: tuple[str, ...]
    where: str


@dataclass(frozen=True)
class TraceResult:
    """A trace of one question.

    Probabilities are of the whole answer: for several tokens the product of theirs (teacher forcing).
    `restored` holds, for each (stack, kind), float32 [samples, tokens, layers]: P(answer) of the corrupted
    run with that cell's states put back to their clean values. Kinds of heads have [samples, heads, tokens,
    layers], and everything that is said of [tokens, layers] below is [heads, tokens, layers] for them.
    `stack_tokens` are the labels of the traced tokens, `positions` where they stand in their stack. In a
    trace with direction "noise" a cell holds P(answer) of the clean run with the corrupted states in it, and
    its effect is what that took away.
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

    def samples(self, stack: str, kind: str) -> Tensor:
        """P(answer) of every cell and sample: float32 [samples, tokens, layers]. Raises KeyError where the
        map was not traced."""
        try:
            return self.restored[stack, kind]
        except KeyError:
            traced = ", ".join(f"({s!r}, {k!r})" for s, k in self.restored)
            message = f"no map of kind {kind!r} in stack {stack!r} was traced: there are {traced}"
            raise KeyError(message) from None

    def grid(self, stack: str, kind: str) -> Tensor:
        """P(answer) with that state restored, mean over samples: float32 [tokens, layers]."""
        return self.samples(stack, kind).mean(0)

    def color_range(self, stack: str, kind: str) -> tuple[float, float]:
        """Probabilities between which the colours of a map run: from no effect, the low score, to the largest
        one, but over no less than a quarter of the total effect, so that noise is not blown up. In noising
        from the largest effect up to the high score, which is none."""
        grid = self.grid(stack, kind)
        least = max(abs(self.total_effect) / 4, 1e-6)
        if self.noising:
            return min(float(grid.min()), self.high_score - least), self.high_score
        return self.low_score, max(float(grid.max()), self.low_score + least)

    @property
    def low_score(self) -> float:
        """P(answer) of the corrupted run, mean over samples."""
        return float(self.low_scores.mean())

    @property
    def total_effect(self) -> float:
        """High score minus low score."""
        return self.high_score - self.low_score

    @property
    def total_effect_vanishes(self) -> bool:
        """Whether the total effect is too small to divide by: below 1 % probability, or, of several samples,
        below two standard errors of the low score."""
        samples = len(self.low_scores)
        error = float(self.low_scores.std()) / samples**0.5 if samples > 1 else 0.0
        return abs(self.total_effect) < max(0.01, 2 * error)

    def indirect_effect(self, stack: str, kind: str) -> Tensor:
        """Restored minus low score (noising: high score minus what is left), mean over samples: float32
        [tokens, layers]."""
        return self._effects(stack, kind).mean(0)

    def normalized(self, stack: str, kind: str) -> Tensor:
        """Indirect over total effect: float32 [tokens, layers], 1 where restoring brings all of the answer
        back (noising: takes all of it away). All NaN where `total_effect_vanishes`."""
        if self.total_effect_vanishes:
            return torch.full_like(self.grid(stack, kind), float("nan"))
        return self.indirect_effect(stack, kind) / self.total_effect

    def standard_error(self, stack: str, kind: str) -> Tensor:
        """Standard error of the indirect effect: float32 [tokens, layers], NaN for a single sample."""
        effects = self._effects(stack, kind)
        if len(effects) == 1:
            return torch.full_like(effects[0], float("nan"))
        error: Tensor = effects.std(0) / len(effects) ** 0.5
        return error

    def _effects(self, stack: str, kind: str) -> Tensor:
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
            token = int(self.indirect_effect(stack, kind).amax((0, 2)).argmax())
        (token,) = check_tokens([token], len(labels))
        heads = tuple(f"head {head}" for head in range(len(grid)))
        return MapView(grid[:, token], heads, f" at {labels[token]!r} ({self.positions[stack][token]})")

    def tokens(self, stack: str) -> tuple[str, ...]:
        """Labels of a stack's tokens. Raises KeyError where the stack was not traced."""
        if stack not in self.stack_tokens:
            raise KeyError(f"stack {stack!r} was not traced: there are {', '.join(self.stack_tokens)}")
        return self.stack_tokens[stack]

    def plot(self, stack: str, kind: str, path: str | Path | None = None, token: int | None = None) -> Figure:
        """Heatmap of the restored probability, token x layer or head x layer (see `view`); saved to `path` if
        given (png, pdf, svg)."""
        from .plotting import plot_map

        return plot_map(self, stack, kind, path, token)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the maps and, in its metadata, everything else; whole or not at all.

        Raises OSError where the file cannot be written.
        """
        tensors = {f"{stack}/{kind}": maps.contiguous() for (stack, kind), maps in self.restored.items()}
        tensors["low_scores"] = self.low_scores.contiguous()
        metadata = {"format": FORMAT, "trace": json.dumps(self._description(), ensure_ascii=False)}
        write_whole(Path(path), save(tensors, metadata))

    @classmethod
    def load(cls, path: str | Path) -> TraceResult:
        """Read what `save` wrote. Raises ValueError where the file is something else, OSError where it cannot
        be read."""
        try:
            with safe_open(Path(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"its format is not {FORMAT}")
                about = json.loads(metadata["trace"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._read(about, tensors)
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is no saved trace: {error}") from error

    @classmethod
    def _read(cls, about: Mapping[str, Any], tensors: dict[str, Tensor]) -> TraceResult:
        low_scores = tensors.pop("low_scores")  # [samples]
        tokens = {stack: tuple(labels) for stack, labels in about["tokens"].items()}
        positions = {stack: tuple(map(int, places)) for stack, places in about["positions"].items()}
        if {s: len(p) for s, p in positions.items()} != {s: len(t) for s, t in tokens.items()}:
            raise ValueError("its tokens and their positions do not fit")
        maps = {}
        for name, tensor in tensors.items():
            stack, _, kind = name.partition("/")
            dims = 4 if kind in HEAD_KINDS else 3
            if tensor.dim() != dims or (*tensor.shape[:1], tensor.shape[-2]) != (
                *low_scores.shape,
                len(tokens[stack]),
            ):
                raise ValueError(f"the map {name} has the wrong shape {list(tensor.shape)}")
            maps[stack, kind] = tensor
        return cls(
            restored=maps,
            low_scores=low_scores,
            high_score=float(about["high_score"]),
            stack_tokens=tokens,
            positions=positions,
            question=about["question"],
            answer=about["answer"],
            answer_ids=tuple(about["answer_ids"]),
            settings=about["settings"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The trace as plain numbers and strings, for JSON: means over samples, and what `save` describes."""
        maps = {f"{stack}/{kind}": self.grid(stack, kind).tolist() for stack, kind in self.restored}
        return {
            **self._description(),
            "low_score": self.low_score,
            "low_scores": self.low_scores.tolist(),
            "total_effect_vanishes": self.total_effect_vanishes,
            "maps": maps,
        }

    def _description(self) -> dict[str, Any]:
        return {
            "question": self.question,
            "answer": self.answer,
            "answer_ids": list(self.answer_ids),
            "high_score": self.high_score,
            "tokens": {stack: list(labels) for stack, labels in self.stack_tokens.items()},
            "positions": {stack: list(places) for stack, places in self.positions.items()},
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class Restored:
    """What `Tracer.restore` returns: probabilities of the whole answer, a cell each.

    scores float32 [samples, cells], low_scores [samples] of the corrupted run, high_score of the clean one;
    token_log_probs float64 [samples, cells, answer tokens].
    """

    scores: Tensor
    token_log_probs: Tensor
    low_scores: Tensor
    high_score: float
    question: str
    answer: str
    answer_ids: tuple[int, ...]
    settings: Mapping[str, Any]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
