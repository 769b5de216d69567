"""One process's share of a run: it loads the model once and then does shard after shard."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from ..tracer import Tracer
from .media import Media
from .plan import Plan, samples_of
from .receipts import Receipt, commit
from .shard import ShardTracer
from .store import open_store

Told = Callable[[Sequence[str], int], None]
"""Called with the ids of samples before they are computed, and with how many are done after them."""


@dataclass(frozen=True)
class Job:
    """Where a run is (see `open_store`), its model, its images (see `Media`), and what it may use. memory:
    bytes of activations in one pass; threads of each process; None: as torch and the tracer choose. device:
    where the model goes."""

    root: str
    model: str
    images: str | None
    absolute: bool = False
    memory: int | None = None
    threads: int | None = None
    device: str = "cpu"


class Worker:
    """Does shards of one run. Loading the model raises as `Tracer.from_pretrained` does."""

    def __init__(
        self,
        job: Job,
        pool: ThreadPoolExecutor,
        told: Told,
        stop: Callable[[], bool],
        tracer: Tracer | None = None,
    ) -> None:
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self._store = open_store(job.root)
        self._plan = Plan.load(self._store)
        identity = self._plan.identity
        if tracer is None:
            tracer = Tracer.from_pretrained(
                job.model, job.device, identity["dtype"], identity["backend"], job.memory
            )
        media = Media(None if job.images is None else Path(job.images), job.absolute)
        self._tracing = ShardTracer(tracer, self._plan.settings, self._plan.layout, media, pool, told, stop)

    def do(self, number: int, alone: Collection[str] = (), lost: Collection[str] = ()) -> Receipt:
        """Trace a shard and commit it. alone, lost: see `ShardTracer.rows`.

        Raises Stopped where the run is to end, OSError where the shard cannot be written.
        """
        begin = time.monotonic()
        shard = self._plan.shards[number]
        self._tracing.notes.clear()
        rows = self._tracing.rows(samples_of(self._store, shard), alone, lost)
        made = {"host": socket.gethostname(), "process": os.getpid(), "threads": torch.get_num_threads()}
        seconds = time.monotonic() - begin
        return commit(self._store, shard, self._plan.layout, rows, seconds, made, self._tracing.notes)
