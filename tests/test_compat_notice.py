"""NOTICE's functions against its own way of doing it: three rows, clean, corrupt and patched, through the
unmodified model, with hooks, for every cell."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import Tracer, shipped_model
from blip_trace.compat import notice
from blip_trace.compat.models import UnsupportedError
from blip_trace.scenes import random_scene

TOLERANCE = 1e-5
"""Of probabilities; of logits, which are ten times as large as their difference here, ten times that."""
PARTS = torch.tensor([1, 1, 10, 10]) * TOLERANCE
CLEAN, OTHER = (random_scene(Random(seed)).render(64) for seed in (3, 4))
QUESTION, SWAPPED = "what shape is at the bottom center", "what color is at the bottom center"
INPUTS = {
    "image": (QUESTION, CLEAN, OTHER),
    "text": (CLEAN, QUESTION, SWAPPED),
    "both": (None, (CLEAN, QUESTION), (OTHER, SWAPPED)),
}
MODULES = {
    None: "",
    "output": ".output",
    "attention_block": ".attention.self",
    "crossattention_block": ".crossattention.self",
    "crossattention_layernorm": ".crossattention.output.LayerNorm",
    "attention": ".attention",
    "output.dense": ".output.dense",
}
HEADS, LAYERS, TOKENS = 4, 4, 9


@cache
def tracer() -> Tracer:
    return Tracer.from_pretrained(shipped_model())


@cache
def exact_model() -> BlipForQuestionAnswering:
    return BlipForQuestionAnswering.from_pretrained(shipped_model(), dtype=torch.float64).eval()


@cache
def answers() -> tuple[int, int]:
    tokenizer = tracer().processor.tokenizer
    return tuple(tokenizer(word).input_ids[1] for word in ("circle", "square"))  # type: ignore[return-value]


def model() -> tuple[Any, Any]:
    return tracer().model, tracer().processor


@pytest.fixture(autouse=True)
def no_hooks_left() -> Any:
    yield
    for module in tracer().model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@cache
def rows(mode: str) -> tuple[Tensor, Tensor]:
    """Image states [3, N, D] and ids [3, T] of clean, corrupt and corrupt."""
    processor = tracer().processor
    images, questions = {
        "image": ([CLEAN, OTHER], [QUESTION] * 2),
        "text": ([CLEAN] * 2, [QUESTION, SWAPPED]),
        "both": ([CLEAN, OTHER], [QUESTION, SWAPPED]),
    }[mode]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values.double()
    with torch.no_grad():
        states = exact_model().vision_model(pixel_values=pixels).last_hidden_state
    return states[[0, 1, 1]], processor.tokenizer(questions, return_tensors="pt").input_ids[[0, 1, 1]]


@torch.no_grad()
def loop(mode: str, patch: Sequence[tuple[int, str]], head: int | None = None) -> Tensor:
    """One cell as NOTICE does it, in float64: its four numbers."""
    own = exact_model()

    def hook(module: Any, args: Any, output: Any) -> Any:
        state = (output[0] if isinstance(output, tuple) else output).clone()
        for token, name in patch:
            if own.get_submodule(name) is module:
                channels = state.shape[2] // HEADS
                part = slice(None) if head is None else slice(head * channels, (head + 1) * channels)
                state[2, token, part] = state[0, token, part]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    images, ids = rows(mode)
    with ExitStack() as stack:
        for name in {name for _, name in patch}:
            stack.callback(own.get_submodule(name).register_forward_hook(hook).remove)
        question = own.text_encoder(input_ids=ids, encoder_hidden_states=images).last_hidden_state
        begin = torch.full((3, 1), own.decoder_start_token_id)
        logits = own.text_decoder(input_ids=begin, encoder_hidden_states=question).logits[:, -1]
    correct, incorrect = answers()
    p = logits.softmax(-1)[:, correct]
    clean, corrupt, patched = logits[:, correct] - logits[:, incorrect]
    return torch.stack((p[2], p[2] - p[1], patched - corrupt, (patched - corrupt) / (clean - corrupt)))


def loop_map(
    mode: str, kind: str | None, head: int | None = None, block: str = "text_encoder.encoder"
) -> Tensor:
    tokens = TOKENS if block == "text_encoder.encoder" else 1
    return torch.stack(
        [
            loop(mode, [(token, f"{block}.layer.{layer}{MODULES[kind]}")], head)
            for token in range(tokens)
            for layer in range(LAYERS)
        ]
    ).view(tokens, LAYERS, 4)


def flow(mode: str = "image", kind: str | None = None, **given: Any) -> dict[str, Any]:
    usual = {"start": 0, "num_layers": LAYERS, "block_name": "text_encoder", "kind": kind}
    return notice.calculate_hidden_flow(*model(), *INPUTS[mode], answers(), mode, **{**usual, **given})


def assert_agree(ours: Tensor, truth: Tensor) -> None:
    assert ours.shape == truth.shape
    assert ours.dtype == torch.float32
    spread = (truth.amax((0, 1)) - truth.amin((0, 1))) if truth.dim() == 3 else torch.tensor(torch.inf)
    assert (spread >= 100 * PARTS).all()
    assert ((ours - truth).abs() <= PARTS).all()


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("mode", INPUTS)
def test_maps_as_the_loop_has_them(mode: str, kind: str | None) -> None:
    found = flow(mode, kind)
    assert_agree(found["scores"], loop_map(mode, kind))
    assert_agree(found["low_score"], loop(mode, []))


@pytest.mark.parametrize("kind", ["attention_block", "crossattention_block"])
@pytest.mark.parametrize("mode", ["image", "text"])
def test_heads_as_the_loop_has_them(mode: str, kind: str) -> None:
    """All in one pass, or one by one."""
    every = notice.calculate_head_flows(
        *model(), *INPUTS[mode], answers(), mode, 0, LAYERS, "text_encoder", kind
    )
    assert [own["attn_head"] for own in every] == list(range(HEADS))
    truth = [loop_map(mode, kind, head) for head in range(HEADS)]
    compared = torch.stack(truth)[..., 2]  # of one head the probabilities may all be small
    assert compared.max() - compared.min() >= 100 * PARTS[2]
    for head, own in enumerate(every):
        assert ((own["scores"] - truth[head]).abs() <= PARTS).all()
    one = flow(mode, kind, attn_head=2)
    assert one.keys() == every[2].keys()
    assert (one["scores"] - every[2]["scores"]).abs().max() <= TOLERANCE


def test_one_pass_for_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    restore = Tracer.restore
    monkeypatch.setattr(Tracer, "restore", lambda *args, **given: calls.append(1) or restore(*args, **given))
    notice.calculate_head_flows(
        *model(), *INPUTS["image"], answers(), "image", 0, LAYERS, "text_encoder", "crossattention_block"
    )
    assert len(calls) == 1


def test_the_answer_decoder() -> None:
    """One token: the tool runs over the question's, of which the decoder has none but the first."""
    found = flow("image", block_name="text_decoder")
    truth = loop_map("image", None, block="text_decoder.bert.encoder")
    assert ((found["scores"] - truth).abs() <= PARTS).all()
    assert found["scores"].shape == (1, LAYERS, 4)
    assert found["scores"][0, -1, 3] == pytest.approx(1, abs=1e-4)  # the clean answer


