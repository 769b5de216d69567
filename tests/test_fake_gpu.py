"""That traces on a GPU have every tensor there, and do not wait for it between their launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fake_gpu import GpuTracer, fake_gpu
from torch import Tensor

import blip_trace
from blip_trace import Tracer, checks, engine, mapping, ops
from blip_trace.checks import Checks
from blip_trace.corrupting import Corruption
from blip_trace.sites import Cell, Site

IMAGES = [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(n)) for n in range(3)]
QUESTIONS = ["what color is the large square", "how many circles are there", "what shape is red"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ops, "native_unavailable_reason", lambda device: None)
    with fake_gpu(monkeypatch) as waits:
        yield waits


def tracer(name: str = "vqa") -> GpuTracer:
    whole = Tracer.from_pretrained(blip_trace.shipped_model(name), backend="reference")
    return GpuTracer(whole.model, whole.processor)


def test_a_batch_waits_for_nothing(gpu: list[str]) -> None:
    found = tracer().trace_batch(list(zip(IMAGES, QUESTIONS, strict=True)))
    assert [own.samples("text_encoder", "hidden").shape[0] for own in found] == [10] * 3
    assert gpu == []


def test_each_part_has_its_images_before_the_pass_of_the_one_before(
    gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a part is waited for then lies before that pass, which the GPU works on meanwhile."""
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
    tracer().trace_batch(list(zip(IMAGES, QUESTIONS, strict=True)))
    assert log == [
        *("images", "looked at"),
        *("images", "pass", "looked at"),
        *("images", "pass", "fetched", "looked at"),
        *("pass", "fetched", "fetched"),
    ]


def test_numbers_that_are_not_finite_are_found_in_the_end(
    gpu: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "fetch", lambda flags: lambda: torch.arange(len(flags)) != 2)
    with pytest.raises(ValueError, match="the corruption made NaN or infinite embeddings"):
        tracer().trace_batch(list(zip(IMAGES, QUESTIONS, strict=True))[:2])
    assert gpu == []


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
def test_corruptions(gpu: list[str], corruption: Corruption) -> None:
    result = tracer().trace(IMAGES[0], QUESTIONS[0], corruption=corruption, window=2)
    # how far the words of the table are apart is asked for once
    assert gpu == ["float"] * (isinstance(corruption, blip_trace.TokenNoise | blip_trace.Together))
    assert result.samples("text_encoder", "hidden").shape[1:] == (8, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"answer": "red", "foil": "blue", "metrics": ["logit_difference", "rank"]},
        {"foil": "blue", "metrics": ["logit_difference"]},
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
def test_options(gpu: list[str], options: dict[str, Any]) -> None:
    tracer().trace(IMAGES[0], QUESTIONS[0], **{"corruption": blip_trace.GaussianNoise(samples=2), **options})
    assert gpu == []


def test_cells_of_all_kinds(gpu: list[str]) -> None:
    ours = tracer()
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
    ours.restore(IMAGES[0], QUESTIONS[0], cells, answer="red blue")
    ours.logits(IMAGES[0], QUESTIONS[0], cells, corruption="none")
    assert gpu == []


@pytest.mark.parametrize("name", ["caption", "match"])
def test_other_models(gpu: list[str], name: str) -> None:
    tracer(name).trace(IMAGES[0], "a large red square", None if name == "match" else "and a circle")
    assert gpu == []


def test_what_the_model_says(gpu: list[str]) -> None:
    ours = tracer()
    asked = [ours.ask(image, question) for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    ours.answers(asked, max_tokens=2, guesses=["red", None, "circle"])
    assert gpu == []


def test_a_tensor_on_the_other_device_would_be_found(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: row numbers that stay on the CPU are an error."""
    monkeypatch.setattr(blip_trace.engine, "located", lambda plan, device: plan)
    with pytest.raises(RuntimeError, match="on another device"):
        tracer().trace(IMAGES[0], QUESTIONS[0])
