"""How questions share passes, what happens where memory runs out, and that graphs are replayed as they should
be."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import pytest
import torch
from pretended_gpu import RecordedGraphs
from test_parity import IMAGE, TOLERANCE, ask, largest_difference, tracer
from torch import Tensor

from blip_trace import GaussianNoise, Tracer, engine, mapping, passes, reference, shipped_model
from blip_trace.graphs import KEPT
from blip_trace.ops import get_ops
from blip_trace.passes import Part, pack
from blip_trace.task import Task
from blip_trace.vision import EngineVision

QUESTIONS = [ask(kind).text for kind in ("color", "count", "color", "shape", "color", "color", "count")]
NOISE = GaussianNoise(samples=2)


def tasks(questions: Sequence[str] = QUESTIONS, samples: int = 2) -> list[Task]:
    ours = tracer("native")
    request = ours.request()
    noise = GaussianNoise(samples=samples)
    return [ours.prepare(request, ours.ask(IMAGE, question), noise).task for question in questions]


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are packed as for a GPU, which has memory for eight questions."""
    monkeypatch.setattr(passes, "_in_order", passes._alike)


def packed(given: Sequence[Task], memory: int | None = None) -> list[list[int]]:
    parts = [Part(number, task) for number, task in enumerate(given)]
    return [[part.number for part in own] for own in pack(tracer("native").program, parts, memory)]


def test_on_the_cpu_questions_go_in_order_as_many_as_have_room() -> None:
    given = tasks()
    assert packed(given) == [list(range(7))]
    some = packed(given, memory=2**24)
    assert list(chain(*some)) == list(range(7))
    assert 1 < len(some) < 7


@pytest.mark.usefixtures("on_a_gpu")
def test_on_a_gpu_equal_shapes_go_together_in_powers_of_two() -> None:
    given = tasks([*QUESTIONS, ask("color").text])
    lengths = [len(task.text_ids) for task in given]
    own = packed(given)
    assert sorted(chain(*own)) == list(range(8))
    for numbers in own:
        assert len({lengths[number] for number in numbers}) == 1
        assert len(numbers).bit_count() == 1
    assert [0, 2, 4, 5] in own  # of five alike, four and one
    assert [7] in own


@pytest.mark.usefixtures("on_a_gpu")
def test_a_batch_gives_the_numbers_of_one_at_a_time() -> None:
    ours = tracer("native")
    together = ours.trace_batch([(IMAGE, question) for question in QUESTIONS], corruption=NOISE)
    for question, own in zip(QUESTIONS, together, strict=True):
        alone = ours.trace(IMAGE, question, corruption=NOISE)
        assert largest_difference(own, alone) <= TOLERANCE
    assert len({own.high_score for own in together}) > 2  # each is its own question's


