"""That traces on a GPU have every tensor there, do not wait for it between their launches, and give the
numbers of the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretended_gpu import GPU, Machine, OnGpu, RecordedGraphs, pretended_gpu
from sweep_helpers import assert_close, order
from test_parity import TOLERANCE, largest_difference
from test_random_models import difference, models, tasks
from torch import Tensor

import blip_trace
from blip_trace import Tracer, TraceResult, engine, mapping, passes, shipped_model
from blip_trace.checks import Checks
from blip_trace.corrupting import Corruption
from blip_trace.lowering.blip import lower
from blip_trace.ops import get_ops
from blip_trace.sites import Cell, Site
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Changed, Order
from blip_trace.task import Task

IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
QUESTIONS = ["what color is the large square", "how many circles are there", "what shape is red"]
PAIRS = list(zip(IMAGES, QUESTIONS, strict=True))
NOISE = blip_trace.GaussianNoise(samples=2)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with pretended_gpu(monkeypatch) as machine:
        yield machine


@cache
def here(name: str = "vqa", backend: Any = "native", dtype: str = "float32") -> Tracer:
    return Tracer.from_pretrained(shipped_model(name), dtype=dtype, backend=backend)


def there(gpu: Machine, name: str = "vqa", backend: Any = "native", dtype: str = "float32") -> Tracer:
    """The same on the GPU."""
    made = Tracer.from_pretrained(shipped_model(name), "cuda", dtype, backend)
    assert isinstance(made.program.head.decoder.weight, OnGpu)
    gpu.waits.clear()  # weights are looked at when a tracer is made
    return made


def agree(own: TraceResult, same: TraceResult, tolerance: float = TOLERANCE) -> None:
    """By chance maps as far apart as these could not."""
    assert max(float(cells.max() - cells.min()) for cells in same.restored.values()) >= 100 * tolerance
    assert largest_difference(own, same) <= tolerance


def test_a_batch_waits_for_nothing(gpu: Machine) -> None:
    found = there(gpu).trace_batch(PAIRS)
    assert gpu.waits == []
    for own, same in zip(found, here().trace_batch(PAIRS), strict=True):
        agree(own, same)


def test_passes_that_are_replayed(gpu: Machine) -> None:
    """Other images and questions of the same shapes each time."""
    ours = there(gpu)
    for turn in range(3):
        pairs = [(image + turn, question) for image, question in PAIRS]
        for own, same in zip(ours.trace_batch(pairs), here().trace_batch(pairs), strict=True):
            agree(own, same)
    graphs: Any = ours._graphs
    assert sum(own.calls for own in graphs.made) >= 2 * len(graphs.made) > 0
    assert gpu.waits == []


def test_little_memory(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for once: passes, and what they keep, do not make the next ones smaller."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device) or 2**22, 2**35))
    passes._free.cache_clear()
    try:
        ours = there(gpu)
        for _ in range(2):
            for own, same in zip(ours.trace_batch(PAIRS), here().trace_batch(PAIRS), strict=True):
                agree(own, same)
        graphs: Any = ours._graphs
        assert sum(own.calls for own in graphs.made) > 20  # a pass for each sample of each question
    finally:
        passes._free.cache_clear()
    assert asked == [GPU]


def test_the_next_part_is_begun_before_one_is_waited_for(
    gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    encode, begin, look = engine.encode_image, engine.begin, Checks.begin

    def encoded(*args: Any) -> Tensor:
        log.append("images")
        return encode(*args)

    def looked_at(self: Checks) -> Callable[[], None]:
        wait = look(self)
        return lambda: (log.append("looked at"), wait())[1]

    def begun(*args: Any) -> Any:
        log.append("pass")
        finish = begin(*args)
        return lambda: (log.append("fetched"), finish())[1]

    monkeypatch.setattr(mapping, "QUESTIONS_AT_ONCE", 1)
    monkeypatch.setattr(engine, "encode_image", encoded)
    monkeypatch.setattr(engine, "begin", begun)
    monkeypatch.setattr(Checks, "begin", looked_at)
    there(gpu).trace_batch(PAIRS, None, NOISE)
    assert log == [
        *("images", "pass"),
        *("images", "pass", "looked at", "fetched"),
        *("images", "pass", "looked at", "fetched"),
        *("looked at", "fetched"),
    ]


def test_numbers_that_are_not_finite_are_found_in_the_end(gpu: Machine) -> None:
    ours = there(gpu)
    with pytest.raises(ValueError, match="the corruption made NaN or infinite embeddings"):
        ours.trace_batch(PAIRS, None, lambda states: states[None] / 0)
    with pytest.raises(ValueError, match="the image encoder gives NaN or infinite embeddings"):
        ours.trace_batch([(3e38 * IMAGES[0], QUESTIONS[0]), PAIRS[1]])
    assert gpu.waits == []
    agree(*(own.trace(*PAIRS[1], None, NOISE) for own in (ours, here())))


@pytest.mark.parametrize(
    "corruption",
    [
        blip_trace.PixelNoise(samples=2),
        blip_trace.PatchNoise(samples=3),
        blip_trace.TokenNoise(samples=2),
        blip_trace.TokenNoise("square"),
        blip_trace.ImageSwap(IMAGES[1]),
        blip_trace.TokenSwap("what shape is the large square"),
        blip_trace.ImageAblation("zero"),
        blip_trace.ImageAblation("mean", IMAGES[1:]),
        blip_trace.ImageRegion(box=(0, 0, 0.5, 0.5)),
        blip_trace.ImageRegion(box=(0, 0, 0.5, 0.5), blur=2.0),
        blip_trace.Together(blip_trace.PixelNoise(samples=2), blip_trace.TokenNoise(samples=2)),
    ],
    ids=lambda corruption: type(corruption).__name__,
)
def test_corruptions(gpu: Machine, corruption: Corruption) -> None:
    own = there(gpu).trace(*PAIRS[0], corruption=corruption, window=2)
    # how far the words of the table are apart is asked for once
    words = isinstance(corruption, blip_trace.TokenNoise | blip_trace.Together)
    assert gpu.waits == ["a value"] * words
    agree(own, here().trace(*PAIRS[0], corruption=corruption, window=2))


def test_a_corruption_of_this_process(gpu: Machine) -> None:
    """What it makes on the CPU goes to the GPU."""
    made = blip_trace.GaussianNoise(samples=2)(torch.rand(65, 128))
    own = there(gpu).trace(*PAIRS[0], corruption=lambda states: made)
    assert gpu.waits == []
    agree(own, here().trace(*PAIRS[0], corruption=lambda states: made))


@pytest.mark.parametrize(
    "options",
    [
        {"answer": "red", "foil": "blue", "metrics": ["logit_difference", "rank"]},
        {"foil": "triangle", "metrics": ["logit_difference"]},
        {"metrics": ["probability", "kl_divergence", "rank"]},
        {"kinds": ["self_attn_head", "cross_attn_head"], "tokens": {"text_encoder": [-1]}},
        {"kinds": ["hidden"], "sever": ["mlp", "cross_attn"]},
        {"direction": "noise", "kinds": ["self_attn", "mlp", "hidden_after_self_attn"]},
        {
            "stacks": ["vision", "text_encoder"],
            "corruption": blip_trace.PixelNoise(samples=1),
            "patch_group": 4,
        },
    ],
    ids=str,
)
def test_options(gpu: Machine, options: dict[str, Any]) -> None:
    options = {"corruption": NOISE, **options}
    own = there(gpu).trace(*PAIRS[0], **options)
    assert gpu.waits == []
    agree(own, here().trace(*PAIRS[0], **options))


@pytest.mark.parametrize("method", ["attribution", "screen"])
def test_estimates(gpu: Machine, method: str) -> None:
    """Their gradients are the model's own, and are waited for."""
    own = there(gpu).trace(*PAIRS[0], corruption=NOISE, method=method)
    same = here().trace(*PAIRS[0], corruption=NOISE, method=method)
    agree(own, same, 10 * TOLERANCE)  # of tipping points


