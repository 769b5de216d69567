"""What the notebooks' functions refuse, in one sentence each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compat_palit import IMAGE, QUESTION, pair
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from blip_trace.compat import palit
from blip_trace.compat.models import UnsupportedError
from blip_trace.compat.palit import attention


def flow_of(**options: Any) -> Any:
    return palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", **options)


def patch(*patches: Any, **options: Any) -> Any:
    return palit.trace_with_patch(*pair(), IMAGE, QUESTION, 5, list(patches), **options)


def states_of(start: int, end: int, num: int | None = None, **options: Any) -> Any:
    return palit.trace_important_states(
        *pair(), start, end, "text_encoder", IMAGE, QUESTION, 5, num, **options
    )


def rows() -> Tensor:
    return torch.ones(2, 65, 128)


FEW = torch.Generator
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a notebook": (lambda: flow_of(notebook="third"), ValueError, "unknown notebook 'third'"),
    "faithful": (lambda: flow_of(faithful=1), TypeError, "faithful is True or False, not 1"),
    "no samples": (lambda: flow_of(samples=0), ValueError, "samples must be a whole number of at least 1"),
    "faithful samples": (lambda: flow_of(faithful=True, samples=3), ValueError, "samples is of the noise"),
    "a faithful seed": (lambda: flow_of(faithful=True, seed=3), ValueError, "seed is of the noise"),
    "samples of a factor": (
        lambda: flow_of(notebook="attention", samples=3),
        ValueError,
        "multiplies by a constant",
    ),
    "a generator": (lambda: flow_of(generator=FEW()), ValueError, "a generator is for faithful=True"),
    "a generator for a factor": (
        lambda: flow_of(notebook="attention", faithful=True, generator=FEW()),
        ValueError,
        "a generator is for faithful=True in the main notebook",
    ),
    "no generator": (lambda: flow_of(faithful=True, generator=3), TypeError, "a torch.Generator, not int"),
    "an option": (lambda: flow_of(sample=3), TypeError, "sample"),
    "a block": (
        lambda: palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "vision"),
        ValueError,
        "unknown block_name 'vision': choose among text_encoder, text_decoder",
    ),
    "a kind": (lambda: flow_of(kind="mlp"), ValueError, "unknown kind 'mlp': choose among None, attention"),
    "a faithful kind of the main notebook": (
        lambda: flow_of(kind="attention", faithful=True),
        UnsupportedError,
        "kind 'attention' of the text_encoder in the main notebook is not supported here: the notebook",
    ),
    "a faithful kind of the decoder": (
        lambda: attention.calculate_hidden_flow(
            *pair(), IMAGE, QUESTION, "text_decoder", "attention", faithful=True
        ),
        UnsupportedError,
        "of the text_decoder in the attention notebook",
    ),
    "a faithful mlp": (
        lambda: flow_of(kind="output.dense", notebook="attention", faithful=True),
        UnsupportedError,
        "kind 'output.dense'",
    ),
    "expect": (lambda: flow_of(expect=["circle"]), TypeError, "expect is an answer or None, not list"),
    "replace": (lambda: patch(replace=True), UnsupportedError, "replace=True is not supported here"),
    "replaced states": (lambda: states_of(0, 4, replace=True), UnsupportedError, "replace=True"),
    "trace_layers": (lambda: patch(trace_layers=["x"]), UnsupportedError, r"trace_layers=\['x'\]"),
    "no pair": (
        lambda: patch("model_text_enc.encoder.layer.1"),
        TypeError,
        "holds .token, layer name. pairs",
    ),
    "no such module": (lambda: patch((0, "encoder.layer.1")), ValueError, "no module 'encoder.layer.1'"),
    "no such layer": (
        lambda: patch((0, "model_text_enc.encoder.layer.4")),
        ValueError,
        r"text_encoder has no layer 4: it has 4 \(0 to 3\)",
    ),
    "no such token": (
        lambda: patch((9, "model_text_enc.encoder.layer.1")),
        ValueError,
        "text_encoder has no token 9",
    ),
    "far before the first": (
        lambda: patch((-10, "model_text_enc.encoder.layer.1")),
        ValueError,
        "text_encoder has no token -10",
    ),
    "no second decoder token": (
        lambda: patch((1, "model_text_dec.bert.encoder.layer.1")),
        ValueError,
        "text_decoder has no token 1",
    ),
    "a query": (
        lambda: patch((0, "model_text_enc.encoder.layer.1.attention.self.query")),
        UnsupportedError,
        "restoring the output of model_text_enc.encoder.layer.1.attention.self.query is not supported",
    ),
    "the image encoder": (
        lambda: patch((0, "model_vis.encoder.layers.1")),
        UnsupportedError,
        "the notebooks corrupt what it puts out",
    ),
    "logits": (
        lambda: patch((0, "model_text_dec.cls.predictions.decoder")),
        UnsupportedError,
        "restore a layer",
    ),
    "an answer": (
        lambda: palit.trace_with_patch(*pair(), IMAGE, QUESTION, "circle", []),
        TypeError,
        "pred_ans must be one token id, not 'circle'",
    ),
    "answers": (
        lambda: palit.trace_with_patch(*pair(), IMAGE, QUESTION, torch.tensor([1, 2]), []),
        TypeError,
        "pred_ans must be one token id",
    ),
    "an unknown answer": (
        lambda: palit.trace_with_patch(*pair(), IMAGE, QUESTION, 51, []),
        ValueError,
        "token id 51 is outside",
    ),
    "too many tokens": (lambda: states_of(0, 4, 10), ValueError, "text_encoder has no token 9"),
    "too many layers": (lambda: states_of(0, 12), ValueError, "text_encoder has no layer 4"),
    "layers before the first": (lambda: states_of(-1, 4), ValueError, "layers -1 up to 4"),
    "no layers": (lambda: states_of(4, 4), ValueError, "no cells to trace: 9 tokens, layers 4 up to 4"),
    "no tokens": (lambda: states_of(0, 4, 0), ValueError, "no cells to trace: 0 tokens"),
    "a window": (
        lambda: palit.trace_important_window(
            *pair(), 0, 4, "text_encoder", IMAGE, QUESTION, 5, "attention", 0
        ),
        ValueError,
        "window must be a whole number of layers",
    ),
    "a layer's block": (lambda: palit.layername(None, 0, "vision"), ValueError, "unknown block_name"),
    "another mt": (
        lambda: palit.calculate_hidden_flow(None, pair()[1], IMAGE, QUESTION, "text_encoder"),
        TypeError,
        "mt must be a ModelandProcessor of this module, not NoneType",
    ),
    "another new_model": (
        lambda: palit.calculate_hidden_flow(pair()[0], pair()[0].model, IMAGE, QUESTION, "text_encoder"),
        TypeError,
        "new_model must be a customblip_temp of this module, not BlipForQuestionAnswering",
    ),
    "neither": (lambda: palit.ModelandProcessor(), ValueError, "give a model and its processor"),
    "no processor": (
        lambda: palit.ModelandProcessor(None, pair()[0].model),
        ValueError,
        "give a model and its processor",
    ),
    "an empty question": (
        lambda: palit.calculate_hidden_flow(*pair(), IMAGE, " ", "text_encoder"),
        ValueError,
        "the question is empty",
    ),
    "no pixels": (lambda: pair()[1].image_embed([]), ValueError, "no pixel_values given"),
    "attentions of the image": (
        lambda: pair()[1].image_embed([torch.zeros(1, 3, 64, 64)], True),
        UnsupportedError,
        "output_attentions=True",
    ),
    "attentions": (
        lambda: pair()[1](torch.tensor([[2, 3]]), rows(), output_attentions=True),
        UnsupportedError,
        "output_attentions=True",
    ),
    "no embeddings": (lambda: pair()[1](torch.tensor([[2, 3]])), ValueError, "image_embeds are missing"),
    "padding": (
        lambda: pair()[1](torch.tensor([[2, 3]]), rows(), torch.tensor([[1, 0]])),
        UnsupportedError,
        "a padded question",
    ),
    "three rows": (lambda: palit.noisy_embedding(torch.ones(3, 5, 4)), ValueError, r"not \[3, 5, 4\]"),
    "no tensor": (lambda: attention.noisy_embedding([1]), TypeError, "are a tensor, not list"),
    "a share": (
        lambda: palit.noisy_embedding(rows(), 5, 0.5),
        UnsupportedError,
        "percentage_dimensions=0.5",
    ),
    "a share of the attention notebook": (
        lambda: attention.noisy_embedding(rows(), percentage_dimensions=0.5),
        UnsupportedError,
        "percentage_dimensions=0.5",
    ),
    "uniform noise": (
        lambda: attention.noisy_embedding(rows(), False),
        UnsupportedError,
        "uniform_noise=False",
    ),
    "a subject": (
        lambda: palit.plot_all_flow(*pair(), IMAGE, QUESTION, None, "shape"),
        UnsupportedError,
        "subject='shape'",
    ),
    "a subject of kinds": (
        lambda: attention.plotkind_all_flow(*pair(), IMAGE, QUESTION, None, "shape"),
        UnsupportedError,
        "subject='shape'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(tiny_folder: Path) -> None:
    captioner = BlipForConditionalGeneration(BlipConfig.from_pretrained(tiny_folder))
    for make in (palit.customblip_temp, lambda model: palit.ModelandProcessor(None, model, "processor")):
        with pytest.raises(
            TypeError, match="trace a BlipForQuestionAnswering, not BlipForConditionalGeneration"
        ):
            make(captioner)


def test_exchanged_parts_are_refused() -> None:
    mt = pair()[0]
    new_model = palit.customblip_temp(mt.model)
    new_model.model_text_enc = copy.deepcopy(mt.model.text_encoder)
    with pytest.raises(ValueError, match="a part of new_model was exchanged"):
        palit.calculate_hidden_flow(mt, new_model, IMAGE, QUESTION, "text_encoder")
