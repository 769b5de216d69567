"""`Tracer.restore`: any cells, in one pass, with the numbers of the hooks."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from test_parity import ENGINES, IMAGE, TOLERANCE, ask, own_error, tracer

from blip_trace import Cell, GaussianNoise, Site, Tracer
from blip_trace.sites import HEAD_KINDS, KINDS

QUESTION = ask("color").text
TOKENS = {"text_encoder": 7, "text_decoder": 1}


def some_cells(count: int) -> list[Cell]:
    """Cells of up to six sites across stacks, layers, kinds, tokens and heads."""
    random = Random(0)

    def site() -> Site:
        stack, kind = random.choice(list(TOKENS)), random.choice(list(KINDS))
        head = random.randrange(4) if kind in HEAD_KINDS else None
        return Site(stack, random.randrange(4), kind, random.randrange(TOKENS[stack]), head)

    return [Cell.of(site() for _ in range(random.randint(1, 6))) for _ in range(count)]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_any_cells_as_the_hooks_do_them(direction: str) -> None:
    def restored(backend: str, dtype: str = "float32") -> Any:
        noise = GaussianNoise(samples=3)
        return tracer(backend, dtype).restore(
            IMAGE, QUESTION, some_cells(40), corruption=noise, direction=direction
        )

    truth = restored("hooks", "float64")
    assert truth.scores.shape == (3, 40)
    assert truth.scores.max() - truth.scores.min() >= 1e-2
    for backend in ENGINES:
        ours = restored(backend)
        assert (ours.scores - truth.scores).abs().max() <= max(TOLERANCE, 2 * own_error())
        assert ours.answer == truth.answer


@pytest.mark.parametrize("memory", [None, 2**21])
def test_logits_as_the_hooks_have_them(memory: int | None) -> None:
    """Those of all words, of every run, and of passes that were split too."""
    cells = some_cells(30)

    def logits(backend: str, dtype: str = "float32") -> Any:
        made = tracer(backend, dtype)
        made = Tracer(made.model, made.processor, backend=backend, memory=memory)
        noise = GaussianNoise(samples=3)
        return made.logits(IMAGE, QUESTION, [*cells, cells[0]], "yellow", corruption=noise)

    truth, same = logits("hooks", "float64"), logits("hooks")
    assert truth.cells.shape == (3, 31, 1, tracer("hooks").model.config.text_config.vocab_size)
    assert truth.cells.std((0, 1)).max() >= 0.1
    for backend in ENGINES:
        ours = logits(backend)
        assert ours.answer_ids == truth.answer_ids
        assert torch.equal(ours.cells[:, 0], ours.cells[:, -1])
        for name in ("cells", "low", "high"):
            found, own, exact = (getattr(each, name) for each in (ours, same, truth))
            tolerance = max(TOLERANCE, 2 * (own - exact).abs().max())
            assert (found - exact).abs().max() <= tolerance, name


def test_logits_of_own_metrics() -> None:
    """Made of them, the probability is that of `restore`, for an answer of several tokens too."""
    given = dict(answer=ask("position").answer, corruption=GaussianNoise(samples=2))
    found = tracer("native").logits(IMAGE, ask("position").text, some_cells(5), **given)
    restored = tracer("native").restore(IMAGE, ask("position").text, some_cells(5), **given)
    ids = torch.tensor(found.answer_ids)
    for logits, expected in ((found.cells, restored.scores), (found.low, restored.low_scores)):
        own = logits.log_softmax(-1).gather(-1, ids.expand(logits.shape[:-1])[..., None])
        torch.testing.assert_close(own.sum((-1, -2)).exp(), expected)


def test_a_grid_is_a_list_of_cells() -> None:
    noise = GaussianNoise(samples=2)
    layers_and_tokens = np.stack(np.meshgrid(range(4), range(7)), axis=-1).reshape(-1, 2)
    cells = Cell.each("text_encoder", "hidden", layers_and_tokens)
    restored = tracer("native").restore(IMAGE, QUESTION, cells, corruption=noise)
    grid = tracer("native").trace(IMAGE, QUESTION, corruption=noise).samples("text_encoder", "hidden")
    assert (restored.scores.unflatten(1, (7, 4)) - grid).abs().max() <= TOLERANCE


def test_equal_cells_and_sites_alone() -> None:
    site = Site("text_encoder", 3, "cross_attn_head", 5, 2)
    cells = [site, [site], Cell.of([site]), Cell.each("text_encoder", "cross_attn_head", [[3, 5, 2]])[0]]
    restored = tracer("native").restore(IMAGE, QUESTION, cells, corruption=GaussianNoise(samples=2))
    assert restored.scores.shape == (2, 4)
    assert torch.equal(restored.scores, restored.scores[:, :1].expand(-1, 4))


def test_answers_of_several_tokens_are_joint() -> None:
    restored = tracer("native").restore(
        IMAGE,
        ask("position").text,
        some_cells(5),
        answer=ask("position").answer,
        corruption=GaussianNoise(samples=2),
    )
    assert restored.measured["probability"].cells.shape == (2, 5, 2)
    first, second = (restored.by("probability", token).scores for token in (0, 1))
    torch.testing.assert_close(first * second, restored.scores)
    assert restored.high_score > 0.5
    assert restored.scores.max() - restored.scores.min() > 1e-3


@pytest.mark.parametrize(
    ("cells", "match"),
    [
        ([], "no cells given"),
        ([[]], "a cell without sites"),
        ([Site("text_encoder", 9, "hidden", 0)], "text_encoder has no layer 9"),
        ([Site("text_encoder", 0, "hidden", -1)], "has no token -1"),
        ([Site("text_decoder", 0, "hidden", 1)], r"text_decoder has no token 1: it has 1"),
        ([Site("text_encoder", 0, "self_attn_head", 0, 2)], "has no head 2"),
        ([Site("vision", 0, "hidden", 0)], "the vision stack lies before"),
        ([Site("vision", 0, "cross_attn", 0)], "unknown kind 'cross_attn'"),
        ([Site("text_encoder", 0, "soul", 0)], "unknown kind 'soul'"),
        ([["hidden"]], "a cell is made of sites, not of str"),
    ],
)
def test_cells_that_do_not_exist(
    tiny_tracer: Tracer, picture: PIL.Image.Image, cells: Any, match: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        tiny_tracer.restore(picture, "what color is the red", cells)


def test_sites_of_heads_have_a_number_and_others_have_none() -> None:
    with pytest.raises(ValueError, match="only heads have a number"):
        Site("text_encoder", 0, "hidden", 0, 1)
    with pytest.raises(ValueError, match="only heads have a number"):
        Site("text_encoder", 0, "self_attn_head", 0)
    with pytest.raises(ValueError, match=r"whole numbers \[n, 3\]"):
        Cell.each("text_encoder", "self_attn_head", [[0, 1]])
