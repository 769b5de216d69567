"""ROME's functions against its own way of doing it: a batch of one clean and several noisy rows through the
unmodified model, with hooks, for every cell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import TokenSwap, shipped_model
from blip_trace.compat import rome
from blip_trace.compat.models import tracer_of
from blip_trace.scenes import random_scene

TOLERANCE = 1e-5
SPREAD = 100 * TOLERANCE
IMAGE = random_scene(Random(3)).render(64)
QUESTION, SUBJECT = "what shape is at the bottom center", "bottom center"
MODULES = {
    None: "",
    "mlp": ".output.dense",
    "attn": ".attention.output.dense",
    "cross_attn": ".crossattention.output.dense",
}


@cache
def mt() -> rome.ModelAndTokenizer:
    return rome.ModelAndTokenizer(shipped_model())


@cache
def exact_model() -> BlipForQuestionAnswering:
    return BlipForQuestionAnswering.from_pretrained(shipped_model(), dtype=torch.float64).eval()


@pytest.fixture(autouse=True)
def no_hooks_left() -> Any:
    yield
    for module in mt().model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def batch(samples: int = 10, question: str = QUESTION) -> dict[str, Tensor]:
    return rome.make_inputs(mt().processor, [question] * (samples + 1), image=IMAGE)


@cache
def image_states() -> Tensor:
    pixels = batch(1)["pixel_values"][:1].double()
    with torch.no_grad():
        return exact_model().vision_model(pixel_values=pixels).last_hidden_state


@torch.no_grad()
def loop(
    ids: Tensor,
    patch: Sequence[tuple[int, str]],
    answer: int,
    tokens: tuple[int, int] | None,
    noise: float | Callable[[Tensor], Tensor] = 0.1,
    uniform: bool = False,
    replace: bool = False,
    unpatch: Sequence[tuple[int, str]] = (),
    states: Tensor | None = None,
) -> float:
    """One cell as ROME does it: hooks on the embeddings and on what is patched, in float64."""
    model = exact_model()
    rows = len(ids)
    drawn = np.random.RandomState(1)
    kept: dict[str, Tensor] = {}

    def embed(module: Any, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if tokens is not None:
            first, last = tokens
            shape = (rows - 1, last - first, output.shape[2])
            made = torch.from_numpy(drawn.uniform(-1, 1, shape) if uniform else drawn.randn(*shape))
            made = noise(made) if callable(noise) else noise * made
            output[1:, first:last] = made if replace else output[1:, first:last] + made
        return output

    def patched(name: str) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: Any) -> Any:
            state = (output[0] if isinstance(output, tuple) else output).clone()
            for token, own in patch:
                if own == name:
                    state[1:, token] = state[0, token]
            for token, own in unpatch:
                if own == name:
                    state[1:, token] = kept[name][1:, token]
            return (state, *output[1:]) if isinstance(output, tuple) else state

        return hook

    def record(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    def run(hooks: Mapping[str, Callable[..., Any]]) -> Tensor:
        with ExitStack() as stack:
            for name, hook in {"text_encoder.embeddings.word_embeddings": embed, **hooks}.items():
                handle = model.get_submodule(name).register_forward_hook(hook)
                stack.callback(handle.remove)
            images = (image_states() if states is None else states).expand(rows, -1, -1)
            question = model.text_encoder(input_ids=ids, encoder_hidden_states=images).last_hidden_state
            begin = torch.full((rows, 1), model.decoder_start_token_id)
            logits: Tensor = model.text_decoder(input_ids=begin, encoder_hidden_states=question).logits
            return logits

    if unpatch:
        run({name: record(name) for _, name in unpatch})
        drawn = np.random.RandomState(1)
    logits = run({name: patched(name) for _, name in [*patch, *unpatch]})
    return float(logits[1:, -1].softmax(-1).mean(0)[answer])


def loop_map(kind: str | None, window: int, **given: Any) -> Tensor:
    """The whole map, cell by cell: ROME's windows."""
    found = []
    for token in range(len(given["ids"][0])):
        for layer in range(4):
            near = range(max(0, layer - window // 2), min(4, layer - (-window // 2)))
            names = [f"text_encoder.encoder.layer.{own}{MODULES[kind]}" for own in near]
            found.append(loop(patch=[(token, name) for name in names], **given))
    return torch.tensor(found).view(-1, 4)


def assert_agree(ours: Tensor, truth: Tensor) -> None:
    assert truth.max() - truth.min() >= SPREAD
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() <= TOLERANCE


@cache
def wide_gaussian() -> Callable[[Tensor], Tensor]:
    return rome.collect_embedding_gaussian(mt(), questions=[QUESTION, "where is the star"])


@cache
def student() -> Callable[[Tensor], Tensor]:
    return rome.collect_embedding_tdist(mt(), 3, questions=[QUESTION, "where is the star"])


CASES: dict[str, dict[str, Any]] = {
    "whole states": {},
    "mlp": {"kind": "mlp"},
    "attn": {"kind": "attn", "window": 3},
    "cross_attn": {"kind": "cross_attn", "window": 2},
    "mlp, windows of one": {"kind": "mlp", "window": 1},
    "uniform": {"uniform_noise": True, "noise": 0.8},
    "replaced": {"replace": True},
    "multivariate": {"noise": wide_gaussian},
    "Student's t": {"noise": student, "kind": "mlp", "window": 4},
    "two samples": {"samples": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_maps_as_the_loop_has_them(name: str) -> None:
    given = {"noise": 0.5, "samples": 5, **CASES[name]}
    if not isinstance(given["noise"], float):
        given["noise"] = given["noise"]()
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, image=IMAGE, **given)
    kind = given.get("kind")
    settings = {
        "ids": batch(given["samples"])["input_ids"],
        "answer": mt().tokenizer(result["answer"], add_special_tokens=False).input_ids[0],
        "tokens": (6, 8),
        "noise": given["noise"],
        "uniform": given.get("uniform_noise", False),
        "replace": given.get("replace", False),
    }
    assert_agree(result["scores"], loop_map(kind, given.get("window", 10) if kind else 1, **settings))
    assert abs(result["low_score"] - loop(patch=[], **settings)) <= TOLERANCE


def test_the_result() -> None:
    result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, image=IMAGE)
    assert list(result) == [
        "scores",
        "low_score",
        "high_score",
        "input_ids",
        "input_tokens",
        "subject_range",
        "answer",
        "window",
        "correct_prediction",
        "kind",
    ]
    assert result["scores"].shape == (9, 4)
    assert result["scores"].dtype == torch.float32
    assert isinstance(result["low_score"], float)
    assert result["high_score"].shape == ()
    assert torch.equal(result["input_ids"], batch()["input_ids"][0])
    assert result["input_tokens"] == ["[CLS]", *QUESTION.split(), "[SEP]"]
    assert result["subject_range"] == (6, 8)
    assert (result["answer"], result["window"], result["correct_prediction"]) == ("circle", 10, True)
    assert result["kind"] == ""
    assert result["low_score"] < 0.9 < result["high_score"]
    assert rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, kind="mlp", image=IMAGE)["kind"] == "mlp"


def test_a_wrong_prediction_is_not_traced() -> None:
    assert rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, expect="star", image=IMAGE) == {
        "correct_prediction": False
    }
    right = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, expect="circle", image=IMAGE)
    assert right["correct_prediction"] is True


