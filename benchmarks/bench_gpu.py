"""Whole traces on a GPU against every other way to the same maps there.

BLIP-VQA-base size, random weights, bfloat16, 9 question tokens: 108 cells of the question encoder and 12 of
the answer decoder, one sample of the noise. The floors of these rows are what the project sets out to reach.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from baselines import StockOps, batched_hooks, lean_hooks
from bench_trace import published
from conftest import Gate
from gpu_report import figure
from subject import TOKENS, Subject, blip_base
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import GaussianNoise, Tracer

GEMM = 8192
QUESTIONS = (8, 32, 128)
"""In one call of `trace_batch`."""

Work = Callable[[], object]
pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(scope="module")
def model() -> BlipForQuestionAnswering:
    return copy.deepcopy(blip_base("bfloat16")).cuda()


@pytest.fixture(scope="module")
def subject(model: BlipForQuestionAnswering) -> Subject:
    return Subject(model, samples=1)


def seconds(work: Work, rounds: int = 5) -> float:
    """Median of the time that it takes, the device's work included."""
    taken = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[2:])


@pytest.fixture(scope="module")
def rate() -> float:
    """Operations a second of a large bfloat16 product of random numbers."""
    one, other = (torch.randn(GEMM, GEMM, device="cuda").bfloat16() for _ in range(2))
    found = 10 * 2 * GEMM**3 / seconds(lambda: [one @ other for _ in range(10)])
    figure("matrix product, bfloat16", found / 1e12, "TFLOP/s")
    return found


class Unseen:
    """Questions about images that were never seen before, on the CPU as a data set's are."""

    def __init__(self, model: BlipForQuestionAnswering) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._side, self._words = model.config.vision_config.image_size, model.config.text_config.vocab_size

    def draw(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return [
            (
                torch.randn(3, self._side, self._side, generator=self._generator),
                torch.randint(5, self._words, (1, TOKENS), generator=self._generator),
            )
            for _ in range(count)
        ]


def maps_per_second(tracer: Tracer, unseen: Unseen, questions: int) -> float:
    """Full maps by `trace_batch`, a new image for every question; results in hand."""
    batches: Iterator[Any] = iter([unseen.draw(questions) for _ in range(7)])

    def trace() -> None:
        tracer.trace_batch(next(batches), None, GaussianNoise(samples=1))

    return questions / seconds(trace, rounds=5)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_maps_per_second(
    gate: Gate, backend: Any, model: BlipForQuestionAnswering, subject: Subject, rate: float
) -> None:
    tracer, unseen = Tracer(model, backend=backend), Unseen(model)
    name = f"GPU bfloat16, {backend}"
    found = {questions: maps_per_second(tracer, unseen, questions) for questions in QUESTIONS}
    for questions, maps in found.items():
        figure(f"{name}: {questions} questions in a batch", maps, "maps/s")
    best = max(found.values())
    share = best * subject.operations() / rate
    figure(f"{name}: counted operations of a map", subject.operations() / 1e9, "GFLOP")
    figure(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    gate({f"{name}: share of the product's rate": share})


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_one_question(gate: Gate, backend: Any, model: BlipForQuestionAnswering, subject: Subject) -> None:
    """A map of one question against the loops; an image that is not cached for any of them."""
    tracer, unseen = Tracer(model, backend=backend), Unseen(model)
    pairs = iter(unseen.draw(20))
    ours = seconds(lambda: tracer.trace(*next(pairs), corruption=GaussianNoise(samples=1)), rounds=10)
    one, rows = subject.cells[40:41], subject.cells[5::4]
    clean = subject.clean_states(rows)
    cells = len(subject.cells)
    with torch.inference_mode():
        image = seconds(subject.encoded_by_model)
        none = seconds(lambda: lean_hooks(model, subject.task, ()))
        lean = seconds(lambda: lean_hooks(model, subject.task, one))
        taken = {
            "published loop (A)": cells * seconds(published(subject)),
            "hook loop, image encoded once": image + none + cells * (lean - none),
            "batched hooks (C)": image
            + none
            + cells / len(rows) * seconds(lambda: batched_hooks(model, subject.task, rows, clean)),
            "stock torch, forking (D)": seconds(lambda: subject.trace(StockOps())),
        }
    name = f"GPU bfloat16, {backend}"
    figure(f"{name}: one question", ours * 1e3, "ms")
    for other, time_taken in taken.items():
        figure(f"GPU bfloat16: {other}", time_taken * 1e3, "ms")
    gate({f"{name}: {other}": time_taken / ours for other, time_taken in taken.items()})


def test_published_loop_in_float32(gate: Gate, model: BlipForQuestionAnswering) -> None:
    """The tool itself runs in float32."""
    single = copy.deepcopy(blip_base("float32")).cuda()
    other = Subject(single, samples=1)
    tracer, unseen = Tracer(model, backend="native"), Unseen(model)
    pairs = iter(unseen.draw(20))
    ours = seconds(lambda: tracer.trace(*next(pairs), corruption=GaussianNoise(samples=1)), rounds=10)
    loop = len(other.cells) * seconds(published(other))
    gate({"GPU bfloat16, native: published loop in float32 (A)": loop / ours})