def test_the_result() -> None:
    found = flow("text", "attention_block", attn_head=1)
    assert list(found) == list(notice_columns())
    assert found["scores"].shape == (TOKENS, LAYERS, 4)
    assert found["low_score"].shape == (4,)
    assert (found["question"], found["block_name"], found["kind"]) == (
        QUESTION,
        "text_encoder",
        "attention_block",
    )
    assert (found["correct_token"], found["incorrect_token"]) == answers()
    assert found["attn_head"] == 1
    assert flow("image")["question"] == flow("both")["question"] == QUESTION


def notice_columns() -> list[str]:
    return [
        "scores",
        "low_score",
        "question",
        "correct_token",
        "incorrect_token",
        "block_name",
        "kind",
        "attn_head",
    ]


def test_kinds_that_are_the_same_state() -> None:
    """The MLP works token by token behind the cross-attention's LayerNorm, and the output is the layer's."""
    whole = flow()["scores"]
    assert torch.equal(flow(kind="output")["scores"], whole)
    assert ((flow(kind="crossattention_layernorm")["scores"] - whole).abs() <= PARTS).all()


def test_chosen_layers_and_tokens() -> None:
    whole = flow(kind="crossattention_block")["scores"]
    part = notice.trace_important_states(
        *model(), *INPUTS["image"], answers(), "image", 1, 3, "text_encoder", 2, "crossattention_block"
    )
    assert part.shape == (2, 2, 4)
    assert ((part - whole[:2, 1:3]).abs() <= PARTS).all()
    rest = notice.trace_important_states(
        *model(), *INPUTS["image"], answers(), "image", 3, LAYERS, "text_encoder", kind="crossattention_block"
    )
    assert ((rest - whole[:, 3:]).abs() <= PARTS).all()


def test_several_states_at_once() -> None:
    def layer(number: int, kind: str | None = None, block: str = "text_encoder") -> str:
        return notice.layername(tracer().model, number, block, kind)

    for states, head in (
        ([(6, layer(1)), (7, layer(2)), (0, layer(0, "attention_block"))], None),
        ([(6, layer(1, "crossattention_block")), (6, layer(2, "crossattention_block"))], 3),
        ([(7, layer(2)), (0, layer(1, block="text_decoder"))], None),
        ([], None),
    ):
        found = notice.trace_with_patch(
            *model(), *INPUTS["image"], answers(), "image", states, attn_head=head
        )
        assert found.shape == (4,)
        assert ((found - loop("image", states, head)).abs() <= PARTS).all()


