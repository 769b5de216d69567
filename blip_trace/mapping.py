"""From checked questions to results: prepared, measured, put together; on a GPU each while it works on those
before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .assemble import Assembler
from .corruption import Corruption, check_corruption
from .measuring import Measurer, Progress
from .metrics import Reads
from .prepare import Asked, Changed, Prepared, Preparer, Vision, Wanted
from .request import Grids, Request
from .result import TraceResult
from .sites import DIRECTIONS, Cell, Site, check_cells, check_names
from .task import Task

UNCORRUPTED: Literal["none"] = "none"
"""In the place of a corruption: all runs start from the clean input."""

QUESTIONS_AT_ONCE = 64
"""That are prepared together; on a GPU the next ones while it works on these."""


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
            prepared = self.prepare(request, part, [corruption] * len(part))
            begun = self.begin(request, prepared, _share(progress, first, len(part), len(asked)))
            results += finish()
            finish = begun
        return results + finish()

    def prepare(
        self, request: Request, asked: Sequence[Asked], corruptions: Sequence[Corruption]
    ) -> list[Prepared]:
        """Encode the questions' images and corrupt each in its way."""
        images = (
            [None] * len(asked) if "vision" in request.stacks else self.preparer.encode(self.vision, asked)
        )
        prepared = []
        for own, corruption, image in zip(asked, corruptions, images, strict=True):
            grids = request.grids(self.preparer.shapes(own))
            wanted = self._wanted(request, grids)
            task, note = self.preparer.task(self.vision, own, corruption, wanted, image)
            settings = {"corruption": repr(corruption), "corrupted": note}
            prepared.append(Prepared(own, grids, task, settings))
        return prepared

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
        wanted = self._wanted(request, request.grids(self.preparer.shapes(asked)))
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
        task, note = self.preparer.task(self.vision, asked, applied, wanted)
        named = UNCORRUPTED if applied is None else repr(applied)
        settings = {**self.settings, "direction": direction, "corruption": named, "corrupted": note}
        return Changed(task, [distinct[cell] for cell in checked], settings)

    def _wanted(self, request: Request, grids: Grids) -> Wanted:
        cells = tuple(cell for grid in grids.values() for cell in grid.cells)
        return Wanted(cells, request.direction, request.reads, "vision" in request.stacks)


def _share(progress: Progress | None, first: int, count: int, total: int) -> Progress | None:
    """Progress of `count` questions from number `first` on, as that of all."""
    return None if progress is None else lambda share: progress((first + share * count) / total)
