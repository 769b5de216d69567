"""Fixtures of the tests whose workers are other processes: a Ray cluster of our own, and trouble."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from sweep_trouble import Trouble, troubled
from sweep_watch import of_session

from blip_trace import Tracer

CLUSTER = """
import logging, sys, ray
quiet = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
ray.init("local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
ray.shutdown()
"""


@dataclass(frozen=True)
class Ray:
    """A cluster: where it is, what lets its drivers in, and the session of its processes."""

    address: str
    environment: dict[str, str]
    session: int


@pytest.fixture(scope="session")
def workers_trouble(tmp_path_factory: pytest.TempPathFactory) -> Trouble:
    """None, as long as a test makes none."""
    return Trouble(tmp_path_factory.mktemp("trouble"))


@pytest.fixture
def trouble(workers_trouble: Trouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trouble]:
    """What a test lets go wrong in this process, in those that it starts, and in all of the cluster."""
    monkeypatch.setattr(Tracer, "measure", troubled(Tracer.measure, workers_trouble.folder))
    for name, value in workers_trouble.environment.items():
        monkeypatch.setenv(name, value)
    yield workers_trouble
    workers_trouble.end()


@pytest.fixture(scope="session")
def ray_of_two(workers_trouble: Trouble) -> Iterator[Ray]:
    """A Ray of our own with two processors, which is gone afterwards."""
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",  # others on this machine must not join, our drivers must
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
    }
    others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**others, **workers_trouble.environment, **environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Ray(process.stdout.readline().strip(), environment, process.pid)
    finally:
        process.stdin.close()
        try:
            process.wait(20)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
    assert not of_session(process.pid)


@pytest.fixture(scope="module")
def cluster(ray_of_two: Ray) -> Iterator[str]:
    """The address of that Ray, which the tests of this module may join."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in ray_of_two.environment.items():
            patch.setenv(name, value)
        yield ray_of_two.address