# What cannot be divided by


def test_a_vanishing_difference_is_nan_and_said() -> None:
    with pytest.warns(UserWarning, match="the patching effect is NaN") as caught:
        found = notice.calculate_hidden_flow(
            *model(), QUESTION, CLEAN, CLEAN, answers(), "image", 0, LAYERS, "text_encoder"
        )
    assert caught[0].filename == __file__
    assert found["scores"][..., 3].isnan().all()
    assert found["low_score"][3].isnan()
    assert found["scores"][..., :3].isfinite().all()
    assert found["scores"][..., 1:3].abs().max() <= TOLERANCE


def test_answers_that_begin_alike_have_no_logits_to_compare() -> None:
    same = (answers()[0],) * 2
    with pytest.warns(UserWarning, match="the patching effect is NaN"):
        found = notice.calculate_hidden_flow(
            *model(), *INPUTS["image"], same, "image", 0, LAYERS, "text_encoder"
        )
    whole = flow()["scores"]
    assert (found["scores"][..., :2] - whole[..., :2]).abs().max() <= TOLERANCE
    assert not found["scores"][..., 2].any()
    assert found["scores"][..., 3].isnan().all()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: ask("knockout", INPUTS["image"]),
            UnsupportedError,
            "the mode 'knockout' is not supported here",
        ),
        (lambda: ask("sound", INPUTS["image"]), ValueError, "unknown mode 'sound': choose image, text, both"),
        (lambda: flow(block_name="vision_model"), UnsupportedError, "the block 'vision_model'"),
        (lambda: flow(block_name="encoder"), ValueError, "unknown block_name 'encoder'"),
        (lambda: flow(kind="embed"), UnsupportedError, "patching 'text_encoder.encoder.layer.0.embed'"),
        (lambda: flow(kind="intermediate"), UnsupportedError, "patching"),
        (lambda: flow(kind="output", attn_head=1), UnsupportedError, "a head of '.*output'"),
        (lambda: flow(attn_head=1), UnsupportedError, "a head of"),
        (lambda: flow(kind="attention_block", attn_head=4), ValueError, "has no head 4: it has 4"),
        (lambda: flow(num_layers=5), ValueError, "text_encoder has no layer 4: it has 4"),
        (lambda: flow(start=4), ValueError, "a map of 9 tokens and 0 layers has no states"),
        (lambda: ask("image", (QUESTION, CLEAN, OTHER), (1, 2, 3)), ValueError, "not 3"),
        (
            lambda: ask("image", (QUESTION, CLEAN, OTHER), (1, 10**6)),
            ValueError,
            "outside the model's vocabulary",
        ),
        (lambda: ask("text", (CLEAN, QUESTION, QUESTION)), ValueError, "a token swap needs another question"),
        (lambda: ask("text", (CLEAN, QUESTION, "what is it")), UnsupportedError, "9 tokens against one of 5"),
        (lambda: ask("both", (QUESTION, CLEAN, OTHER)), ValueError, "takes None as constant_input"),
        (lambda: ask("image", (QUESTION, "gone.png", OTHER)), FileNotFoundError, "no image file"),
        (
            lambda: ask("image", INPUTS["image"], model=caption()),
            UnsupportedError,
            "BlipForQuestionAnswering",
        ),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)


def caption() -> tuple[Any, Any]:
    made = Tracer.from_pretrained(shipped_model("caption"))
    return made.model, made.processor


def ask(mode: str, inputs: Any, tokens: Any = None, model: Any = None) -> object:
    own = model or (tracer().model, tracer().processor)
    return notice.calculate_hidden_flow(*own, *inputs, tokens or answers(), mode, 0, LAYERS, "text_encoder")


def test_signatures_are_notice_s() -> None:
    inputs = "model processor constant_input clean_input corrupt_input answer_tokens mode"
    expected = {
        "trace_with_patch": f"{inputs} states_to_patch attn_head",
        "trace_important_states": f"{inputs} start num_layers block_name num kind attn_head",
        "calculate_hidden_flow": f"{inputs} start num_layers block_name kind attn_head",
        "debug_hidden_flow": "model processor df block_name kind start end mode attn_head image_tensors",
        "layername": "model num block_name kind",
        "get_incorrect_answers": "df",
        "parse_triplet": "triplet_str",
        "get_circuits": "scores",
    }
    for name, names in expected.items():
        assert list(inspect.signature(getattr(notice, name)).parameters) == names.split(), name
