"""What Ray runs: its driver, a process that hands out shards, and its actors, which do them.

The driver loads neither torch nor a model; what an actor needs is imported when it begins.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .worker import Job, Worker

OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray that is started here: nothing but numbers and receipts go through it."""
END_SECONDS = 5.0
"""So long Ray may take to end in order."""
KNOCK_SECONDS = 10.0
"""So long a cluster may take to answer at all."""
WANTED_SECONDS = 0.2
"""How often an actor looks whether it is still wanted."""

Answer = Mapping[str, Any]
"""What an actor says of a shard: its `receipt` and how many died of it before, why it `failed`, or that it
has `stopped`."""


@dataclass(frozen=True)
class Task:
    """What a driver is to do. job: the fields of a `Job`; desk: the name of the run's; workers: None: as
    many as fit; address: of a cluster, or "local"; gpus: of each worker."""

    job: Mapping[str, Any]
    desk: str
    todo: tuple[int, ...]
    workers: int | None
    address: str
    gpus: float


def drive(task: Task, connection: Connection) -> None:
    """Do shards on Ray; sends each `Answer`, and at the end None or the error, in one sentence."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.setsid()  # Ctrl-C is for the first process; and Ray ends the group of its driver with it
    # Ray writes its own view of what happens, much of it from C++
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # its threads call Ray on after it has been shut down, and would start another one by that
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    ended = threading.Thread(target=_end_with_parent, args=(connection,), daemon=True)
    ended.start()
    said: Exception | None = None
    try:
        _connect(task)
        for batch in _answers(task):
            answer = json.loads(str(batch["answer"][0]))
            connection.send(answer)
            if "receipt" not in answer:
                break
    except (ValueError, ConnectionError) as error:  # said by `_answers` and `_connect`
        said = type(error)(" ".join(str(error).split()))
    except Exception as error:
        said = ChildProcessError(f"Ray has given up: {_first_line(error)}")
    with suppress(ConnectionError):
        connection.send(said)
    ended.join()


def _end_with_parent(connection: Connection) -> None:
    """When the other end is closed: end Ray in order, if that is done in time, and whatever is left of it."""
    with suppress(EOFError, OSError):
        connection.recv()
    end = threading.Thread(target=_disconnect, daemon=True)
    end.start()
    end.join(END_SECONDS)
    os.killpg(0, signal.SIGKILL)


def _disconnect() -> None:
    import ray

    ray.shutdown()


def _connect(task: Task) -> None:
    """Raises ConnectionError where there is no such cluster."""
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    where = f"reached at {task.address}"
    if task.address == "local":
        cpus = (task.workers or 1) * (task.job["threads"] or 1)
        options["num_cpus"] = max(os.cpu_count() or 1, cpus)
        options["include_dashboard"] = False
        options["object_store_memory"] = OBJECT_STORE_BYTES
        if "RAY_AUTH_MODE" not in os.environ:  # a token of its own; Ray would leave one in the home folder
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        where = "started"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        _knock(task.address)
        import ray

        ray.init(task.address, **options)
    except Exception as error:
        token = "AuthToken" in f"{error} {error.__cause__}"  # only the cause says so, in a traceback
        said = (
            "it wants another token than RAY_AUTH_MODE and RAY_AUTH_TOKEN give"
            if token
            else _first_line(error)
        )
        raise ConnectionError(f"Ray cannot be {where}: {said}") from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens, for which Ray itself waits more than ten minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), KNOCK_SECONDS).close()


def _answers(task: Task) -> Any:
    """The shards through Ray Data, a block each, so that each is an answer of its own.

    Raises ValueError where the cluster cannot hold a single worker.
    """
    import ray.data

    cpus = task.job["threads"] or 1
    room, cores = _room(cpus, task.gpus)
    if room == 0:
        gpus = f", GPUs: {task.gpus:g}" if task.gpus else ""
        raise ValueError(f"no machine of the Ray cluster can hold a worker (CPUs: {cpus}{gpus})")
    workers = task.workers or room
    job = {**task.job, "threads": task.job["threads"] or max(1, cores // workers)}
    workers = min(workers, len(task.todo))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = -1  # a shard may take as long as it takes
    hand: Any = Hand  # Ray's types know functions only
    shards = ray.data.from_items([{"shard": own} for own in task.todo], override_num_blocks=len(task.todo))
    done = shards.map(
        hand,
        fn_constructor_args=(job, task.desk, socket.gethostname(), workers),
        # one shard at a time: what waits for an actor would wait for its successor too
        compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1),
        num_cpus=cpus,
        num_gpus=task.gpus or None,
    )
    return done.iter_batches(batch_size=1, prefetch_batches=0, batch_format="numpy")


def _room(cpus: int, gpus: float) -> tuple[int, int]:
    """How many workers the cluster can hold, and how many cores it has."""
    import ray

    room = cores = 0
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if node["Alive"]:
            has = node["Resources"]
            cores += int(has.get("CPU", 0))
            fit = has.get("CPU", 0) // cpus
            room += int(min(fit, has.get("GPU", 0) // gpus) if gpus else fit)
    return room, cores


class Hand:
    """An actor: it loads the model once and then does shard after shard.

    What goes wrong is an answer and not an exception, which Ray would wrap in its own.
    """

    def __init__(self, job: Mapping[str, Any], desk: str, host: str, workers: int) -> None:
        from .desk import Desk
        from .store import open_store
        from .worker import Job

        # The work is done in a thread, so that this one can answer at once when it is not wanted any more.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="shards")
        self._desk = Desk(open_store(job["root"]), desk)
        self._worker = self._thread.submit(self._begin, Job(**job), host, workers)
        self._await(self._worker)

    def __call__(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Do a shard; returns an `Answer`, in JSON."""
        work = self._thread.submit(self._do, int(row["shard"]))
        self._await(work)
        return {"answer": json.dumps(self._answer(work))}

    def _await(self, work: Future[Any]) -> None:
        """Until it is done, or is not wanted any more."""
        done = threading.Event()
        work.add_done_callback(lambda _: done.set())
        while not done.wait(WANTED_SECONDS):
            if not self._desk.open():
                return

    def _answer(self, work: Future[Answer]) -> Answer:
        from .shard import Stopped

        if not work.done():
            return {"stopped": True}
        try:
            return work.result()
        except Stopped:
            return {"stopped": True}
        except Exception as error:
            said = " ".join(str(error).split()) or type(error).__name__
            return {"failed": said, "system": isinstance(error, OSError)}

    def _begin(self, job: Job, host: str, workers: int) -> Worker:
        from .pictures import reading
        from .processes import EARLY_DEATHS
        from .store import open_store
        from .worker import Worker

        here = socket.gethostname()
        if not self._desk.open():
            raise FileNotFoundError(
                f"{here} does not see the run in {open_store(job.root)}: every machine must reach that"
            )
        if self._desk.starting() >= workers + EARLY_DEATHS:
            raise ChildProcessError("processes end before they have loaded the model")
        if here != host:
            check_places(job, here)
        self._reading = reading(job.device)  # as long as this process
        worker = Worker(job, self._reading.__enter__(), self._desk.tell, lambda: not self._desk.open())
        self._desk.started()
        return worker

    def _do(self, number: int) -> Answer:
        from dataclasses import asdict

        worker = self._worker.result()
        own = self._desk.take(number)
        receipt = worker.do(number, own.suspects, own.lost)
        self._desk.leave(number)
        return {"receipt": asdict(receipt), "deaths": own.deaths}


def check_places(job: Job, here: str) -> None:
    """Whether another machine has what the run was planned with, for else each sample of it would fail, or be
    traced with something else. Raises OSError or ValueError where it has not."""
    from pathlib import Path

    from .identity import model_identity
    from .plan import Plan
    from .store import open_store

    if job.images is not None and not os.path.isdir(job.images):
        raise FileNotFoundError(f"{here} has no folder {job.images}: every machine needs the images there")
    if model_identity(Path(job.model)) != Plan.load(open_store(job.root)).identity["model"]:
        raise ValueError(f"the model in {job.model} of {here} is not the one that the run was planned with")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
