"""States of the image encoder: restored inside the same pass, with the numbers of the hooks."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from test_parity import ENGINES, IMAGE, TOLERANCE, ask, largest_difference, tracer

import blip_trace
from blip_trace import Cell, Site, Tracer, TraceResult, engine
from blip_trace.scenes import random_scene
from blip_trace.sites import VISION_KINDS, patch_groups

QUESTION = ask("color").text
OTHER = random_scene(Random(4)).render(64)
CORRUPTIONS: dict[str, Any] = {
    "pixels": blip_trace.PixelNoise(std=1.5, samples=2),
    "patches": blip_trace.PatchNoise(std=1.0, samples=2),
    "swap": blip_trace.ImageSwap(OTHER),
    "image and text": blip_trace.Together(
        blip_trace.PixelNoise(std=1.0, samples=2), blip_trace.TokenNoise(samples=2)
    ),
}


@cache
def traced(
    backend: str,
    dtype: str = "float32",
    corruption: str = "pixels",
    memory: int = 2**28,
    patch_group: int = 4,
    **options: Any,
) -> TraceResult:
    """The map of the image encoder in blocks of patches, beside that of the answer decoder."""
    made = tracer(backend, dtype)
    made.memory = memory
    return made.trace(
        IMAGE,
        QUESTION,
        corruption=CORRUPTIONS[corruption],
        stacks=("vision", "text_decoder"),
        kinds=VISION_KINDS,
        patch_group=patch_group,
        **options,
    )


def assert_agree(truth: TraceResult, theirs: TraceResult, *ours: TraceResult) -> None:
    """Ours are as near as 1e-5, or twice as far as the Hugging Face model's own float32."""
    allowed = max(TOLERANCE, 2 * largest_difference(theirs, truth))
    assert allowed <= 10 * TOLERANCE
    spread = truth.samples("vision", "hidden")
    assert spread.max() - spread.min() >= max(100 * allowed, 1e-3)
    for made in ours:
        assert largest_difference(made, truth) <= allowed


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_parity(corruption: str, direction: str) -> None:
    # a quarter of a corrupted picture in a clean one hardly changes the answer, nor of a clean one in another
    group = 8 if corruption == "swap" or direction == "noise" else 4
    truth, theirs, *ours = (
        traced(*kind, corruption=corruption, direction=direction, patch_group=group)
        for kind in (("hooks", "float64"), ("hooks",), *((backend,) for backend in ENGINES))
    )
    assert truth.samples("vision", "mlp").shape[1:] == (1 + (8 // group) ** 2, 4)  # class and blocks; layers
    assert_agree(truth, theirs, *ours)


def test_windows() -> None:
    kinds = (("hooks", "float64"), ("hooks",), ("native",))
    assert_agree(*(traced(*kind, window=3) for kind in kinds))


def test_a_memory_budget_splits_the_pass_and_keeps_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: passes.append(args) or run(*args))
    split = traced("native", memory=2**20)
    assert len(passes) > 10
    assert_agree(traced("hooks", "float64"), traced("hooks"), split)


def test_restoring_every_patch_of_the_last_layer_is_the_clean_answer() -> None:
    everything = [Site("vision", 3, "hidden", token) for token in range(65)]
    restored = tracer("native").restore(IMAGE, QUESTION, [everything], corruption=CORRUPTIONS["pixels"])
    assert restored.scores[:, 0].tolist() == pytest.approx([restored.high_score] * 2, abs=TOLERANCE)
    assert restored.low_scores.max() < restored.high_score - 0.1


def test_cells_across_image_and_text() -> None:
    cells = [
        Cell.of(
            [Site("vision", 1, "hidden", token) for token in range(50)]
            + [Site("text_encoder", 2, "cross_attn", 3)]
        ),
        Cell.of(
            [Site("vision", 2, "hidden", token) for token in range(60)],
            frozen=[Site("vision", 3, "self_attn", token) for token in range(0, 65, 2)],
        ),
        Cell.knockout("text_encoder", "cross_attn", range(7), [1, 2, 3], [0, 1]),
    ]
    for corruption in ("swap", "pixels"):
        ours, theirs, truth = (
            tracer(*kind).restore(IMAGE, QUESTION, cells, corruption=CORRUPTIONS[corruption])
            for kind in (("native",), ("hooks",), ("hooks", "float64"))
        )
        allowed = max(TOLERANCE, 2 * float((theirs.scores - truth.scores).abs().max()))
        # what the cells change is far above that, by itself or among themselves
        changes = truth.scores - truth.low_scores[:, None]
        assert changes.abs().max() >= 100 * allowed
        assert (ours.scores - truth.scores).abs().max() <= allowed


def test_patches_fall_into_blocks() -> None:
    groups = patch_groups(8, 3)
    assert list(groups)[:4] == ["class", "0,0", "0,1", "0,2"]
    assert groups["class"] == (0,)
    assert groups["0,0"] == (1, 2, 3, 9, 10, 11, 17, 18, 19)
    assert groups["2,2"] == (55, 56, 63, 64)  # a smaller one at the corner
    assert sorted(token for group in groups.values() for token in group) == list(range(65))


def test_the_result_keeps_the_picture_and_saves_it(tmp_path: Any) -> None:
    result = traced("native")
    assert result.picture is not None
    seen = torch.tensor(list(IMAGE.get_flattened_data())).view(64, 64, 3)
    assert (result.picture.int() - seen).abs().max() <= 1
    result.save(tmp_path / "trace.safetensors")
    assert torch.equal(TraceResult.load(tmp_path / "trace.safetensors").picture, result.picture)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "the vision stack lies before the image embeddings"),
        ({"corruption": blip_trace.TokenNoise()}, "the image is not corrupted"),
        ({"corruption": blip_trace.ImageAblation()}, "the vision stack lies before"),
        ({"corruption": blip_trace.PixelNoise(), "kinds": ("cross_attn",)}, "has no kind 'cross_attn'"),
        ({"corruption": blip_trace.PixelNoise(), "patch_group": 0}, "patch_group must be"),
        ({"corruption": blip_trace.PixelNoise(), "tokens": {"vision": [1]}}, "unknown stack 'vision'"),
    ],
)
def test_bad_input(tiny_tracer: Tracer, picture: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny_tracer.trace(picture, "what color is the red", stacks=("vision",), **options)