class Full:
    """The reference ops on a device that holds no batch of more rows than this."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.largest = 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(reference, name)

        def limited(x: Tensor, *rest: Any) -> Any:
            if len(x) > self.rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            self.largest = max(self.largest, len(x))
            return real(x, *rest)

        return limited


def scored(ops: Any, given: Sequence[Task], **options: Any) -> list[Tensor]:
    found = engine.score(tracer("native").program, ops, given, None, **options)
    return [own.patched["log_probability"].exp() for own in found]


@pytest.mark.parametrize("rows", [1500, 600, 150])
def test_where_memory_runs_out_passes_are_halved_until_they_fit(rows: int) -> None:
    """At first by questions, then by samples, then by cells."""
    given = tasks()
    full = Full(rows)
    shares: list[float] = []
    with pytest.warns(UserWarning, match=r"out of memory: going on with passes 1/\d+ as large"):
        found = scored(full, given, progress=lambda done, total: shares.append(done / total))
    for one, two in zip(found, scored(reference, given), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)
    assert rows / 4 < full.largest <= rows  # no smaller than need be
    assert shares[-1] >= 1


def test_where_memory_runs_out_fewer_images_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Tracer.from_pretrained(shipped_model(), backend="native")
    sizes: list[int] = []
    encode = engine.encode_image

    def limited(program: Any, ops: Any, embedded: Tensor, graphs: Any) -> Tensor:
        if len(embedded) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        sizes.append(len(embedded))
        return encode(program, ops, embedded, graphs)

    monkeypatch.setattr(engine, "encode_image", limited)
    monkeypatch.setattr(EngineVision, "together", 8)
    pairs = [(torch.rand(3, 64, 64), QUESTIONS[0]) for _ in range(7)]
    with pytest.warns(UserWarning, match="out of memory: going on with 2 images at a time"):
        found = ours.trace_batch(pairs, corruption=NOISE)
    assert sizes == [2, 2, 2, 1]
    for (picture, question), own in zip(pairs, found, strict=True):
        alone = tracer("native").trace(picture, question, corruption=NOISE)
        assert largest_difference(own, alone) <= TOLERANCE


def test_what_does_not_fit_by_itself_is_an_error() -> None:
    given = tasks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(torch.OutOfMemoryError):
            scored(Full(8), given)


def test_what_comes_again_is_recorded_and_then_replayed() -> None:
    graphs = RecordedGraphs()
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x)
        return 2 * x

    found = [float(graphs.run("a", double, torch.tensor([float(n)]))) for n in range(4)]
    assert found == [0, 2, 4, 6]
    assert [own.calls for own in graphs.made] == [3]  # once by itself, then by the graph
    assert float(graphs.run("b", double, torch.tensor([1.0]))) == 2
    assert len(graphs.made) == 1
    graphs.clear()
    graphs.run("a", double, torch.tensor([1.0]))
    assert len(graphs.made) == 1


def test_only_so_many_graphs_are_kept() -> None:
    graphs = RecordedGraphs()
    for _ in range(2):
        for key in range(KEPT + 5):
            for _ in range(2):
                graphs.run(key, torch.neg, torch.zeros(1))
    assert len(graphs._recorded) == KEPT


@pytest.mark.usefixtures("on_a_gpu")
def test_traces_by_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of a shape that was seen is a replay with other inputs; nothing of the last one stays."""
    ours, graphs = tracer("native"), RecordedGraphs()
    given = [tasks(), tasks(QUESTIONS[::-1])]
    given[1] = [replace(task, corrupted=task.clean.expand(2, -1, -1) * 0.5) for task in given[1]]
    plain = [scored(get_ops("native"), own) for own in given]
    for turn in range(3):
        for own, expected in zip(given, plain, strict=True):
            for one, two in zip(scored(get_ops("native"), own, graphs=graphs), expected, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)
        assert bool(graphs.made) == (turn > 0 or len(given) > 1)
    assert sum(own.calls for own in graphs.made) >= 2 * len(graphs.made)
    assert ours.program.device.type == "cpu"


def test_many_questions_go_in_parts_and_the_next_is_prepared_while_one_is_worked_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = tracer("native")
    pairs = [(IMAGE, question) for question in QUESTIONS]
    plain = ours.trace_batch(pairs, corruption=NOISE)
    log: list[str] = []
    begin = engine.begin

    def logged(*args: Any) -> Any:
        number = sum(entry.startswith("begun") for entry in log)
        log.append(f"begun {number}")
        finish = begin(*args)

        def finished() -> Any:
            log.append(f"asked for {number}")
            return finish()

        return finished

    monkeypatch.setattr(mapping, "QUESTIONS_AT_ONCE", 3)
    monkeypatch.setattr(engine, "begin", logged)
    shares: list[float] = []
    parts = ours.trace_batch(pairs, corruption=NOISE, progress=shares.append)
    assert log == ["begun 0", "begun 1", "asked for 0", "begun 2", "asked for 1", "asked for 2"]
    for one, two in zip(parts, plain, strict=True):
        assert one.question == two.question
        assert largest_difference(one, two) <= TOLERANCE
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
