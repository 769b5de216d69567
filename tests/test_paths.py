"""Severed paths and attention knockout: runs that keep states frozen or lack edges of attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_parity import ENGINES, IMAGE, TOLERANCE, ask, largest_difference, own_error, tracer

from blip_trace import Cell, Cut, GaussianNoise, Site, Tracer
from blip_trace.sites import Shape, grid_cells

QUESTION = ask("color").text
NOISE = GaussianNoise(samples=3)
LAYERS, TOKENS, PATCHES = 4, 7, 65
SITE = Site("text_encoder", 0, "mlp", 0)
MLP: Any = "mlp"


@pytest.mark.parametrize(
    ("sever", "kinds"),
    [
        (("mlp",), ("hidden", "mlp")),
        (("self_attn",), ("hidden", "cross_attn")),
        (("cross_attn", "mlp"), ("hidden", "cross_attn_head")),  # heads whose own sublayer is frozen
    ],
)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_severed_paths(sever: tuple[str, ...], kinds: tuple[str, ...], direction: str) -> None:
    def traced(backend: str, dtype: str = "float32") -> Any:
        return tracer(backend, dtype).trace(
            IMAGE,
            QUESTION,
            corruption=NOISE,
            stacks=("text_encoder",),
            kinds=kinds,
            sever=sever,
            direction=direction,
        )

    truth = traced("hooks", "float64")
    allowed = max(TOLERANCE, 2 * own_error())
    assert allowed <= 10 * TOLERANCE
    cells = truth.samples("text_encoder", "hidden")
    assert cells.max() - cells.min() >= max(100 * allowed, 1e-3)
    for backend in ENGINES:
        assert largest_difference(traced(backend), truth) <= allowed
    whole = tracer("native").trace(IMAGE, QUESTION, corruption=NOISE, direction=direction)
    severed = traced("native").grid("text_encoder", "hidden")
    assert (severed - whole.grid("text_encoder", "hidden")).abs().max() > 1e-3


def test_a_severed_grid_freezes_the_layers_from_the_restored_one_on() -> None:
    shape = Shape(tokens=2, layers=3, heads=2, source=5, causal=False)
    cell = grid_cells("text_encoder", "hidden", [(0,), (1,)], shape, sever=("mlp",))[3 + 1]
    assert cell.sites == {Site("text_encoder", 1, "hidden", 1)}
    assert cell.frozen == {Site("text_encoder", layer, "mlp", 1) for layer in (1, 2)}
    own = grid_cells("text_encoder", "mlp", [(0,)], shape, sever=("mlp",))[0]
    assert own.frozen == {Site("text_encoder", layer, "mlp", 0) for layer in (1, 2)}


def knockouts() -> list[Cell]:
    """Edges to patches, tokens and across stacks, in windows of layers."""
    early, late, every = range(2), range(2, LAYERS), range(LAYERS)
    return [
        Cell.knockout("text_encoder", "cross_attn", range(TOKENS), range(1, PATCHES), every),
        Cell.knockout("text_encoder", "cross_attn", [5], range(0, 40), late),
        Cell.knockout("text_encoder", "cross_attn", [4, 5], range(20, 64), early),
        Cell.knockout("text_encoder", "self_attn", [0], range(1, TOKENS), every),
        Cell.knockout("text_encoder", "self_attn", range(TOKENS), [5], [1]),
        Cell.knockout("text_decoder", "cross_attn", [0], [5, 6], every),
        Cell.knockout("text_decoder", "cross_attn", [0], range(6), late),
        Cell.of(
            [Site("text_encoder", 1, "cross_attn_head", 5, 2)],
            cuts=[Cut("text_encoder", 1, "cross_attn", frozenset([5]), frozenset(range(30)))],
        ),
    ]


@pytest.mark.parametrize("corruption", ["none", NOISE])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_knockout(corruption: Any, direction: str) -> None:
    def restored(backend: str, dtype: str = "float32") -> torch.Tensor:
        return (
            tracer(backend, dtype)
            .restore(IMAGE, QUESTION, knockouts(), corruption=corruption, direction=direction)
            .scores
        )

    truth = restored("hooks", "float64")
    assert truth.max() - truth.min() >= 1e-2
    allowed = max(TOLERANCE, 2 * float((restored("hooks") - truth).abs().max()))
    assert allowed <= 10 * TOLERANCE
    for backend in ENGINES:
        assert (restored(backend) - truth).abs().max() <= allowed


def test_without_corruption_everything_starts_clean() -> None:
    restored = tracer("native").restore(IMAGE, QUESTION, knockouts(), corruption="none")
    assert restored.low_scores.tolist() == [restored.high_score]
    assert restored.settings["corruption"] == "none"
    # without its patches the model no longer knows the colour
    assert restored.scores[0, 0] < restored.high_score - 0.1


def test_answers_of_several_tokens_and_the_causal_mask() -> None:
    cells = [
        Cell.knockout("text_decoder", "self_attn", [1], [0], range(LAYERS)),
        Cell.knockout("text_decoder", "self_attn", [0], [1], range(LAYERS)),  # not seen anyway
        Cell.knockout("text_decoder", "cross_attn", [0, 1], [2, 3], range(LAYERS)),
    ]

    def restored(backend: str, dtype: str = "float32") -> Any:
        return tracer(backend, dtype).restore(
            IMAGE, ask("position").text, cells, answer=ask("position").answer, corruption="none"
        )

    truth, ours = restored("hooks", "float64"), restored("native")
    assert (truth.scores - truth.high_score).abs().max() >= 100 * TOLERANCE
    assert (ours.scores - truth.scores).abs().max() <= TOLERANCE
    assert float(ours.scores[0, 1]) == pytest.approx(ours.high_score, abs=TOLERANCE / 10)


@pytest.mark.parametrize(
    ("cell", "match"),
    [
        (lambda: Cell.of(), "a cell without sites"),
        (lambda: Cell.of([SITE], [SITE]), "at once"),
        (lambda: Cell.knockout("text_encoder", "cross_attn", [0], range(17), [0]), "nothing left to attend"),
        (lambda: Cell.knockout("text_encoder", "cross_attn", [0], [17], [0]), "has no token 17"),
        (lambda: Cell.knockout("text_encoder", "cross_attn", [9], [1], [0]), "has no token 9"),
        (lambda: Cell.knockout("text_encoder", MLP, [0], [1], [0]), "unknown sublayer"),
        (lambda: Cell.knockout("vision", "self_attn", [0], [1], [0]), "unknown stack 'vision'"),
        (lambda: Cell.knockout("text_decoder", "self_attn", [0], [0], [0]), "nothing left to attend"),
        (lambda: Cell.of(cuts=[MLP]), "given by a Cut"),
    ],
)
def test_bad_cells(tiny_tracer: Tracer, picture: Any, cell: Any, match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_tracer.restore(picture, "what color is the red", [cell()], corruption="none")


def test_bad_severing(tiny_tracer: Tracer, picture: Any) -> None:
    with pytest.raises(ValueError, match="unknown severed kind 'hidden'"):
        tiny_tracer.trace(picture, "what color is the red", sever=("hidden",))
