"""Progress of long work: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .sweep.plan import Plan
    from .sweep.receipts import Receipt
    from .sweep.verify import Findings

QUIET_SECONDS = 10.0
"""Between two progress lines where there is no terminal to draw a bar on."""


def duration(seconds: float) -> str:
    """In words, to two digits or so."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


@contextmanager
def showing_share(console: Console) -> Iterator[Callable[[float], None]]:
    """Takes the share of a trace that is done."""
    if not console.is_terminal:
        shown = time.monotonic()

        def tell(share: float) -> None:
            nonlocal shown
            if time.monotonic() - shown >= QUIET_SECONDS:
                shown = time.monotonic()
                console.print(f"tracing: {share:.0%}")

        yield tell
        return
    columns: tuple[Any, ...] = (
        TextColumn("tracing"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("tracing", total=1.0)
        yield lambda share: bar.update(task, completed=share)


class SweepProgress:
    """Shows how a sweep goes: samples done, their rate, the time left, failures. A `driver.Reporter`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("sweeping"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} samples"),
            TextColumn("{task.fields[rate]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("sweeping", total=None, rate="", start=False)
        self._total = self._before = self._computed = self._failed = 0
        self._begun: float | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> SweepProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def rate(self) -> float:
        """Samples a second since the first was begun, which is after models were loaded."""
        return self._computed / (time.monotonic() - self._begun) if self._begun and self._computed else 0.0

    def planned(self, plan: Plan, found: Findings) -> None:
        """See `Reporter`."""
        self._total = plan.samples
        self._before = sum(receipt.samples for receipt in found.done.values())
        left = plan.samples - self._before
        done = f", {self._before:,} done before" if self._before else ""
        if left:
            shards = f"{len(found.open):,} shard{'s' if len(found.open) > 1 else ''}"
            self._console.print(f"run {plan.run_id[:12]}: {left:,} samples to trace in {shards}{done}")
        self._shown = time.monotonic()
        if self._console.is_terminal and left:
            self._bar.start()

    def computed(self, samples: int) -> None:
        """See `Reporter`."""
        if self._begun is None:
            self._begun = time.monotonic()
        self._computed += samples
        done = min(self._before + self._computed, self._total)
        rate = self.rate
        failed = f", {self._failed:,} failed" if self._failed else ""
        text = f"{rate:.1f} a second, {duration((self._total - done) / rate)} left{failed}" if rate else ""
        self._bar.update(self._task, total=self._total, completed=done, rate=text)
        if not self._console.is_terminal and rate and time.monotonic() - self._shown >= QUIET_SECONDS:
            self._shown = time.monotonic()
            self._console.print(f"sweeping: {done:,} of {self._total:,} samples, {text}")

    def finished(self, receipt: Receipt) -> None:
        """See `Reporter`."""
        self._failed += receipt.failed
        for note in receipt.notes:
            self.note(f"shard {receipt.number}: {note}")

    def note(self, text: str) -> None:
        """See `Reporter`."""
        self._console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)
