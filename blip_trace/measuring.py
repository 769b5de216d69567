"""Runs tasks by the backend and the method that were asked for, and says beforehand how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import engine, hooks
from .attribution import Method, Screen, Screened, estimate, screen
from .devices import fetch
from .graphs import Graphs
from .metrics import Measured, measure_all
from .ops import OpSet
from .program import Program
from .task import Scores, Task

Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

PROBE = (512, 768, 3072)
GPU_PROBE = (16384, 3072, 3072)
PROBED_SECONDS = 0.05
USUAL_SHARE = 0.8
"""Of the rate of large products that a whole pass usually reaches."""


@dataclass(frozen=True)
class Forecast:
    """What a trace will take: cells (runs of all samples), operations of its matrix products where they are
    counted, and about how many seconds on this machine."""

    cells: int
    operations: int | None
    seconds: float


@dataclass(frozen=True)
class Measurer:
    """One model on one backend; ops is None for the hooks, graphs are those of its passes on a GPU."""

    model: Any
    program: Program
    ops: OpSet | None
    memory: int | None
    graphs: Graphs | None

    def score(self, tasks: Sequence[Task], progress: Progress | None) -> list[Scores]:
        """Everything that is read of the tasks' runs."""
        return self._begin(tasks, progress)()

    def _begin(self, tasks: Sequence[Task], progress: Progress | None) -> Callable[[], list[Scores]]:
        if not tasks:
            return list
        report = None if progress is None else lambda done, total: progress(done / total)
        if self.ops is not None:
            return engine.begin(self.program, self.ops, tasks, self.memory, report, self.graphs)
        done = hooks.score(self.model, tasks, report)
        return lambda: done

    def exactly(
        self, tasks: Sequence[Task], metrics: Sequence[str], progress: Progress | None = None
    ) -> list[tuple[Tensor, dict[str, Measured]]]:
        """The answer of each task, and its metrics with every cell done."""
        return _measured(self.score(tasks, progress), metrics)

    def begin(
        self, method: Method | None, tasks: Sequence[Task], metrics: Sequence[str], progress: Progress | None
    ) -> Callable[[], list[Screened]]:
        """The same by any method, None: exactly; what is returned waits for a GPU that works on it."""
        if method is None:
            waiting = self._begin(tasks, progress)
            marks = [_marks(task, exact=True) for task in tasks]
            return lambda: [
                Screened(*own, exact) for own, exact in zip(_measured(waiting(), metrics), marks, strict=True)
            ]
        found = self._estimated(method, tasks, metrics, progress)
        return lambda: found

    def _estimated(
        self, method: Method, tasks: Sequence[Task], metrics: Sequence[str], progress: Progress | None
    ) -> list[Screened]:
        found = []
        for number, task in enumerate(tasks):

            def tell(share: float, number: int = number) -> None:
                if progress is not None:
                    progress((number + share) / len(tasks))

            def exactly(part: Task, tell: Progress = tell) -> tuple[Tensor, dict[str, Measured]]:
                return self.exactly([part], metrics, tell)[0]

            if isinstance(method, Screen):
                found.append(screen(self.model, task, metrics, method, exactly))
            else:
                guessed = estimate(self.model, task, metrics, method.steps, tell)
                found.append(Screened(*guessed, _marks(task, exact=False)))
        return found

    def forecast(self, tasks: Sequence[Task]) -> Forecast:
        """What doing all cells exactly will take; measures the machine for a moment."""
        cells = sum(task.samples * len(task.cells) for task in tasks)
        operations = self.operations(tasks)
        if self.ops is None or operations is None:
            return Forecast(cells, None, self._seconds_of_hooks(tasks))
        return Forecast(cells, operations, operations / (USUAL_SHARE * self._rate(self.ops)))

    def operations(self, tasks: Sequence[Task]) -> int | None:
        """Operations of their matrix products, done exactly; None by hooks, where they are not counted."""
        return None if self.ops is None else engine.count_operations(self.program, tasks, self.memory)

    def _seconds_of_hooks(self, tasks: Sequence[Task]) -> float:
        seconds = 0.0
        for task in tasks:
            begin = time.perf_counter()
            with torch.inference_mode():
                hooks.run(self.model, task).cpu()
            seconds += (time.perf_counter() - begin) * (2 + len(task.cells))
        return seconds

    def _rate(self, ops: OpSet) -> float:
        """Operations a second in a product of the size that passes are made of."""
        device = self.program.device
        rows, depth, columns = GPU_PROBE if device.type == "cuda" else PROBE
        like = self.program.head.decoder.weight
        x, weight = like.new_empty(rows, depth).normal_(), like.new_empty(columns, depth).normal_()
        fetch(ops.linear(x, weight, None)[0])()
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < PROBED_SECONDS:
            fetch(ops.linear(x, weight, None)[0])()
            done += 2 * rows * depth * columns
        return done / (time.perf_counter() - begin)


def _measured(scores: Sequence[Scores], metrics: Sequence[str]) -> list[tuple[Tensor, dict[str, Measured]]]:
    return [(own.answer_ids, measure_all(metrics, own.clean, own.corrupted, own.patched)) for own in scores]


def _marks(task: Task, *, exact: bool) -> Tensor:
    return torch.full((len(task.cells),), exact)