def test_cells_of_all_kinds(gpu: Machine) -> None:
    ours = there(gpu)
    cells = [
        Cell.of([Site("text_encoder", 1, "hidden", 2), Site("text_decoder", 0, "self_attn", 0)]),
        Cell.knockout("text_encoder", "cross_attn", [3], range(1, 40), layers=[1, 2]),
        Cell.knockout("text_encoder", "self_attn", [3], [0], layers=[0]),
        Cell.of(
            [
                Site("text_encoder", 1, "cross_attn_head", 2, 1),
                Site("text_encoder", 2, "self_attn_head", 2, 0),
            ]
        ),
    ]
    own, same = (who.restore(*PAIRS[0], cells, answer="red blue") for who in (ours, here()))
    torch.testing.assert_close(own.scores, same.scores, rtol=0, atol=TOLERANCE)
    said, expected = (who.logits(*PAIRS[0], cells, corruption="none") for who in (ours, here()))
    torch.testing.assert_close(said.cells, expected.cells, rtol=0, atol=10 * TOLERANCE)  # of about ten
    assert gpu.waits == []


@pytest.mark.parametrize("name", ["caption", "match"])
def test_other_models(gpu: Machine, name: str) -> None:
    inputs = (IMAGES[0], "a large", None, NOISE)
    own = there(gpu, name).trace(*inputs)
    assert gpu.waits == []
    agree(own, here(name).trace(*inputs))


