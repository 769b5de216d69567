"""Fixtures of the tests of sweeps: a guard against tests that hang, and a shard function without cost."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator

import pytest
from sweep_helpers import cheap_rows

from blip_trace import Tracer
from blip_trace.sweep.shard import ShardTracer

HANGS_AFTER = 60


@pytest.fixture
def hang_guard() -> Iterator[None]:
    """Ends a test that takes too long, and, where even that does not help, all of them with a traceback."""

    def late(*_: object) -> None:
        raise TimeoutError(f"the test has taken {HANGS_AFTER} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(HANGS_AFTER)
    faulthandler.dump_traceback_later(HANGS_AFTER + 30, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tiny_tracer: Tracer) -> Tracer:
    """Rows come from the samples' ids alone, and no model is loaded."""
    monkeypatch.setattr(ShardTracer, "rows", cheap_rows)
    monkeypatch.setattr(Tracer, "from_pretrained", lambda *_, **__: tiny_tracer)
    return tiny_tracer
