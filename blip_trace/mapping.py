"""From checked questions to results: prepared, measured, put together; on a GPU each while it works on those
before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from .assemble import Assembler
from .checks import Check
from .corrupting import Corruption
from .corruption import check_corruption
from .measuring import Measurer, Progress
from .metrics import Reads
from .prepare import Asked, Changed, Prepared, Preparer, Wanted
from .request import Maps, Request
from .result import TraceResult
from .sites import DIRECTIONS, Cell, Site, check_cells, check_names
from .task import Scores, Task
from .vision import Vision

UNCORRUPTED: Literal["none"] = "none"
"""In the place of a corruption: all runs start from the clean input."""

QUESTIONS_AT_ONCE = 64
"""That are prepared together; on a GPU the next ones while it works on these."""

ASKED = Wanted(cells=(), direction="denoise", reads="logits", patches=False)
"""Of a question that is only asked."""


@dataclass(frozen=True)
class Mapper:
    """What a tracer makes its maps with; `settings`: what results say of it."""

    vision: Vision
    preparer: Preparer
    measurer: Measurer
    assembler: Assembler
    settings: Mapping[str, Any]

    def maps(
        self, request: Request, asked: Sequence[Asked], corruption: Corruption, progress: Progress | None
    ) -> list[TraceResult]:
        """Maps of all questions, a part after the other: inputs of many would not fit into memory."""
        results: list[TraceResult] = []
        finish: Callable[[], list[TraceResult]] = list
        for first in range(0, len(asked), QUESTIONS_AT_ONCE):
            part = asked[first : first + QUESTIONS_AT_ONCE]
            prepared, check = self._prepared(request, part, [corruption] * len(part))
            begun = self.begin(request, prepared, _share(progress, first, len(part), len(asked)))
            results += finish()
            finish = partial(_checked, check, begun)
        return results + finish()

    def prepare(
        self, request: Request, asked: Sequence[Asked], corruptions: Sequence[Corruption]
    ) -> list[Prepared]:
        """Encode the questions' images and corrupt each in its way. Raises as `Tracer.prepare` does."""
        prepared, check = self._prepared(request, asked, corruptions)
        check()
        return prepared

    def _prepared(
        self, request: Request, asked: Sequence[Asked], corruptions: Sequence[Corruption]
    ) -> tuple[list[Prepared], Check]:
        maps = [request.maps(self.preparer.shapes(own)) for own in asked]
        wanted = [_wanted(request, own) for own in maps]
        tasks, check = self.preparer.tasks(self.vision, asked, corruptions, wanted)
        prepared = [
            Prepared(own, made.grids, task, {"corruption": repr(corruption), "corrupted": note})
            for own, made, corruption, (task, note) in zip(asked, maps, corruptions, tasks, strict=True)
        ]
        return prepared, check

    def unchanged(self, asked: Sequence[Asked]) -> list[Scores]:
        """All that the model says to questions as they are."""
        nothing = [None] * len(asked)
        tasks, check = self.preparer.tasks(self.vision, asked, nothing, [ASKED] * len(asked))
        scores = self.measurer.score([task for task, _ in tasks], None)
        check()
        return scores

    def begin(
        self, request: Request, prepared: Sequence[Prepared], progress: Progress | None
    ) -> Callable[[], list[TraceResult]]:
        """Measure questions that are prepared, packed into common passes, without waiting for a GPU; what is
        returned waits, and has the results."""
        tasks = [own.task for own in prepared]
        waiting = self.measurer.begin(request.method, tasks, request.metrics, progress)
        settings = {**self.settings, **request.settings()}

        def finish() -> list[TraceResult]:
            return [
                self.assembler.trace(own, request, measured, settings)
                for own, measured in zip(prepared, waiting(), strict=True)
            ]

        return finish

    def outline(self, request: Request, asked: Asked, samples: int) -> Task:
        """A task of the same shape as that of a question whose image is corrupted in so many samples."""
        wanted = _wanted(request, request.maps(self.preparer.shapes(asked)))
        return self.preparer.outline(asked, samples, wanted)

    def changed(
        self,
        asked: Asked,
        cells: Sequence[Cell | Site | Iterable[Site]],
        corruption: Corruption | Literal["none"] | None,
        direction: str,
        reads: Reads,
    ) -> Changed:
        """A question with cells that somebody chose. Raises as `Tracer.restore` does."""
        check_names("direction", direction, DIRECTIONS)
        clean = isinstance(corruption, str) and corruption == UNCORRUPTED
        applied = None if clean else check_corruption(corruption)  # type: ignore[arg-type]
        checked = check_cells(cells, self.preparer.shapes(asked))
        distinct = {cell: number for number, cell in enumerate(dict.fromkeys(checked))}
        stacks = {part.stack for cell in distinct for parts in (cell.sites, cell.cuts) for part in parts}
        wanted = Wanted(tuple(distinct), direction, reads, "vision" in stacks)
        ((task, note),), check = self.preparer.tasks(self.vision, [asked], [applied], [wanted])
        check()
        named = UNCORRUPTED if applied is None else repr(applied)
        settings = {**self.settings, "direction": direction, "corruption": named, "corrupted": note}
        return Changed(task, [distinct[cell] for cell in checked], settings)


def _checked(check: Check, begun: Callable[[], list[TraceResult]]) -> list[TraceResult]:
    """What was begun, unless it was begun with numbers that are none."""
    check()
    return begun()


def _wanted(request: Request, maps: Maps) -> Wanted:
    return Wanted(maps.cells, request.direction, request.reads, "vision" in request.stacks)


def _share(progress: Progress | None, first: int, count: int, total: int) -> Progress | None:
    """Progress of `count` questions from number `first` on, as that of all."""
    return None if progress is None else lambda share: progress((first + share * count) / total)
