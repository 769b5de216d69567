"""Stops, crashes, damage and loss in any order: the run that goes on is that of the oracle."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as checked
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sweep_disk import Crash, Disk
from sweep_helpers import (
    Doing,
    assert_whole,
    committed,
    damaged,
    files_of,
    receipt_file,
    shard_file,
)
from sweep_watch import kept

from blip_trace.sweep.driver import sweep
from blip_trace.sweep.executors import Local
from blip_trace.sweep.plan import Plan
from blip_trace.sweep.planning import Order
from blip_trace.sweep.store import SUCCESS, open_store
from blip_trace.sweep.verify import examine

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")

SHARDS = 3


class AnyOrder(RuleBasedStateMachine):
    """Runs, stops, crashes, damage and loss in any order; the run that goes on is that of the oracle."""

    given: Order
    oracle: Path
    place: Path
    runs = 0

    @initialize()
    def begin(self) -> None:
        type(self).runs += 1
        self.folder = self.place / f"run-{self.runs}"
        self.hurt: set[int] = set()
        self.planned = False

    def _sound(self) -> dict[str, tuple[int, str]]:
        files = committed(self.folder)
        return {name: file for name, file in files.items() if int(Path(name).stem) not in self.hurt}

    def _check(self, before: dict[str, tuple[int, str]], done: list[int]) -> None:
        assert kept(before, self.folder)
        assert not {f"{number:06d}.parquet" for number in done} & before.keys()
        self.hurt -= set(done)
        for path in sorted((self.oracle / "shards").iterdir()):
            number, own = int(path.stem), self.folder / "shards" / path.name
            if own.exists() and own.read_bytes() == path.read_bytes():
                self.hurt.discard(number)  # a run that crashed had come so far
            else:
                assert number in self.hurt or not own.exists()

    @rule(shards=st.integers(1, SHARDS), named=st.booleans())
    def some(self, shards: int, named: bool) -> None:
        """Some shards, then a stop."""
        before, doing = self._sound(), Doing(Local(), stop_after=shards)
        sweep(None if self.planned and not named else self.given, self.folder, doing)
        self.planned = True
        self._check(before, doing.done)

    @rule(at=st.integers(0, 120))
    def crash(self, at: int) -> None:
        """The process ends at some step."""

        def end() -> None:
            raise Crash

        before, doing = self._sound(), Doing(Local())
        with pytest.MonkeyPatch.context() as patch:
            Disk(at, end).install(patch)
            with suppress(Crash):
                sweep(self.given, self.folder, doing)
        self.planned = (self.folder / "plan.json").exists()
        self._check(before, doing.done)

    @precondition(lambda self: committed(self.folder))
    @rule(seed=st.integers(0, 2**32))
    def damage(self, seed: int) -> None:
        """One bit of one shard."""
        rng = Random(seed)
        name = rng.choice(sorted(committed(self.folder)))
        damaged(self.folder / "shards" / name, rng)
        self.hurt.add(int(Path(name).stem))

    @precondition(lambda self: committed(self.folder))
    @rule(seed=st.integers(0, 2**32), what=st.sampled_from(["shard", "receipt", "torn receipt", "end"]))
    def lose(self, seed: int, what: str) -> None:
        """A file is gone, or half of it."""
        number = int(Path(Random(seed).choice(sorted(committed(self.folder)))).stem)
        if what == "shard":
            shard_file(self.folder, number).unlink()
            self.hurt.add(number)
        elif what == "end":
            (self.folder / SUCCESS).unlink(missing_ok=True)
        elif what == "receipt":
            receipt_file(self.folder, number).unlink()
        else:
            os.truncate(receipt_file(self.folder, number), 99)

    @precondition(lambda self: self.planned)
    @rule()
    def verify(self) -> None:
        """It finds all that is damaged, and changes nothing."""
        store, before = open_store(self.folder), files_of(self.folder)
        found = examine(store, Plan.load(store), deep=True, repair=False)
        assert self.hurt <= found.open.keys()
        assert not found.wrong
        assert files_of(self.folder) == before

    @rule()
    def finish(self) -> None:
        """All of it."""
        before, doing = self._sound(), Doing(Local())
        assert sweep(self.given, self.folder, doing).complete
        self.planned = True
        self._check(before, doing.done)
        assert_whole(self.folder, self.oracle)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.finish()
            shutil.rmtree(self.folder)


def test_any_order(given: Order, oracle: Path, tmp_path: Path) -> None:
    """Fault 19: the promises of 1 to 6 hold for any sequence of these."""

    class Machine(AnyOrder):
        place = tmp_path

    Machine.given, Machine.oracle = given, oracle
    run_state_machine_as_test(
        Machine,
        settings=checked(
            max_examples=40,
            stateful_step_count=8,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
