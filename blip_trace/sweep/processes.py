"""Several processes on one machine; one that dies is replaced and its shard done again."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from ..tracer import Tracer
from .executors import Events
from .pictures import reading
from .shard import Stopped, sentence
from .worker import Job, Worker

POLL_SECONDS = 0.2
"""How often it is looked whether to stop."""
PATIENCE_SECONDS = 5.0
"""How long a process that was told to end may take."""
EARLY_DEATHS = 3
"""So many processes in a row may die before they have loaded the model."""
DEATHS = 20
"""So many may die of one shard; three are enough to find a sample that kills, and give it up."""


@dataclass
class Assignment:
    """A shard on its way. deaths: of processes that did it; seen: what they were computing then; suspects:
    what two of them were computing, and is computed alone from then on; lost: what was computed alone when
    one died, and is given up."""

    number: int
    deaths: int = 0
    seen: set[str] = field(default_factory=set)
    suspects: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)

    def died(self, computing: Sequence[str]) -> None:
        """A process has died; any may, for reasons of its own, so the first time changes nothing."""
        now = set(computing)
        if len(now) == 1:
            self.lost |= now & self.suspects
        self.suspects |= now & self.seen
        self.seen |= now
        self.deaths += 1


@dataclass
class Member:
    """A process, its place among all, what it does, and what it computes right now."""

    process: BaseProcess
    connection: Connection
    place: int
    ready: bool = False
    assignment: Assignment | None = None
    computing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Processes:
    """`workers` processes, each with its own copy of the model and its share of the threads; where the run is
    planned for GPUs they take turns with those that there are."""

    workers: int

    def run(self, job: Job, todo: Sequence[int], events: Events, tracer: Tracer | None) -> None:
        """See `Executor`. Raises ChildProcessError where processes cannot be kept alive."""
        if job.threads is None:
            job = replace(job, threads=max(1, (os.cpu_count() or 1) // self.workers))
        crew = Crew(job, deque(Assignment(number) for number in todo), events)
        try:
            crew.work(min(self.workers, len(todo)))
        finally:
            crew.dismiss()


class Crew:
    """Processes and what is left for them to do."""

    def __init__(self, job: Job, waiting: deque[Assignment], events: Events) -> None:
        self._job = job
        self._waiting = waiting
        self._events = events
        self._members: list[Member] = []
        self._early_deaths = 0

    def work(self, members: int) -> None:
        """Until nothing is left."""
        for place in range(members):
            self._hire(place)
        while self._waiting or any(member.assignment for member in self._members):
            if self._events.stop():
                raise Stopped
            for ready in wait([member.connection for member in self._members], POLL_SECONDS):
                member = next(own for own in self._members if own.connection is ready)
                try:
                    self._hear(member, member.connection.recv())
                except (EOFError, ConnectionError):
                    self._bury(member)

    def dismiss(self) -> None:
        """End all of them; what they have not committed is lost."""
        for member in self._members:
            member.process.terminate()
        for member in self._members:
            member.process.join(PATIENCE_SECONDS)
            member.process.kill()
            member.process.join()
            member.connection.close()

    def _hire(self, place: int) -> None:
        job, gpus = self._job, torch.cuda.device_count()
        if job.device == "cuda" and gpus:
            job = replace(job, device=f"cuda:{place % gpus}")
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(job, theirs), daemon=True)
        process.start()
        theirs.close()
        self._members.append(Member(process, ours, place))

    def _hear(self, member: Member, message: tuple[str, Any]) -> None:
        match message:
            case ("ready", _):
                member.ready = True
                self._early_deaths = 0
                self._give(member)
            case ("computing", (ids, done)):
                member.computing = tuple(ids)
                self._events.computed(done)
            case ("finished", receipt):
                member.assignment = None
                self._early_deaths = 0
                self._events.finished(receipt)
                self._give(member)
            case ("failed", error):
                raise error

    def _give(self, member: Member) -> None:
        if not self._waiting:
            return
        member.assignment = own = self._waiting.popleft()
        try:
            member.connection.send((own.number, own.suspects, own.lost))
        except (BrokenPipeError, ConnectionError):
            self._bury(member)

    def _bury(self, member: Member) -> None:
        """A process has died: another takes its place, and its shard is the next to be done.

        Raises ChildProcessError where that happens again and again.
        """
        self._members.remove(member)
        member.connection.close()
        member.process.join()
        code = member.process.exitcode
        if not member.ready:
            self._early_deaths += 1
            if self._early_deaths >= EARLY_DEATHS:
                raise ChildProcessError(f"processes end before they have loaded the model (exit code {code})")
        own = member.assignment
        if own is not None:
            own.died(member.computing)
            if own.deaths >= DEATHS:
                raise ChildProcessError(
                    f"{DEATHS} processes ended during shard {own.number} (exit code {code})"
                )
            self._waiting.appendleft(own)
            self._events.note(f"a process ended (exit code {code}) during shard {own.number}: done again")
        if self._waiting:
            self._hire(member.place)


def _serve(job: Job, connection: Connection) -> None:
    """What a process does: shards as it is given them, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all: the first process decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def orphaned() -> bool:
        return parent is None or not parent.is_alive()

    def tell(ids: Sequence[str], done: int) -> None:
        connection.send(("computing", (ids, done)))

    try:
        with reading(job.device) as pool:
            worker = Worker(job, pool, tell, orphaned)
            connection.send(("ready", None))
            while True:
                number, alone, lost = connection.recv()
                connection.send(("finished", worker.do(number, alone, lost)))
    except (EOFError, BrokenPipeError, ConnectionError, Stopped):
        return  # nobody listens any more
    except Exception as error:
        connection.send(("failed", _sendable(error)))


def _sendable(error: Exception) -> Exception:
    """An error that can be raised again in another process, with its message alone."""
    for kind in (OSError, ValueError, TypeError):
        if isinstance(error, kind):
            return kind(sentence(error))
    return ChildProcessError(f"a process failed: {sentence(error)}")
