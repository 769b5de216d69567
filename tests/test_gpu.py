"""What only a GPU shows: graphs, passes of several questions, memory that runs out, the command line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from gpu_machines import GPUS, HERE, REQUIRED
from test_parity import IMAGE, TOLERANCE, ask, largest_difference
from typer.testing import CliRunner

import blip_trace
from blip_trace import GaussianNoise, Tracer, TraceResult
from blip_trace.cli import app

if not HERE and not REQUIRED:
    pytest.skip("there is no GPU", allow_module_level=True)

NOISE = GaussianNoise(samples=2)
QUESTIONS = [ask(kind).text for kind in ("color", "count", "color", "shape", "color", "color", "count")]
PAIRS = [(IMAGE, question) for question in QUESTIONS]
BACKENDS = pytest.mark.parametrize("backend", GPUS.values())


def tracer(backend: str, device: str = "cuda", dtype: str = "float32", memory: int | None = None) -> Tracer:
    return Tracer.from_pretrained(blip_trace.shipped_model(), device, dtype, backend, memory)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain() -> list[TraceResult]:
    """One at a time, on the CPU, in float64."""
    return [_in_float64(question) for question in QUESTIONS]


@cache
def _in_float64(question: str) -> TraceResult:
    single = tracer("reference", "cpu")
    whole = type(single.model).from_pretrained(blip_trace.shipped_model(), dtype=torch.float64)
    return Tracer(whole, single.processor, "reference").trace(IMAGE, question, corruption=NOISE)


@cache
def allowed() -> float:
    """Twice what float32 on the CPU is off, and 1e-5 at least."""
    single = tracer("reference", "cpu")
    errors = [
        largest_difference(single.trace(IMAGE, question, corruption=NOISE), _in_float64(question))
        for question in QUESTIONS
    ]
    assert max(errors) <= 5 * TOLERANCE
    return max(TOLERANCE, 2 * max(errors))


def assert_same(found: list[TraceResult], plain: list[TraceResult]) -> None:
    for one, two in zip(found, plain, strict=True):
        assert largest_difference(one, two) <= allowed()
        cells = two.samples("text_encoder", "hidden")
        assert cells.max() - cells.min() > 100 * allowed()


@BACKENDS
def test_a_batch_by_graphs_gives_the_numbers_of_one_at_a_time(backend: str, plain: list[TraceResult]) -> None:
    """At first a pass is run, then recorded, then replayed, also with other questions between."""
    ours = tracer(backend)
    for _ in range(4):
        assert_same(ours.trace_batch(PAIRS, corruption=NOISE), plain)
        assert_same(ours.trace_batch(PAIRS[::-1], corruption=NOISE), plain[::-1])
        ours.forget_images()
    assert ours._graphs is not None
    assert len(ours._graphs._recorded) > 3  # text passes of two lengths and sizes, and image encodings


@BACKENDS
def test_a_stream_of_the_caller_s(backend: str, plain: list[TraceResult]) -> None:
    ours = tracer(backend)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            found = ours.trace_batch(PAIRS, corruption=NOISE)
    assert_same(found, plain)


@pytest.fixture
def little_memory() -> Iterator[int]:
    """Some tens of megabytes beside what the model takes."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    left = 160 * 2**20
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + left) / total)
    yield left
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@BACKENDS
def test_where_memory_runs_out_passes_are_halved(
    backend: str, plain: list[TraceResult], little_memory: int
) -> None:
    ours = tracer(backend, memory=2**40)  # believed to be there
    with pytest.warns(UserWarning, match="out of memory: going on with passes"):
        found = ours.trace_batch(PAIRS * 30, corruption=NOISE)
    assert_same(found[: len(PAIRS)], plain)
    assert_same(found[-len(PAIRS) :], plain)


def test_the_default_budget_fits_what_is_free(little_memory: int) -> None:
    ours = tracer("native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.trace_batch(PAIRS, corruption=NOISE)


@pytest.mark.parametrize("backend", ["reference", "hooks"])
def test_the_other_backends_work_there_too(backend: str, plain: list[TraceResult]) -> None:
    ours = tracer(backend)
    assert_same([ours.trace(*PAIRS[0], corruption=NOISE)], plain[:1])


def test_attribution_is_that_of_the_cpu() -> None:
    options = {"corruption": NOISE, "method": "attribution"}
    one, two = (tracer("native", device).trace(*PAIRS[0], **options) for device in ("cuda", "cpu"))
    spread = float(two.samples("text_encoder", "hidden").abs().max())
    assert largest_difference(one, two) <= 1e-3 * spread


def test_pixels_and_ids_may_be_there(plain: list[TraceResult]) -> None:
    ours = tracer("native")
    asked = ours.ask(*PAIRS[0])
    found = ours.trace(asked.pixels.cuda(), asked.text_ids.cuda(), corruption=NOISE)
    assert_same([found], plain[:1])
    assert not found.samples("text_encoder", "hidden").is_cuda
    assert found.settings["device"] == "cuda:0"


def test_from_the_command_line(tmp_path: Path) -> None:
    picture = tmp_path / "scene.png"
    IMAGE.save(picture)
    asked = ["run", "--image", str(picture), "--question", QUESTIONS[0], "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*asked, "--device", "cuda"])
    assert done.exit_code == 0, done.output
