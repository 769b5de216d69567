"""Other tools' calls with a model on a GPU: their numbers, and their tensors where the tool has them."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch
from pretended_gpu import Machine, OnGpu, pretended_gpu
from test_parity import TOLERANCE
from torch import Tensor
from transformers import BlipForQuestionAnswering, BlipProcessor

from blip_trace import TokenNoise, shipped_model
from blip_trace.scenes import random_scene

QUESTION = "what shape is at the bottom center"
TOKENS = 9
LOGITS = 10 * TOLERANCE
"""Of probabilities and of logits, which are about ten."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    with pretended_gpu(monkeypatch) as machine:
        yield machine


def model(device: str) -> Any:
    return BlipForQuestionAnswering.from_pretrained(shipped_model()).eval().to(device)


def processor() -> Any:
    return BlipProcessor.from_pretrained(shipped_model(), backend="pil")


def picture(seed: int) -> Any:
    return random_scene(Random(seed)).render(64)


def asked(seed: int, device: str) -> dict[str, Tensor]:
    """A picture and the question as a tool's user has them there."""
    made = processor()(picture(seed), QUESTION, return_tensors="pt")
    return {name: own.to(device) for name, own in made.items()}


def agree(there: Any, here: Any) -> None:
    here, there = torch.as_tensor(here), torch.as_tensor(there)
    assert float(here.max() - here.min()) > 100 * LOGITS
    torch.testing.assert_close(there, here, rtol=0, atol=LOGITS)


def test_palit(gpu: Machine) -> None:
    from blip_trace.compat.palit import ModelandProcessor, calculate_hidden_flow, customblip_temp

    def flow(device: str) -> Any:
        own = model(device)
        mt, clone = ModelandProcessor("blip-shapes", own, processor()), customblip_temp(own)
        generator = torch.Generator().manual_seed(2)
        return calculate_hidden_flow(
            mt, clone, picture(0), QUESTION, "text_encoder", faithful=True, generator=generator
        )["scores"]

    agree(flow("cuda"), flow("cpu"))


def test_notice(gpu: Machine) -> None:
    from blip_trace.compat.notice import calculate_head_flows

    words = [ids[1] for ids in processor()(text=["circle", "square"]).input_ids]

    def flows(device: str) -> Tensor:
        found = calculate_head_flows(
            model(device), processor(), QUESTION, picture(3), picture(4), words, "image", 0, 4,
            "text_encoder", "crossattention_block",
        )  # fmt: skip
        return torch.stack([torch.as_tensor(own["scores"])[..., 2] for own in found])

    agree(flows("cuda"), flows("cpu"))


