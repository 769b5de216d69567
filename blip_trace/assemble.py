"""From what was measured to the results that a user gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .attribution import Screened
from .inputs import Inputs
from .prepare import Asked, Prepared
from .program import Program
from .request import Request
from .result import Restored, TraceResult


class Assembler:
    """Makes results of one model."""

    def __init__(self, program: Program, inputs: Inputs) -> None:
        self._program = program
        self._inputs = inputs

    def trace(
        self,
        prepared: Prepared,
        request: Request,
        found: Screened,
        settings: Mapping[str, Any],
    ) -> TraceResult:
        """The maps of a question."""
        asked = prepared.asked
        answer_ids = found.answer_ids.tolist()
        ids = self.token_ids(asked, answer_ids)
        stack_tokens, positions, maps, exact = {}, {}, {}, {}
        samples = len(found.measured[request.metrics[0]].low)
        first = 0
        for (stack, kind), grid in prepared.grids.items():
            labels = grid.labels or tuple(self._inputs.labels([ids[stack][t] for t in grid.positions]))
            stack_tokens[stack], positions[stack] = labels, grid.positions
            maps[stack, kind] = torch.empty(samples, *grid.shape)
            exact[stack, kind] = found.exact[first : first + len(grid.cells)].view(grid.shape)
            first += len(grid.cells)
        checked = {}
        if found.rank_correlation is not None:
            checked["screen"] = {"rank_correlation": found.rank_correlation, "missed": found.missed}
        unfilled = TraceResult(
            restored=maps,
            low_scores=torch.empty(0),
            high_score=0.0,
            positions=positions,
            stack_tokens=stack_tokens,
            question=asked.question,
            answer=self._inputs.answer_text(answer_ids),
            answer_ids=tuple(answer_ids),
            settings={**settings, **prepared.settings, **checked},
            measured=found.measured,
            exact=None if bool(found.exact.all()) else exact,
            picture=self._inputs.picture(asked.pixels) if "vision" in request.stacks else None,
        )
        return unfilled.by(request.metrics[0])

    def restored(
        self,
        asked: Asked,
        found: Screened,
        settings: Mapping[str, Any],
    ) -> Restored:
        """The cells of a question, one by one; the first metric is shown."""
        answer_ids = found.answer_ids.tolist()
        unfilled = Restored(
            scores=torch.empty(0),
            low_scores=torch.empty(0),
            high_score=0.0,
            question=asked.question,
            answer=self._inputs.answer_text(answer_ids),
            answer_ids=tuple(answer_ids),
            settings=settings,
            metric="",
            answer_token=None,
            measured=found.measured,
        )
        return unfilled.by(next(iter(found.measured)))

    def token_ids(self, asked: Asked, answer_ids: Sequence[int]) -> dict[str, list[int]]:
        """The tokens of each text stack, in a run that is scored by this answer."""
        text, begun = asked.text_ids.tolist(), list(answer_ids[:-1])
        match self._program.task:
            case "answer":
                inputs = [text, [self._program.start_token, *begun]]
            case "continue":
                inputs = [[*text, *begun]]
            case "match":
                inputs = [text]
        return {stack.name: ids for stack, ids in zip(self._program.texts, inputs, strict=True)}
