"""Who does the shards: this process, several processes on this machine, or those of a Ray cluster."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..sites import check_count, check_names
from ..tracer import Tracer
from .pictures import reading
from .receipts import Receipt
from .shard import Stopped
from .worker import Job, Worker

EXECUTORS = ("local", "processes", "ray")


@dataclass(frozen=True)
class Events:
    """What an executor is told and tells: `computed` samples (of shards that may not be committed yet),
    `finished` shards, notes worth reading, and whether to `stop`."""

    computed: Callable[[int], None]
    finished: Callable[[Receipt], None]
    note: Callable[[str], None]
    stop: Callable[[], bool]


class Executor(Protocol):
    """Does shards, each until it is committed."""

    def run(self, job: Job, todo: Sequence[int], events: Events, tracer: Tracer | None) -> None:
        """Do the shards of these numbers. tracer: the run's, if it is loaded in this process already.

        Raises Stopped where it was to stop, OSError where shards cannot be written.
        """
        ...


@dataclass(frozen=True)
class Local:
    """In this process."""

    def run(self, job: Job, todo: Sequence[int], events: Events, tracer: Tracer | None) -> None:
        """See `Executor`."""
        with reading(job.device) as pool:
            worker = Worker(job, pool, lambda _, done: events.computed(done), events.stop, tracer)
            for number in todo:
                if events.stop():
                    raise Stopped
                events.finished(worker.do(number))


def make_executor(name: str, workers: int | None, address: str | None = None, gpus: float = 0) -> Executor:
    """An executor by its name.

    workers: how many processes: of "processes" one a core unless given, of "ray" as many as fit. address: a
    Ray cluster's; gpus: how many of them each of its workers takes.
    Raises ValueError for an unknown name and for what an executor has not, and ImportError where "ray" is
    asked for but not installed.
    """
    check_names("executor", [name], EXECUTORS)
    if workers is not None:
        check_count("workers", workers, "processes")
    if name == "ray":
        if not 0 <= gpus < math.inf or (gpus > 1 and gpus % 1):
            raise ValueError(f"gpus must be a whole number or a share of one GPU, not {gpus!r}")
        from .on_ray import OnRay

        return OnRay(workers, address, gpus)
    if address is not None or gpus:
        raise ValueError(f"an address and GPUs belong to ray, not to the {name} executor")
    if name == "processes":
        from .processes import Processes

        return Processes(workers or os.cpu_count() or 1)
    if workers not in (None, 1):
        raise ValueError("the local executor is this process alone: workers belong to processes and ray")
    return Local()