def test_the_noise_is_the_same_in_every_call() -> None:
    one, other = (
        rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, image=IMAGE) for _ in range(2)
    )
    assert torch.equal(one["scores"], other["scores"])
    assert one["low_score"] == other["low_score"]


def test_the_low_score_keeps_replace_unless_it_is_to_be_faithful() -> None:
    def low(**given: bool) -> float:
        result = rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, image=IMAGE, **given)
        return float(result["low_score"])

    assert abs(low(replace=True) - low(replace=False)) > SPREAD
    assert low(replace=True, faithful=True) == pytest.approx(low(replace=False), abs=1e-7)
    assert low(faithful=True) == low()


def test_the_last_token_of_the_subject_alone() -> None:
    whole, last = (
        rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, noise=0.5, image=IMAGE, token_range=tokens)
        for tokens in (None, "subject_last")
    )
    assert last["scores"].shape == (1, 4)
    assert (last["scores"] - whole["scores"][7]).abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="unknown token_range 'subject_first'"):
        rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, image=IMAGE, token_range="subject_first")


# The functions below it


def names(*states: tuple[int, int, str | None]) -> list[tuple[int, str]]:
    """Tokens and modules of (token, layer, kind)."""
    return [(token, rome.layername(mt().model, layer, kind)) for token, layer, kind in states]


PATCHES = [
    names((7, 1, None)),
    names((6, 0, "mlp"), (7, 2, "attn"), (0, 3, "cross_attn")),
    [
        *names((7, 0, None)),
        (0, "text_decoder.bert.encoder.layer.2"),
        (7, "text_encoder.encoder.layer.1.output"),
    ],
    [],
]


@pytest.mark.parametrize("patch", PATCHES)
def test_any_states_as_the_loop_patches_them(patch: list[tuple[int, str]]) -> None:
    answer = mt().tokenizer("circle", add_special_tokens=False).input_ids[0]
    found = rome.trace_with_patch(mt().model, batch(5), patch, torch.tensor(answer), (6, 8), noise=0.5)
    assert found.shape == ()
    assert abs(found - loop(batch(5)["input_ids"], patch, answer, (6, 8), 0.5)) <= TOLERANCE


