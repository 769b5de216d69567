"""TransformerLens's own patching functions against those of the same names here, on the same model objects.

The pictures are encoded already for both: the library's own way is a forward pass of the text stacks for each
index. On the small shipped model it is timed whole, at BLIP-VQA-base size (random weights) on four indices of
the 108, and scaled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch
from bench_trace import interleave
from conftest import Gate
from subject import TOKENS, blip_base
from torch import Tensor
from transformer_lens import patching

from blip_trace import Tracer, shipped_model
from blip_trace.compat import transformer_lens as ours
from blip_trace.scenes import COLORS, Scene, random_scene

QUESTION = "what is the color of the square"
SOME = pd.DataFrame([[2, 3], [5, 4], [8, 5], [11, 1]], columns=["layer", "pos"])


def calls(tracer: Tracer, images: Sequence[Any], tokens: Tensor, answer: int) -> tuple[Any, Any]:
    """The library's presets and ours, by name, of one pair of pictures."""
    clean, corrupted = (ours.HookedBlip(tracer, image) for image in images)
    _, cache = clean.run_with_cache(tokens)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1].log_softmax(-1)[answer]

    def preset(library: Any, name: str, **given: Any) -> Callable[[], Any]:
        function = getattr(library, f"get_act_patch_{name}")
        return partial(function, corrupted, tokens, cache, metric, **given)

    return partial(preset, patching), partial(preset, ours)


@pytest.mark.parametrize("preset", ["resid_mid", "attn_head_out_by_pos", "block_every"])
def test_shipped_model(benchmark: Any, gate: Gate, quick: bool, preset: str) -> None:
    tracer = Tracer.from_pretrained(shipped_model())
    scene, colors = random_scene(Random(41)), list(COLORS)
    objects = (
        dataclasses.replace(each, color=colors[colors.index(each.color) - 1]) for each in scene.objects
    )
    images = [made.render(64) for made in (scene, Scene(tuple(objects), scene.background))]
    (answer,) = tracer.inputs.known_ids("green")
    tokens = tracer.inputs.question_ids(QUESTION)[None]
    theirs, own = calls(tracer, images, tokens, answer)
    seconds, taken = interleave(benchmark, 1 if quick else 3, own(preset), {"loop": theirs(preset)})
    gate({f"transformer_lens, shipped model, {preset}: its own loop": taken["loop"] / seconds})


def test_base(benchmark: Any, gate: Gate, quick: bool) -> None:
    tracer = Tracer(blip_base("float32"))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 1, 3, 384, 384, generator=generator)
    tokens = torch.randint(5, 30000, (1, TOKENS), generator=generator)
    theirs, own = calls(tracer, images, tokens, answer=7)
    some = theirs("resid_mid", index_df=SOME, index_axis_names=None)
    seconds, taken = interleave(benchmark, 1 if quick else 3, own("resid_mid"), {"loop": some})
    cells = 12 * TOKENS / len(SOME)
    gate({"transformer_lens, base float32, resid_mid: its own loop": taken["loop"] * cells / seconds})
