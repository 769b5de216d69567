"""Every metric is what its definition makes of the unmodified model's logits, in every backend.

The truth is computed here, in numpy, from the logits over all words that the model gives in float64; nothing
of `blip_trace.metrics` takes part in it. Tolerances are as in test_parity.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import pytest
import torch
from numpy.typing import NDArray
from test_parity import ENGINES, IMAGE, STACKS, TOLERANCE, ask, tracer
from torch import Tensor

from blip_trace import Cell, GaussianNoise, Tracer, TraceResult, engine, hooks
from blip_trace.metrics import METRICS, check_foil, check_metrics
from blip_trace.result import Restored

Numbers = NDArray[np.float64]
NAMES = tuple(METRICS)
KINDS = ("hidden", "cross_attn", "mlp")
CONTINUOUS = tuple(name for name in NAMES if name != "rank")
BACKENDS = ("hooks", *ENGINES)
QUESTIONS = ("color", "position")
ASKED: dict[str, dict[str, Any]] = {
    "color": {"answer": None, "foil": "blue"},
    "position": {"answer": "top left", "foil": "top right"},
}
"""Answers of one token, the model's own, and of two, which part from the foil at the second."""


@cache
def traced(
    backend: str,
    dtype: str = "float32",
    question: str = "color",
    samples: int = 3,
    kinds: tuple[str, ...] = KINDS,
) -> TraceResult:
    return tracer(backend, dtype).trace(
        IMAGE,
        ask(question).text,
        corruption=GaussianNoise(samples=samples),
        stacks=STACKS,
        kinds=kinds,
        metrics=NAMES,
        **ASKED[question],
    )


class Values(NamedTuple):
    """One metric of the cells, the corrupted and the clean runs: for each token [..., A], or joint [...]."""

    cells: Numbers  # [samples, cells]
    low: Numbers  # [samples]
    high: Numbers


class Truth(NamedTuple):
    """By metric: the values of each token, and of the whole answer. `nearest` [samples, cells]: how far the
    nearest logit of another word is from that of a token of the answer."""

    tokens: dict[str, Values]
    joint: dict[str, Values]
    nearest: Numbers