UNPATCHES = {
    "severed mlps": (names((7, 0, None)), names(*((7, layer, "mlp") for layer in range(1, 4)))),
    "severed attention": (names((7, 1, None)), names(*((7, layer, "attn") for layer in range(4)))),
    "in both lists": (names((7, 1, None), (6, 0, "mlp")), names((7, 1, None))),
    "nothing put back": ([], names((7, 1, "mlp"))),
    "nothing kept": (names((7, 1, None)), []),
}


@pytest.mark.parametrize("name", UNPATCHES)
@pytest.mark.parametrize("uniform", [False, True])
def test_severed_paths_as_the_loop_keeps_them(name: str, uniform: bool) -> None:
    patch, unpatch = UNPATCHES[name]
    answer = mt().tokenizer("circle", add_special_tokens=False).input_ids[0]
    found = rome.trace_with_repatch(mt().model, batch(5), patch, unpatch, answer, (6, 8), 0.5, uniform)
    truth = loop(batch(5)["input_ids"], patch, answer, (6, 8), 0.5, uniform, unpatch=unpatch)
    assert abs(found - truth) <= TOLERANCE


def test_severing_changes_something() -> None:
    """Or the test above could not fail."""
    answer = mt().tokenizer("circle", add_special_tokens=False).input_ids[0]
    whole = names((7, 0, None))
    found = [
        float(rome.trace_with_repatch(mt().model, batch(5), whole, unpatch, answer, (6, 8), 0.5))
        for unpatch in (
            [],
            UNPATCHES["severed mlps"][1],
            names(*((7, layer, "attn") for layer in range(1, 4))),
        )
    ]
    assert abs(found[0] - found[1]) > SPREAD
    assert abs(found[0] - found[2]) > SPREAD


def test_maps_of_chosen_tokens_and_fewer_layers() -> None:
    answer = mt().tokenizer("circle", add_special_tokens=False).input_ids[0]
    given = {"noise": 0.5, "token_range": [7, 2]}
    states = rome.trace_important_states(mt().model, 3, batch(), (6, 8), answer, **given)
    window = rome.trace_important_window(mt().model, 3, batch(), (6, 8), answer, "mlp", 2, **given)
    assert states.shape == window.shape == (2, 3)
    own = rome.trace_with_patch(mt().model, batch(), names((2, 1, None)), answer, (6, 8), 0.5)
    assert abs(states[1, 1] - own) <= TOLERANCE
    # the window of layer 2 is cut off at the third of three layers
    pair = names((7, 1, "mlp"), (7, 2, "mlp"))
    assert (
        abs(window[0, 2] - rome.trace_with_patch(mt().model, batch(), pair, answer, (6, 8), 0.5)) <= TOLERANCE
    )


def test_rows_may_be_other_questions_and_other_pictures() -> None:
    """As ROME says: corrupted by other input, without noise."""
    other = "what color is at the bottom center"
    inp = rome.make_inputs(mt().processor, [QUESTION, other, other], image=IMAGE)
    answer = mt().tokenizer("circle", add_special_tokens=False).input_ids[0]
    found = rome.trace_important_states(mt().model, 4, inp, None, answer)
    truth = tracer_of(mt().model, mt().processor).trace(
        IMAGE, QUESTION, answer, TokenSwap(other), stacks=["text_encoder"]
    )
    assert_agree(found, truth.grid("text_encoder", "hidden"))

    pixels = torch.cat(
        [rome.make_inputs(mt().processor, [QUESTION], image=image)["pixel_values"] for image in SIGHTS]
    )
    inp = {**batch(1), "pixel_values": pixels}
    found = rome.trace_important_states(mt().model, 4, inp, None, answer)
    with torch.no_grad():
        seen = exact_model().vision_model(pixel_values=pixels.double()).last_hidden_state
    assert_agree(found, loop_map(None, 1, ids=inp["input_ids"], answer=answer, tokens=None, states=seen))


SIGHTS = (IMAGE, random_scene(Random(4)).render(64))


def test_predictions_are_the_model_s() -> None:
    questions = [QUESTION, "what color is the square", "is there a shape at the bottom center"]
    words, p = rome.predict_token(mt(), questions, True, image=IMAGE)
    assert words == ["circle", "purple", "yes"] == rome.predict_token(mt(), questions, image=IMAGE)
    assert p.shape == (3,)
    inp = rome.make_inputs(mt().processor, [QUESTION, QUESTION.replace("shape", "color")], image=IMAGE)
    preds, p = rome.predict_from_input(mt().model, inp)
    assert preds.dtype == torch.int64
    for row in range(2):
        ids = inp["input_ids"][row : row + 1]
        assert float(p[row]) == pytest.approx(
            loop(ids.expand(2, -1), [], int(preds[row]), None), abs=TOLERANCE
        )
    pixels = torch.cat([inp["pixel_values"][:1], torch.zeros_like(inp["pixel_values"][:1])])
    _, apart = rome.predict_from_input(mt().model, {**batch(1), "pixel_values": pixels})
    assert abs(apart[0] - apart[1]) > TOLERANCE
