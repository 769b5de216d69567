"""The BLIP causal-tracing notebooks' own loop against the drop-in for their functions, on the shipped model.

The loop does for every cell what the notebooks do: prepares and encodes the image twice, draws noise, and
runs a batch of a clean and a corrupted row with hooks; it draws one sample of the noise. The drop-in does a
whole map: mended (ten samples of a common noise), with one sample, and faithful (noise redrawn for every
cell). It would find the image encoded from one round to the next, and is made to forget it.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from bench_trace import interleave
from conftest import Gate
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import hooks
from blip_trace.compat import palit
from blip_trace.compat.models import tracer_of
from blip_trace.lowering.load import shipped_model
from blip_trace.scenes import random_scene

IMAGE = random_scene(Random(0)).render(64)
QUESTION = "what shape is at the top left"
WAYS: dict[str, dict[str, Any]] = {
    "ten samples": {},
    "one sample": {"samples": 1},
    "faithful": {"faithful": True},
}


@cache
def pair() -> tuple[palit.ModelandProcessor, palit.customblip_temp]:
    mt = palit.ModelandProcessor(str(shipped_model()))
    return mt, palit.customblip_temp(mt.model)


def run(model: BlipForQuestionAnswering, processor: Any, patch: tuple[str, int, int] | None) -> Tensor:
    """One run of the notebooks' loop: the probabilities [V] of the corrupted row with the state of this
    (stack, layer, token) put back."""
    images = []
    for _ in range(2):
        pixels = processor(images=IMAGE, return_tensors="pt").pixel_values
        images.append(model.vision_model(pixel_values=pixels).last_hidden_state)
    states = torch.cat(images)
    states[1] *= torch.normal(1.0, 5.0, states.shape[1:])
    ids = processor(text=QUESTION, return_tensors="pt").input_ids
    edits: dict[torch.nn.Module, hooks.Edit] = {}
    if patch is not None:
        stack, layer, token = patch

        def restore(output: Tensor) -> Tensor:
            output[1:, token] = output[0, token]
            return output

        edits[hooks.site_module(model, stack, layer, "hidden")] = restore
    with hooks.editing(edits):
        question = model.text_encoder(input_ids=ids.expand(2, -1), encoder_hidden_states=states)
        start = torch.full((2, 1), model.decoder_start_token_id)
        logits = model.text_decoder(
            input_ids=start, encoder_hidden_states=question.last_hidden_state, use_cache=False
        ).logits
    return logits[1, -1].softmax(-1)


@pytest.mark.parametrize("block", ["text_encoder", "text_decoder"])
@pytest.mark.parametrize("way", WAYS)
def test_map(benchmark: Any, gate: Gate, quick: bool, way: str, block: str) -> None:
    mt, new_model = pair()
    tracer = tracer_of(mt.model, mt.processor)
    layers = range(mt.num_layers)
    tokens = len(mt.processor(text=QUESTION).input_ids) if block == "text_encoder" else 1

    def loop() -> None:
        """A map: the clean run, the low score, and a run for every cell."""
        for patch in (None, None, *((block, layer, token) for token in range(tokens) for layer in layers)):
            run(mt.model, mt.processor, patch)

    def ours() -> None:
        tracer.forget_images()
        palit.calculate_hidden_flow(mt, new_model, IMAGE, QUESTION, block, **WAYS[way])

    taken, others = interleave(benchmark, 3 if quick else 15, ours, {"loop": loop})
    gate({f"palit, {block}, {way}: the notebooks' loop": others["loop"] / taken})
