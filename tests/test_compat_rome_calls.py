"""ROME's functions: what they take, in which order, and what they refuse."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compat_rome import IMAGE, QUESTION, SUBJECT, batch, mt

from blip_trace import Tracer, shipped_model
from blip_trace.compat import rome
from blip_trace.compat.models import UnsupportedError


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: flow(kind="mpl"), ValueError, "unknown kind 'mpl'"),
        (lambda: flow(samples=0), ValueError, "samples must be a whole number of at least 1"),
        (lambda: flow(kind="mlp", window=0), ValueError, "window must be a whole number"),
        (lambda: flow(noise="s3"), TypeError, "noise must be a number or callable, not 's3': `noise_of`"),
        (lambda: flow(noise=lambda x: x[:1]), ValueError, r"noise must be a tensor \[10, 2, 128\]"),
        (lambda: flow(noise=float("nan")), ValueError, "NaN or infinite"),
        (lambda: flow(image="nowhere.png"), FileNotFoundError, "no image file"),
        (
            lambda: rome.calculate_hidden_flow(mt(), QUESTION, "star", image=IMAGE),
            ValueError,
            "does not occur",
        ),
        (lambda: patch(trace_layers=["x"]), UnsupportedError, "trace_layers is not supported here"),
        (lambda: patch(answers_t=torch.tensor([1, 2])), UnsupportedError, "several answers at once"),
        (lambda: patch(tokens_to_mix=(3, 20)), ValueError, "not within the question's 9 tokens"),
        (lambda: patch(states_to_patch=[(0, rome.layername(None, 4))]), ValueError, "has no layer 4"),
        (lambda: patch(states_to_patch=[(9, rome.layername(None, 0))]), ValueError, "has no token 9"),
        (lambda: patch(states_to_patch=[(0, rome.layername(None, 0, "embed"))]), UnsupportedError, "hook it"),
        (lambda: patch(states_to_patch=[(0, "vision_model.encoder.layers.0")]), UnsupportedError, "hook it"),
        (lambda: patch(inp={"input_ids": torch.ones(2, 3)}), ValueError, "the batch has no pixel_values"),
        (lambda: patch(inp=batch(0)), ValueError, "of at least 2 rows"),
        (lambda: patch(inp={**batch(1), "attention_mask": torch.zeros(2, 9)}), UnsupportedError, "padding"),
        (lambda: inputs([QUESTION, "where is it"]), UnsupportedError, "prompts of unequal length"),
        (lambda: inputs([QUESTION], device="cuda"), ValueError, "there is no device 'cuda'"),
        (lambda: inputs([]), ValueError, "no prompts given"),
        (lambda: inputs([QUESTION], tokenizer=mt().tokenizer), ValueError, "given as pixel_values"),
        (lambda: rome.ModelAndTokenizer(), ValueError, "the name of a model"),
        (lambda: rome.ModelAndTokenizer(model=mt().model, tokenizer=mt().tokenizer), TypeError, "processor"),
        (
            lambda: rome.ModelAndTokenizer(shipped_model("caption")),
            UnsupportedError,
            "BlipForQuestionAnswering",
        ),
        (
            lambda: rome.ModelAndTokenizer(shipped_model("match")),
            UnsupportedError,
            "BlipForQuestionAnswering",
        ),
        (
            lambda: rome.ModelAndTokenizer(shipped_model(), torch_dtype=torch.float16),
            ValueError,
            "unknown dtype",
        ),
    ],
)
def test_refusals(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as raised:
        call()
    assert "\n" not in str(raised.value)


def flow(**given: Any) -> object:
    return rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, **{"image": IMAGE, **given})


def patch(**given: Any) -> object:
    usual = {"inp": batch(), "states_to_patch": [], "answers_t": 5, "tokens_to_mix": (6, 8)}
    return rome.trace_with_patch(mt().model, **{**usual, **given})


def inputs(prompts: list[str], tokenizer: Any = None, **given: Any) -> object:
    return rome.make_inputs(tokenizer or mt().processor, prompts, image=IMAGE, **given)


def test_signatures_begin_as_rome_s_do() -> None:
    """Names and order; what is added can only be given by name."""
    expected = {
        "calculate_hidden_flow": "mt prompt subject samples noise token_range uniform_noise replace window "
        "kind expect",
        "trace_with_patch": "model inp states_to_patch answers_t tokens_to_mix noise uniform_noise replace "
        "trace_layers",
        "trace_with_repatch": "model inp states_to_patch states_to_unpatch answers_t tokens_to_mix noise "
        "uniform_noise",
        "trace_important_states": "model num_layers inp e_range answer_t noise uniform_noise replace "
        "token_range",
        "trace_important_window": "model num_layers inp e_range answer_t kind window noise uniform_noise "
        "replace token_range",
        "plot_hidden_flow": "mt prompt subject samples noise uniform_noise window kind savepdf",
        "plot_trace_heatmap": "result savepdf title xlabel modelname",
        "plot_all_flow": "mt prompt subject",
        "layername": "model num kind",
        "guess_subject": "prompt",
        "make_inputs": "tokenizer prompts device",
        "decode_tokens": "tokenizer token_array",
        "find_token_range": "tokenizer token_array substring",
        "predict_token": "mt prompts return_p",
        "predict_from_input": "model inp",
        "collect_embedding_std": "mt subjects",
        "collect_embedding_gaussian": "mt",
        "collect_embedding_tdist": "mt degree",
        "ModelAndTokenizer": "model_name model tokenizer low_cpu_mem_usage torch_dtype",
    }
    for name, names_ in expected.items():
        parameters = inspect.signature(getattr(rome, name)).parameters.values()
        positional = [own.name for own in parameters if own.kind is own.POSITIONAL_OR_KEYWORD]
        assert positional == names_.split(), name


def test_a_model_and_its_processor() -> None:
    own = mt()
    assert own.num_layers == 4
    assert own.layer_names == [f"text_encoder.encoder.layer.{layer}" for layer in range(4)]
    assert re.fullmatch(r"ModelAndTokenizer\(BlipForQuestionAnswering of 4 layers, \w+\)", repr(own))
    for name in own.layer_names + [rome.layername(own.model, 2, kind) for kind in ("mlp", "attn", "embed")]:
        own.model.get_submodule(name)
    other = rome.ModelAndTokenizer(model=own.model, tokenizer=own.processor)
    assert other.model is own.model
    assert other.tokenizer is own.tokenizer
    pixels = batch()["pixel_values"][:1]
    given = rome.make_inputs(own.tokenizer, [QUESTION], image=pixels)
    assert torch.equal(given["pixel_values"], pixels)
    assert rome.predict_token(own, [QUESTION], image=pixels) == ["circle"]


def test_the_picture_may_be_a_path(tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "a.png")
    one, other = (
        rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, samples=2, image=image)
        for image in (IMAGE, tmp_path / "a.png")
    )
    assert torch.equal(one["scores"], other["scores"])


def test_one_pass_for_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    restore = Tracer.restore
    monkeypatch.setattr(Tracer, "restore", lambda *args, **given: calls.append(1) or restore(*args, **given))
    rome.calculate_hidden_flow(mt(), QUESTION, SUBJECT, kind="mlp", image=IMAGE)
    assert len(calls) == 1