def test_what_the_model_says(gpu: Machine) -> None:
    said = []
    for ours in (there(gpu), here()):
        asked = [ours.ask(image, question) for image, question in PAIRS]
        said.append(ours.answers(asked, max_tokens=2, guesses=["red", None, "circle"]))
    assert said[0] == said[1]
    assert gpu.waits == []


def test_the_unmodified_model_there(gpu: Machine) -> None:
    """The backend that defines what is right takes the same inputs."""
    own = there(gpu, backend="hooks").trace(*PAIRS[0], corruption=NOISE, kinds=["mlp"])
    agree(own, here().trace(*PAIRS[0], corruption=NOISE, kinds=["mlp"]))


def test_bfloat16(gpu: Machine) -> None:
    """One question alone is the same pass on both: no product is rounded otherwise."""
    own = there(gpu, dtype="bfloat16").trace(*PAIRS[0], corruption=NOISE)
    agree(own, here(dtype="bfloat16").trace(*PAIRS[0], corruption=NOISE))
    assert gpu.waits == []


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_cells_of_any_model(data: st.DataObject) -> None:
    """Run, recorded and replayed."""
    model = data.draw(models()).float()
    patches, memory = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2**28]))
    given = [data.draw(tasks(model, patches)) for _ in range(data.draw(st.integers(1, 3)))]

    def moved(task: Task, *where: Any) -> Task:
        corrupted, words = (None if x is None else x.to(*where) for x in (task.corrupted, task.words))
        return replace(task, clean=task.clean.to(*where), corrupted=corrupted, words=words)

    given = [moved(task, torch.float32) for task in given]
    same = engine.score(lower(model), get_ops("native"), given, memory)
    with pytest.MonkeyPatch.context() as patch, pretended_gpu(patch) as gpu:
        program, graphs = lower(copy.deepcopy(model).to("cuda")), RecordedGraphs()
        sent = [moved(task, "cuda") for task in given]
        gpu.waits.clear()
        for _ in range(3):
            own = engine.score(program, get_ops("native", GPU), sent, memory, graphs=graphs)
            assert difference(own, same) <= TOLERANCE
        assert graphs.made
        assert gpu.waits == []


@pytest.mark.usefixtures("gpu")
def test_a_sweep(tmp_path: Path) -> None:
    """Eight threads read its pictures; rows are those of the CPU, and the run says where it was made."""

    def made(device: str) -> Order:
        given = order("vqa", corruption={"samples": 2}, metrics=("probability", "rank"))
        return replace(given, device=device, backend="native")

    for device in ("cuda", "cpu"):
        done = sweep(made(device), tmp_path / device)
        assert done.complete
        assert done.failed == 0
    assert_close(tmp_path / "cuda", tmp_path / "cpu")
    with pytest.raises(Changed, match="device"):
        sweep(made("cpu"), tmp_path / "cuda")


def test_the_machine_finds_a_tensor_elsewhere(gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "located", lambda plan, device: plan)
    ours = there(gpu)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        ours.trace(*PAIRS[0])


def test_the_machine_notes_every_wait(gpu: Machine) -> None:
    x = torch.zeros(4, device="cuda")
    for wait in (
        lambda: bool(x[0]),
        lambda: float(x.sum()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to("cuda", non_blocking=True),
        lambda: torch.tensor([1.0], device="cuda"),
        lambda: x[torch.tensor([0, 1])],
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.unique(),
    ):
        gpu.waits.clear()
        wait()
        assert gpu.waits, wait
    gpu.waits.clear()
    host = x.to("cpu", non_blocking=True)
    assert not gpu.waits
    assert host.isnan().all()
    arrived: Any = torch.cuda.Event()
    arrived.record(None)
    arrived.synchronize()
    assert torch.equal(host, torch.zeros(4))
    with pytest.raises(RuntimeError, match="two devices"):
        x + torch.ones(4)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
