"""Fixtures of the tests of sweeps: guards against tests that hang, and runs that cost nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sweep_helpers import cheap_rows, order, rows_of
from sweep_watch import ends_within

from blip_trace import Tracer
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Order
from blip_trace.sweep.shard import ShardTracer
from blip_trace.sweep.sources import open_data


@pytest.fixture
def hang_guard() -> Iterator[None]:
    """For tests that take a few seconds."""
    with ends_within(60):
        yield


@pytest.fixture
def long_hang_guard() -> Iterator[None]:
    """For tests that wait for Ray."""
    with ends_within(150):
        yield


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch, tiny_tracer: Tracer) -> Tracer:
    """Rows come from the samples' ids alone, and no model is loaded."""
    monkeypatch.setattr(ShardTracer, "rows", cheap_rows)
    monkeypatch.setattr(Tracer, "from_pretrained", lambda *_, **__: tiny_tracer)
    return tiny_tracer


@pytest.fixture
def given(cheap: Tracer, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Order:
    """15 samples in 3 shards. What a process has written outlives it, so that no test waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    return order(tiny_folder, "scenes:3")


@pytest.fixture
def oracle(given: Order, tmp_path: Path) -> Path:
    """The run that nothing happened to."""
    sweep(given, tmp_path / "oracle")
    assert sorted(rows_of(tmp_path / "oracle")) == sorted(sample.id for sample in given.data.samples())
    return tmp_path / "oracle"


@pytest.fixture
def few(given: Order) -> Order:
    """10 samples in 2 shards, for what is done many times."""
    return replace(given, data=open_data("scenes:2"))


@pytest.fixture
def few_oracle(few: Order, tmp_path: Path) -> Path:
    """The run of few samples that nothing happened to."""
    sweep(few, tmp_path / "few oracle")
    return tmp_path / "few oracle"
