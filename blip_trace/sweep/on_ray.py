"""The shards of a run on a Ray cluster, through Ray Data.

Ray hands out the numbers of shards and gets back receipts; everything else is where the run is: object
storage, or a folder that every machine of the cluster has under the same path (a shared disk). Model and
images must be under the same path on every machine too, and the same blip-trace installed. Each actor commits
its shard itself, with the same bytes whoever does it, so that Ray may lose actors, do a shard twice or end
altogether, and what is there is still right.

While Ray works, the folder has a `Desk`, by which actors know what others before them died of, and whether
they are still wanted. Ray's driver is a process of its own: Ray takes signals, the process group and the
output of a process as its own, and nothing but the end of its driver ends its work at once.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from ..tracer import Tracer
from .desk import Desk
from .executors import Events
from .processes import POLL_SECONDS
from .ray_driver import END_SECONDS as DRIVER_END_SECONDS
from .ray_driver import Task, drive
from .receipts import Receipt
from .shard import Stopped
from .store import open_store
from .worker import Job

if importlib.util.find_spec("ray") is None:
    raise ImportError("the ray executor needs Ray: pip install 'blip-trace[ray]'")

IDLE_SECONDS = 120.0
"""If no actor has begun after so long, the cluster is probably busy, and that is said."""
END_SECONDS = 2 * DRIVER_END_SECONDS
"""So long it is waited for the driver, which ends itself in half of that."""


@dataclass(frozen=True)
class OnRay:
    """`workers` actors, as many as fit unless given, each with its own copy of the model and `gpus` GPUs.

    address: of a cluster; unless given, that of RAY_ADDRESS, or else a Ray is started on this machine and
    ended after the run. A cluster that wants a token takes that of RAY_AUTH_TOKEN.
    """

    workers: int | None = None
    address: str | None = None
    gpus: float = 0

    def run(self, job: Job, todo: Sequence[int], events: Events, tracer: Tracer | None) -> None:
        """See `Executor`. Raises ValueError where the cluster cannot hold a worker, ConnectionError where
        there is none, and ChildProcessError where Ray gives up or actors cannot load the model."""
        if not todo:
            return
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        with Desk.set_up(open_store(job.root)) as desk:
            task = Task(asdict(job), desk.name, tuple(todo), self.workers, address, self.gpus)
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=drive, args=(task, theirs), daemon=True, name="ray driver")
            process.start()
            theirs.close()
            try:
                _listen(ours, desk, events)
            finally:
                desk.close()  # from here on no actor begins another batch or commits
                ours.close()  # by which the driver knows
                process.join(END_SECONDS)
                process.kill()
                process.join()


def _listen(driver: Connection, desk: Desk, events: Events) -> None:
    """Until the last shard is committed."""
    told, begun = False, time.monotonic()
    while True:
        if events.stop():
            raise Stopped
        if not driver.poll(POLL_SECONDS):
            if not told and time.monotonic() - begun > IDLE_SECONDS:
                told = True
                if desk.untouched():
                    events.note("no worker has started yet: the Ray cluster may be busy")
            continue
        try:
            answer = driver.recv()
        except (EOFError, ConnectionError):
            raise ChildProcessError("the process that drives Ray has ended") from None
        match answer:
            case None:
                return
            case Exception():
                raise answer
            case {"receipt": given, "deaths": deaths}:
                receipt = Receipt(**given)
                if deaths:
                    events.note(f"processes ended during shard {receipt.number} ({deaths}): done again")
                events.computed(receipt.samples)
                events.finished(receipt)
            case {"failed": said, "system": system}:
                raise (OSError if system else ChildProcessError)(said)
            case _:
                raise ChildProcessError("somebody else has taken over this run")
