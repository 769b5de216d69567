"""Work on all cores comes back in order."""

from __future__ import annotations

import threading

import pytest

from blip_trace import threads
from blip_trace.sweep.pictures import READERS, reading
from blip_trace.threads import side_by_side


@pytest.fixture
def three_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)


@pytest.mark.usefixtures("three_cores")
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 30])
def test_in_order(count: int) -> None:
    assert side_by_side(lambda n: n * n, range(count)) == [n * n for n in range(count)]


@pytest.mark.usefixtures("three_cores")
def test_all_cores_work_at_once() -> None:
    meeting = threading.Barrier(3)
    assert side_by_side(lambda _: meeting.wait(timeout=20), range(3))  # else it would be broken


@pytest.mark.usefixtures("three_cores")
def test_the_first_that_fails_is_raised() -> None:
    def fail(number: int) -> int:
        if number in (4, 8):
            raise ValueError(f"number {number}")
        return number

    with pytest.raises(ValueError, match="number 4"):
        side_by_side(fail, range(9))


def test_one_is_done_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "ThreadPoolExecutor", None)
    assert side_by_side(str, [5]) == ["5"]


@pytest.mark.parametrize(
    ("device", "cores", "readers"), [("cpu", 16, 1), ("cuda", 16, READERS), ("cuda:1", 2, 2)]
)
def test_threads_that_read_pictures(
    monkeypatch: pytest.MonkeyPatch, device: str, cores: int, readers: int
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    everybody = threading.Barrier(readers)
    with reading(device) as pool:
        met = [pool.submit(everybody.wait, 20) for _ in range(readers)]
        assert sorted(own.result() for own in met) == list(range(readers))
        assert pool._max_workers == readers
