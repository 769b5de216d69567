"""That traces on a GPU have every tensor there, and do not wait for it between their launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_gpu import GpuTracer, fake_gpu

import blip_trace
from blip_trace import Tracer, ops
from blip_trace.corruption import Corruption
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


def test_a_batch_waits_only_to_know_that_its_inputs_are_finite(gpu: list[str]) -> None:
    found = tracer().trace_batch(list(zip(IMAGES, QUESTIONS, strict=True)))
    assert [own.samples("text_encoder", "hidden").shape[0] for own in found] == [10] * 3
    # two images and then one are encoded together; each question has noise of its own
    assert gpu == ["bool"] * (2 + 3)


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
    assert set(gpu) <= {"bool", "float"}
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
    assert set(gpu) <= {"bool"}


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
    assert set(gpu) == {"bool"}


@pytest.mark.parametrize("name", ["caption", "match"])
def test_other_models(gpu: list[str], name: str) -> None:
    tracer(name).trace(IMAGES[0], "a large red square", None if name == "match" else "and a circle")
    assert set(gpu) == {"bool"}


def test_what_the_model_says(gpu: list[str]) -> None:
    ours = tracer()
    asked = [ours.ask(image, question) for image, question in zip(IMAGES, QUESTIONS, strict=True)]
    ours.answers(asked, max_tokens=2, guesses=["red", None, "circle"])
    assert set(gpu) == {"bool"}


def test_a_tensor_on_the_other_device_would_be_found(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: row numbers that stay on the CPU are an error."""
    monkeypatch.setattr(blip_trace.engine, "located", lambda plan, device: plan)
    with pytest.raises(RuntimeError, match="on another device"):
        tracer().trace(IMAGES[0], QUESTIONS[0])