def test_rome(gpu: Machine) -> None:
    from blip_trace.compat.rome import (
        ModelAndTokenizer,
        calculate_hidden_flow,
        collect_embedding_std,
        make_inputs,
        predict_from_input,
    )

    def flow(device: str) -> Any:
        mt = ModelAndTokenizer(model=model(device), tokenizer=processor())
        std = collect_embedding_std(mt, ["circle", "bottom center"])
        inputs = make_inputs(mt.processor, [QUESTION], device, image=picture(3))
        assert {own.device.type for own in inputs.values()} == {device}
        _, sure = predict_from_input(mt.model, inputs)
        return (
            calculate_hidden_flow(mt, QUESTION, "bottom center", noise=3 * std, image=picture(3))["scores"],
            float(sure[0]),
        )

    (there, sure_there), (here, sure_here) = flow("cuda"), flow("cpu")
    agree(there, here)
    assert sure_there == pytest.approx(sure_here, abs=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Module 'model.*:UserWarning")
def test_nnsight(gpu: Machine) -> None:
    from nnsight import NNsight

    from blip_trace.compat.nnsight import activation_patching

    def grid(device: str) -> Tensor:
        own = NNsight(model(device))
        start = {"decoder_input_ids": torch.full((1, 1), own.decoder_start_token_id, device=device)}
        clean, corrupted = (asked(seed, device) | start for seed in (3, 4))
        return activation_patching(own, clean, corrupted, own.text_encoder.encoder.layer)

    there = grid("cuda")
    assert isinstance(there, OnGpu)
    agree(there.numbers, grid("cpu"))


def test_pyvene(gpu: Machine) -> None:
    from pyvene.models.blip.modelings_blip import BlipWrapper

    from blip_trace.compat import pyvene as pv

    def grid(device: str) -> Tensor:
        own = BlipWrapper(model(device))
        configs = [
            pv.IntervenableConfig([pv.RepresentationConfig(layer, "block_output", "pos", 1)])
            for layer in range(4)
        ]
        locations = [{"sources->base": token} for token in range(TOKENS)]
        found = pv.interchange(own, configs, asked(4, device), [asked(3, device)], locations)
        return torch.stack([torch.stack([call[1]["decoder_logits"][0, -1] for call in row]) for row in found])

    there = grid("cuda")
    assert isinstance(there, OnGpu)
    agree(there.numbers, grid("cpu"))


def test_pyvene_s_own_call(gpu: Machine) -> None:
    """The base run too."""
    from pyvene.models.blip.modelings_blip import BlipWrapper

    from blip_trace.compat import pyvene as pv

    def call(device: str) -> list[Tensor]:
        config = pv.IntervenableConfig([pv.RepresentationConfig(2, "block_output", "pos", 1)])
        made = pv.IntervenableModel(config, BlipWrapper(model(device)))
        inputs = asked(4, device), [asked(3, device)], {"sources->base": 6}
        return [own["decoder_logits"] for own in made(*inputs, output_original_output=True)]

    there = call("cuda")
    assert all(isinstance(own, OnGpu) for own in there)
    for own, same in zip(there, call("cpu"), strict=True):
        agree(own.numbers, same)  # type: ignore[attr-defined]


def test_pyvene_around_the_model_itself(gpu: Machine) -> None:
    """Its outputs hold a loss and the image's embeddings."""
    from blip_trace.compat import pyvene as pv

    def call(device: str) -> list[Tensor]:
        own = model(device)
        config = pv.IntervenableConfig([pv.RepresentationConfig(2, "block_output", "pos", 1)])
        labels = {"labels": torch.tensor([[own.decoder_start_token_id, 12]]).to(device)}
        inputs = asked(4, device) | labels, [asked(3, device) | labels], {"sources->base": 6}
        found = pv.IntervenableModel(config, own)(*inputs, output_original_output=True)
        return [value for output in found for value in (output.loss, output.image_embeds)]

    there = call("cuda")
    assert all(isinstance(own, OnGpu) for own in there)
    for own, same in zip(there, call("cpu"), strict=True):
        torch.testing.assert_close(own.numbers, same, rtol=0, atol=LOGITS)  # type: ignore[attr-defined]


@pytest.mark.parametrize("stack", ["text_encoder", "text_decoder"])
@pytest.mark.parametrize("corrupted", ["another picture", "noise on the words"])
def test_transformer_lens(gpu: Machine, stack: str, corrupted: str) -> None:
    """A metric has logits, tokens and cached states where the model is."""
    from blip_trace.compat import transformer_lens as patching
    from blip_trace.compat.transformer_lens import HookedBlip

    def grid(device: str) -> Tensor:
        own, prepares = model(device), processor()
        noise = None if corrupted == "another picture" else TokenNoise("shape", samples=1)
        question = QUESTION if stack == "text_decoder" else None
        clean, other = (
            HookedBlip(
                own, picture(seed), stack=stack, question=question, corruption=made, processor=prepares
            )
            for seed, made in ((3, None), (4 if noise is None else 3, noise))
        )
        tokens = clean.to_tokens("" if question else QUESTION)
        assert tokens.device.type == clean.cfg.device.split(":")[0] == device
        logits, cache = clean.run_with_cache(tokens)
        best = logits[0, -1].argmax()

        def metric(found: Tensor) -> Tensor:
            return found[0, -1, best] - found[0, -1].mean()

        found = patching.get_act_patch_resid_mid(other, tokens, cache, metric)
        assert found.device.type == device
        return found

    there = grid("cuda")
    assert isinstance(there, OnGpu)
    agree(there.numbers, grid("cpu"))
