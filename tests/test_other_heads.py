"""Captioning and matching models: the same maps, from the same pass, with the numbers of the hooks."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from test_parity import ENGINES, TOLERANCE, largest_difference

from blip_trace import Cell, GaussianNoise, ImageSwap, PixelNoise, Site, Tracer, TraceResult, engine
from blip_trace.captions import caption
from blip_trace.lowering.blip import MODELS
from blip_trace.lowering.load import shipped_model
from blip_trace.scenes import random_scene

SCENE = random_scene(Random(11))
IMAGE = SCENE.render(64)
CAPTION = caption(SCENE.objects)
KINDS = ("hidden", "cross_attn", "self_attn_head")
ASKED: dict[str, dict[str, Any]] = {
    "caption": {"question": "", "answer": CAPTION, "corruption": GaussianNoise(std=1.0, samples=2)},
    "caption begun": {
        "question": " ".join(CAPTION.split()[:2]),
        "answer": " ".join(CAPTION.split()[2:]),
        "corruption": GaussianNoise(std=1.0, samples=2),
    },
    "caption's next word": {"question": "a", "corruption": PixelNoise(std=2.0, samples=2)},
    "match": {"question": CAPTION, "corruption": GaussianNoise(std=1.0, samples=2)},
    "no match": {
        "question": CAPTION,
        "answer": "no match",
        "corruption": ImageSwap(random_scene(Random(12)).render(64)),
    },
}


@cache
def tracer(name: str, backend: str, dtype: str = "float32") -> Tracer:
    folder = shipped_model("match" if "match" in name else "caption")
    made = Tracer.from_pretrained(folder, backend="hooks")
    model = (
        made.model if dtype == "float32" else type(made.model).from_pretrained(folder, dtype=torch.float64)
    )
    return Tracer(model, made.processor, backend)  # type: ignore[arg-type]


def traced(name: str, backend: str, dtype: str = "float32", **options: Any) -> TraceResult:
    return tracer(name, backend, dtype).trace(IMAGE, kinds=KINDS, **{**ASKED[name], **options})


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", ASKED)
def test_parity(name: str, direction: str) -> None:
    truth, theirs, *ours = (
        traced(name, *kind, direction=direction)
        for kind in (("hooks", "float64"), ("hooks",), *((backend,) for backend in ENGINES))
    )
    allowed = max(TOLERANCE, 2 * largest_difference(theirs, truth))
    assert allowed <= 10 * TOLERANCE
    (cells,) = (maps for (_, kind), maps in truth.restored.items() if kind == "hidden")
    assert cells.max() - cells.min() >= max(100 * allowed, 1e-3)
    for made in ours:
        assert largest_difference(made, truth) <= allowed


def test_the_models_know_what_they_see() -> None:
    written = traced("caption", "native")
    assert written.answer == CAPTION
    assert written.high_score > 0.9
    assert traced("caption's next word", "native").answer == CAPTION.split()[1]
    fits = traced("match", "native")
    assert (fits.answer, fits.high_score > 0.9) == ("match", True)
    other = traced("no match", "native")
    assert (other.answer, other.high_score < 0.1, other.low_score > 0.9) == ("no match", True, True)


def test_any_word_of_a_caption_can_be_scored() -> None:
    whole = traced("caption", "native")
    words = [whole.by("probability", place) for place in range(len(whole.answer_ids))]
    product = torch.stack([word.samples("text_decoder", "hidden") for word in words]).prod(0)
    torch.testing.assert_close(product, whole.samples("text_decoder", "hidden"))
    # a word hangs on nothing that comes after it
    for place, word in enumerate(words):
        after = word.samples("text_decoder", "hidden")[:, place + 1 :]
        assert ((after - word.low_scores[:, None, None]).abs() <= TOLERANCE / 10).all()


def test_states_before_the_restored_token_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: plans.append(args[3]) or run(*args))
    tracer("caption", "native").trace(IMAGE, "", CAPTION, GaussianNoise(samples=1))
    tokens = len(CAPTION.split())
    runs = 2 + 4 * tokens
    # a run of token t owns the rows from t on: all cells of one layer those of a triangle
    assert plans[0].stacks[0].rows <= 2 * tokens + 4 * tokens * (tokens + 1) // 2 < runs * tokens


def test_the_image_stack_of_a_captioning_model() -> None:
    ours, theirs, truth = (
        tracer("caption", *kind).trace(
            IMAGE,
            "a",
            corruption=PixelNoise(std=2.0, samples=2),
            stacks=("vision",),
            kinds=("hidden",),
            patch_group=4,
        )
        for kind in (("native",), ("hooks",), ("hooks", "float64"))
    )
    allowed = max(TOLERANCE, 2 * largest_difference(theirs, truth))
    cells = truth.samples("vision", "hidden")
    assert cells.max() - cells.min() >= max(100 * allowed, 1e-3)
    assert largest_difference(ours, truth) <= allowed


def test_free_cells() -> None:
    cells = [
        Cell.of([Site("text_encoder", 2, "mlp", 0), Site("text_encoder", 1, "hidden", 3)]),
        Cell.knockout("text_encoder", "cross_attn", range(4), range(1, 33), range(4)),
    ]
    noise = GaussianNoise(samples=3)
    ours, truth = (
        tracer("match", *kind).restore(IMAGE, CAPTION, cells, corruption=noise).scores
        for kind in (("native",), ("hooks", "float64"))
    )
    assert truth.max() - truth.min() >= 1e-3
    assert (ours - truth).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("caption", {"stacks": ("text_encoder",)}, "unknown stack 'text_encoder'"),
        ("match", {"stacks": ("text_decoder",)}, "unknown stack 'text_decoder'"),
        ("match", {"answer": "red"}, "answers no match or match, not 'red'"),
        ("match", {"answer": 2}, "answers no match or match, not 2"),
        ("match", {"question": ""}, "the question is empty"),
        ("caption", {"answer": " ".join(["red"] * 99)}, "has 99 tokens, the model takes"),
        ("caption begun", {"answer": " ".join(["red"] * 31)}, "the caption has"),
    ],
)
def test_bad_input(name: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        traced(name, "native", **options)


def test_every_model_has_a_checkpoint_that_ships() -> None:
    kinds = {type(tracer(name, "native").model) for name in ("caption", "match")}
    assert kinds < set(MODELS)
