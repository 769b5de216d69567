"""One command's way through a run: plan it or go on with it, do what is left, check all of it."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from ..tracer import Tracer
from .desk import Desk
from .executors import Events, Executor, Local
from .identity import model_folder, model_identity
from .plan import Plan
from .planning import Order, begin, check_same
from .receipts import Receipt
from .shard import Stopped
from .store import PLAN, SUCCESS, Store, open_store
from .verify import Findings, examine, finish
from .worker import Job

REPAIRS = 2
"""How often what the final check finds broken is done again."""


class Reporter(Protocol):
    """Is told how a run goes."""

    def planned(self, plan: Plan, found: Findings) -> None:
        """Before the first shard: what is to be done and what is done already."""
        ...

    def computed(self, samples: int) -> None:
        """So many samples more were computed."""
        ...

    def finished(self, receipt: Receipt) -> None:
        """A shard was committed."""
        ...

    def note(self, text: str) -> None:
        """Something went other than planned, and the run goes on."""
        ...


class Silent:
    """Tells nobody."""

    def planned(self, plan: Plan, found: Findings) -> None:
        """See `Reporter`."""

    def computed(self, samples: int) -> None:
        """See `Reporter`."""

    def finished(self, receipt: Receipt) -> None:
        """See `Reporter`."""

    def note(self, text: str) -> None:
        """See `Reporter`."""


@dataclass(frozen=True)
class Outcome:
    """How a run stands: rows by status, whether all are there and checked, and whether it was stopped."""

    plan: Plan
    statuses: Counter[str]
    complete: bool
    stopped: bool

    @property
    def failed(self) -> int:
        """Samples without a usable map, those that were to be left out not counted."""
        return self.statuses["error"] + self.statuses["not_finite"]


def sweep(
    order: Order | None,
    out: str | Path,
    executor: Executor | None = None,
    *,
    extend: bool = False,
    retry: bool = False,
    memory: int | None = None,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Outcome:
    """Trace a data set into `out`, a folder or an address like s3://bucket/folder, or go on with the run that
    is there.

    order: what is to be swept; None: what was planned in that folder. executor: who does it, this process
    unless given. extend: samples that the data set has got since it was planned are added. retry: shards with
    failed samples are done again. memory, threads: what each process may use, see `Job`.

    Every shard is committed as a whole, so that the same call goes on wherever the last one ended; on SIGINT
    or SIGTERM it returns with `stopped`. One bad sample is a row with a reason, never the end of the run.

    Raises Busy where somebody else writes into the folder, Changed (a ValueError), naming what differs, where
    it holds another run, and OSError, ValueError or TypeError, in one sentence, for what cannot be read,
    written or done at all.
    """
    store = open_store(out)
    executor = executor or Local()
    reporter = reporter or Silent()
    if order is None:
        Plan.load(store)  # a folder without a run stays as it is
    store.make()
    with store.lock(), _stopping(reporter) as stop:
        for name in store.leftovers():
            store.remove(name)
        Desk.clear(store)
        tracer: Tracer | None = None
        if order is None:
            plan = Plan.load(store)
            identity = {**plan.identity, "model": model_identity(model_folder(plan.places["model"]))}
            check_same(store, plan, identity)
        else:
            try:
                tracer = order.tracer(memory, threads)
                plan = begin(store, order, tracer, extend)
            except BaseException:
                if not store.has(PLAN):
                    store.unmake()
                raise
        if not isinstance(executor, Local):
            tracer = None  # other processes load their own, and this one need not hold it too
        found = examine(store, plan)
        _refuse_broken(found)
        for number, reason in found.open.items():
            if store.has(SUCCESS) or reason != "not done yet":
                reporter.note(f"shard {number} is done again: {reason}")
        if retry:
            for number in [n for n, receipt in found.done.items() if receipt.failed]:
                found.open[number] = "samples failed"
                del found.done[number]
        if found.open:
            store.remove(SUCCESS)
        reporter.planned(plan, found)
        job = _job(store, plan, order, memory, threads)
        try:
            for _ in range(REPAIRS):
                if not found.open:
                    break
                events = Events(reporter.computed, reporter.finished, reporter.note, stop.is_set)
                executor.run(job, sorted(found.open), events, tracer)
                found = examine(store, plan)
        except Stopped:
            return Outcome(plan, examine(store, plan).statuses, complete=False, stopped=True)
        _refuse_broken(found)
        if found.open:
            number, reason = next(iter(found.open.items()))
            raise OSError(f"shard {number} was written and is not there as it was written: {reason}")
        finish(store, plan, found)
        return Outcome(plan, found.statuses, complete=True, stopped=False)


def _refuse_broken(found: Findings) -> None:
    if found.wrong:
        raise ValueError(found.wrong[0])


def _job(store: Store, plan: Plan, order: Order | None, memory: int | None, threads: int | None) -> Job:
    places = plan.places if order is None else order.places()
    return Job(
        root=store.address,
        model=str(model_folder(places["model"]).absolute()),
        images=places["images"],
        absolute=places["absolute"],
        memory=memory,
        threads=threads,
        device=plan.identity["device"],
    )


@contextmanager
def _stopping(reporter: Reporter) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second SIGINT ends everything at once."""
    stop = threading.Event()

    def handle(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        reporter.note("stopping; the same command will go on from here")

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread gets signals
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