@cache
def truth(question: str, dtype: str = "float64", samples: int = 3, kinds: tuple[str, ...] = KINDS) -> Truth:
    """The metrics' definitions, of the logits of every forward pass that the hooks make."""
    seen: list[Tensor] = []
    answer_logits = hooks.answer_logits

    def listen(*args: Any) -> Tensor:
        seen.append(answer_logits(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "answer_logits", listen)
        result = traced.__wrapped__("hooks", dtype, question, samples, kinds)
    clean, low, *each = (logits.double().numpy() for logits in seen)  # [samples, A, V]
    cells, answer = np.stack(each, 1), result.answer_ids
    words = tracer("hooks").processor.tokenizer
    foil = words(ASKED[question]["foil"], add_special_tokens=False).input_ids
    of = [define(logits, clean[0], answer, foil) for logits in (cells, low, clean[0])]
    tokens = {name: Values(*(part[name] for part in of)) for name in NAMES}
    joined = {"probability": np.prod, "rank": np.max}
    joint = {
        name: Values(*(np.asarray(joined.get(name, np.sum)(part, axis=-1)) for part in tokens[name]))
        for name in NAMES
    }
    apart = np.abs(cells - cells[..., range(len(answer)), answer][..., None])
    nearest = np.sort(apart)[..., 1].min(-1)  # of all, the word itself is nearest
    return Truth(tokens, joint, nearest)


def define(logits: Numbers, clean: Numbers, answer: tuple[int, ...], foil: list[int]) -> dict[str, Numbers]:
    """Every metric of logits [..., A, V], one number for each token [..., A]."""
    places = np.arange(len(answer))
    share, clean_share = (np.exp(each) / np.exp(each).sum(-1, keepdims=True) for each in (logits, clean))
    parts_at = next(place for place in places if answer[place] != foil[place])
    difference = np.zeros(logits.shape[:-1])
    difference[..., parts_at] = (
        logits[..., parts_at, answer[parts_at]] - logits[..., parts_at, foil[parts_at]]
    )
    order = np.argsort(-logits, axis=-1)
    return {
        "probability": share[..., places, answer],
        "log_probability": np.log(share[..., places, answer]),
        "logit": logits[..., places, answer],
        "logit_difference": difference,
        "kl_divergence": (clean_share * np.log(clean_share / share)).sum(-1),
        "rank": 1.0 + (order == np.array(answer)[:, None]).argmax(-1),
    }


def ours(result: TraceResult | Restored, metric: str, token: int | None) -> Values:
    shown = result.by(metric, token)
    if isinstance(shown, Restored):
        cells = shown.scores
    else:
        cells = torch.cat([each.flatten(1) for each in shown.restored.values()], dim=1)
    return Values(cells.numpy(), shown.low_scores.numpy(), np.asarray(shown.high_score))


def true(question: str, metric: str, token: int | None, **settings: Any) -> Values:
    whole = truth(question, **settings)
    if token is None:
        return whole.joint[metric]
    return Values(*(part[..., token] for part in whole.tokens[metric]))


def largest_difference(one: Values, other: Values) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


@cache
def allowed(question: str, metric: str, token: int | None) -> float:
    """Twice the largest error that the Hugging Face model itself makes in float32, over twenty draws."""
    exact, rounded = (
        true(question, metric, token, dtype=dtype, samples=20, kinds=("hidden",))
        for dtype in ("float64", "float32")
    )
    own = largest_difference(rounded, exact)
    assert own <= 5e-4
    return max(TOLERANCE, 2 * own) if metric == "probability" else 2 * own


def tokens_of(question: str) -> tuple[int | None, ...]:
    return (None,) if question == "color" else (None, 0, 1)


def maps_of(values: Values, result: TraceResult) -> list[Numbers]:
    """Cells [samples, cells] map by map."""
    sizes = [each[0].numel() for each in result.restored.values()]
    return np.split(values.cells, np.cumsum(sizes)[:-1], axis=1)


def assert_true(result: TraceResult, question: str, metric: str) -> None:
    """Of the whole answer and of each token: as the definition says, on maps that could not agree by
    accident."""
    for token in tokens_of(question):
        exact, found = true(question, metric, token), ours(result, metric, token)
        assert exact.cells.shape == found.cells.shape
        if metric == "logit_difference" and token == 0:
            continue  # before answer and foil part: see below
        spreads = [float(np.ptp(each)) for each in maps_of(exact, result)]
        if metric == "rank":
            # words whose logits are nearer to each other than rounding may change places
            tie = truth(question).nearest <= 2 * allowed(question, "logit", None)
            assert min(spreads) > 0
            assert (exact.cells == found.cells)[~tie].all()
            assert np.mean(exact.cells == found.cells) >= 0.99
            assert np.mean(tie) < 0.05
        else:
            within = allowed(question, metric, token)
            assert min(spreads) >= 100 * within
            assert largest_difference(found, exact) <= within


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("backend", ENGINES)
def test_every_metric_is_what_its_definition_makes_of_the_logits(
    backend: str, question: str, metric: str
) -> None:
    assert_true(traced(backend, question=question), question, metric)


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_hooks_compute_the_definitions_exactly(question: str, metric: str) -> None:
    result = traced("hooks", "float64", question)
    for token in tokens_of(question):
        exact, found = true(question, metric, token), ours(result, metric, token)
        for one, other in zip(found, exact, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)  # results are kept in float32


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("backend", ENGINES)
def test_a_memory_budget_splits_the_pass_and_keeps_every_metric(
    backend: str, question: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda *args: passes.append(args) or run(*args))
    monkeypatch.setattr(tracer(backend, "float32"), "memory", 2**20)  # the one that `traced` takes
    split = traced.__wrapped__(backend, question=question)
    assert len(passes) > 5
    for metric in NAMES:
        assert_true(split, question, metric)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("backend", ENGINES)
def test_bfloat16_errs_no_more_than_twice_what_the_model_itself_does(backend: str, question: str) -> None:
    exact, theirs, found = (
        traced(name, dtype, question)
        for name, dtype in (("hooks", "float32"), ("hooks", "bfloat16"), (backend, "bfloat16"))
    )
    for metric in NAMES:
        right, model, own = (ours(result, metric, None) for result in (exact, theirs, found))
        within = 2 * largest_difference(model, right)
        assert within < np.ptp(right.cells)
        assert largest_difference(own, right) <= within


@pytest.mark.parametrize("backend", BACKENDS)
class TestSeveralTokens:
    def test_the_joint_probability_is_the_product(self, backend: str) -> None:
        result = traced(backend, question="position")
        joint, first, second = (ours(result, "probability", token) for token in (None, 0, 1))
        assert np.ptp(first.cells) > 0.1
        for whole, one, two in zip(joint, first, second, strict=True):
            np.testing.assert_allclose(whole, one * two, rtol=1e-6)

    def test_logits_differ_only_where_answer_and_foil_part(self, backend: str) -> None:
        """They share their first token: after another one the logits would be of another question."""
        result = traced(backend, question="position")
        joint, first, second = (ours(result, "logit_difference", token) for token in (None, 0, 1))
        for whole, before, there in zip(joint, first, second, strict=True):
            assert (before == 0).all()
            np.testing.assert_array_equal(whole, there)

    def test_a_foil_that_parts_early_is_compared_there_alone(self, backend: str) -> None:
        result = tracer(backend).trace(
            IMAGE,
            ask("position").text,
            "top left",
            GaussianNoise(samples=2),
            metrics=["logit_difference"],
            foil="bottom right",
        )
        joint, first, second = (ours(result, "logit_difference", token) for token in (None, 0, 1))
        assert np.ptp(first.cells) > 1
        for whole, there, behind in zip(joint, first, second, strict=True):
            assert (behind == 0).all()
            np.testing.assert_array_equal(whole, there)

    def test_the_last_token_is_also_the_one_before_the_end(self, backend: str) -> None:
        result = traced(backend, question="position")
        one, other = (ours(result, "logit", token) for token in (1, -1))
        assert largest_difference(one, other) == 0
        with pytest.raises(ValueError, match="the answer has no token 2: it has 2"):
            result.by("logit", 2)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_divergence_from_itself_is_none_and_it_is_never_negative(backend: str, question: str) -> None:
    result = traced(backend, question=question).by("kl_divergence")
    assert abs(result.high_score) <= TOLERANCE
    assert result.low_score > 1
    restored = result.by("kl_divergence", -1).samples("text_decoder", "hidden")[:, -1, -1]
    assert restored.abs().max() <= TOLERANCE
    for cells in result.restored.values():
        assert cells.min() >= -TOLERANCE

    def identity(embeddings: Tensor) -> Tensor:
        return embeddings[None].clone()

    same = tracer(backend).trace(
        IMAGE,
        ask(question).text,
        ASKED[question]["answer"],
        corruption=identity,
        metrics=["kl_divergence", "rank"],
    )
    for cells in (same.low_scores, *same.restored.values()):
        assert cells.abs().max() <= TOLERANCE
    ranks = same.by("rank")
    assert all((cells == ranks.high_score).all() for cells in ranks.restored.values())


@pytest.mark.parametrize("metric", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_state_brings_all_of_every_metric_back(backend: str, metric: str) -> None:
    """Also of those that fall when the answer returns."""
    result = traced(backend).by(metric)
    assert (result.high_score < result.low_score) is METRICS[metric].falls
    assert result.normalized("text_decoder", "hidden")[-1, -1] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_single_cells_have_the_metrics_of_the_map(backend: str) -> None:
    cells = Cell.each("text_encoder", "hidden", [[layer, token] for token in (5, 2) for layer in range(4)])
    for question in QUESTIONS:
        whole = traced(backend, question=question)
        restored = tracer(backend).restore(
            IMAGE,
            ask(question).text,
            cells,
            corruption=GaussianNoise(samples=3),
            metrics=NAMES,
            **ASKED[question],
        )
        assert restored.metric == NAMES[0]
        for metric in CONTINUOUS:
            for token in tokens_of(question):
                own, shown = restored.by(metric, token), whole.by(metric, token)
                assert (own.metric, own.answer_token) == (metric, token)
                values = shown.samples("text_encoder", "hidden")[:, [5, 2]].flatten(1)
                within = (
                    0 if metric == "logit_difference" and token == 0 else allowed(question, metric, token)
                )
                assert (own.scores - values).abs().max() <= within
                assert (own.low_scores - shown.low_scores).abs().max() <= within
                assert abs(own.high_score - shown.high_score) <= within
        ranks = whole.by("rank").samples("text_encoder", "hidden")[:, [5, 2]].flatten(1)
        assert torch.equal(restored.by("rank").scores, ranks)
    with pytest.raises(KeyError, match="'loudness' was not measured: there are probability, log_prob"):
        restored.by("loudness")


@pytest.mark.parametrize(
    ("metrics", "foil", "match"),
    [
        ((), None, "no metric given: choose among probability, log_probability, logit, logit_difference"),
        (("loudness",), None, "unknown metric 'loudness': choose among probability"),
        (("probability", "Rank"), None, "unknown metric 'Rank'"),
        (("logit_difference",), None, "logit_difference and a foil answer go together"),
        (("probability",), "red", "logit_difference and a foil answer go together"),
    ],
)
def test_metrics_that_cannot_be_measured(
    tiny_tracer: Tracer, picture: PIL.Image.Image, metrics: tuple[str, ...], foil: str | None, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        check_metrics(metrics, foil)
    with pytest.raises(ValueError, match=match):
        tiny_tracer.trace(picture, "what color", metrics=metrics, foil=foil)
    with pytest.raises(ValueError, match=match):
        tiny_tracer.restore(picture, "what color", [], metrics=metrics, foil=foil)


def test_metrics_are_named_once_and_one_needs_no_list() -> None:
    assert check_metrics(["rank", "logit", "rank"], None) == ("rank", "logit")
    assert check_metrics("rank", None) == ("rank",)


def test_the_foil_is_compared_where_it_parts_from_the_answer() -> None:
    def compared(answer: list[int], foil: list[int]) -> list[int]:
        given = torch.tensor(answer)
        tokens = check_foil(given, torch.tensor(foil)).tolist()
        assert given.tolist() == answer
        return tokens

    assert compared([7, 8, 9], [7, 5, 9]) == [7, 5, 9]
    assert compared([7, 8, 9], [1, 2, 3]) == [1, 8, 9]
    assert compared([7], [1, 2]) == [1]
    assert compared([7, 8], [1]) == [1, 8]
    for answer, foil in (([7, 8], [7, 8]), ([7, 8], [7]), ([7], [7, 8])):
        with pytest.raises(ValueError, match="no token tells them apart"):
            compared(answer, foil)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("question", "answer", "foil"),
    [
        ("color", None, "purple"),  # which is what the model answers
        ("position", "top left", "top left"),
        ("position", "top left", "top"),
        ("position", "top", "top left"),
    ],
)
def test_a_foil_that_is_the_answer(backend: str, question: str, answer: str | None, foil: str) -> None:
    with pytest.raises(ValueError, match="the foil is the answer, or one begins with the other") as error:
        tracer(backend).trace(
            IMAGE, ask(question).text, answer, foil=foil, metrics=["logit_difference"], kinds=["mlp"]
        )
    assert "\n" not in str(error.value)
    assert traced("hooks").answer == "purple"
