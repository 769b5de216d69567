"""Batches of `blip_trace.compat.transformer_lens` (prompts, pictures and samples of their own) give what
TransformerLens's functions do, and all indices of one take a pass or two of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from random import Random
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from blip_trace import GaussianNoise, Tracer
from blip_trace.scenes import random_scene

real = pytest.importorskip("transformer_lens.patching")

from transformer_lens_helpers import (  # noqa: E402
    LOGIT_TOLERANCE,
    OTHER,
    PAIRS,
    QUESTION,
    Pair,
    assert_same,
    blip,
    both,
    pair,
    pictures,
    tracer,
)

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HookedBlip  # noqa: E402
from blip_trace.compat.transformer_lens import replay as tl_replay  # noqa: E402


def rows(count: int) -> list[PIL.Image.Image]:
    return [random_scene(Random(seed)).render(64) for seed in range(count)]


def batch_metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 25] - logits[:, -1, 46]


def test_batches_of_prompts() -> None:
    """Pictures and questions of their own; a pass for each prompt."""
    images = rows(3)
    questions = [QUESTION, "what shape is the red", QUESTION]
    others = [OTHER, "what shape is the blue", QUESTION]
    clean, corrupted = HookedBlip(tracer(), images), HookedBlip(tracer(), images[::-1])
    made = Pair(clean, clean.to_tokens(questions), corrupted, corrupted.to_tokens(others))
    assert made.clean(made.clean_tokens).shape[:2] == (3, 1)
    cache = made.cache()
    for index, given in enumerate(({"reduce": "none", "baseline": True}, {"reduce": "mean"})):
        theirs, found = both("get_act_patch_block_every", made, batch_metric, cache, **given)
        if index:
            assert (found - theirs).abs().max() <= LOGIT_TOLERANCE
            continue
        assert_same(theirs, found)
        assert theirs.values.shape[-1] == 3
        values = theirs.values.flatten(0, 2)
        assert (values.amax(0) - values.amin(0)).min() >= 100 * LOGIT_TOLERANCE
        assert (found.stderr() - theirs.stderr()).abs().max() <= LOGIT_TOLERANCE
        assert (found.effect() - theirs.effect()).abs().max() <= LOGIT_TOLERANCE


def test_a_sample_of_noise_for_each_row() -> None:
    """All in one pass; the clean run of one row goes into all of them."""
    noise = GaussianNoise(0.0, 2.0, "add", samples=3)
    made = pair(blip(), blip(corruption=noise))
    made = made._replace(tokens=made.tokens.expand(3, -1))
    low = made.corrupted(made.tokens)
    assert (low[0] - low[1]).abs().max() > 1e-2
    theirs, found = both("get_act_patch_resid_mid", made, batch_metric, reduce="none", baseline=True)
    assert_same(theirs, found)
    values = theirs.values.flatten(0, 1)
    assert (values.amax(0) - values.amin(0)).min() >= 100 * LOGIT_TOLERANCE
    with counted(made.corrupted) as calls:
        both_ways = partial(batch_metric)
        ours.get_act_patch_resid_mid(made.corrupted, made.tokens, made.cache(), both_ways, reduce="mean")
    assert calls == {"engine": 1, "model": 1}  # the model's is that of the cache


def test_other_batches() -> None:
    """Two clean runs for four rows, not in their order; samples of noise into a clean run; one clean run for
    several pictures; questions of a decoder."""
    noisy = pair(blip(corruption=GaussianNoise(0.0, 2.0, "add", samples=3)), blip(), other=OTHER)
    pictured = pair(blip(), HookedBlip(tracer(), rows(3)))
    questions = ["square", "cross", "circle", "triangle"]
    asked = [
        HookedBlip(
            tracer(), rows(3), stack="text_decoder", question=[f"where is the {name}" for name in names]
        )
        for names in (questions[:3], questions[1:])
    ]
    said = asked[0].to_tokens(["top left", "bottom right", "top left"])
    first, second = (blip().to_tokens(text) for text in (QUESTION, OTHER))
    for made in (
        Pair(
            blip(),
            torch.cat((first, second, second, first)),
            HookedBlip(tracer(), [*rows(3), pictures()[1]]),
            torch.cat((first, first, second, second)),
        ),
        noisy._replace(clean_tokens=noisy.clean_tokens.expand(3, -1), tokens=noisy.tokens.expand(3, -1)),
        pictured._replace(tokens=pictured.tokens.expand(3, -1)),
        Pair(asked[0], said, asked[1], said),
    ):
        theirs, found = both("get_act_patch_block_every", made, batch_metric, reduce="none", baseline=True)
        assert_same(theirs, found)
        values = theirs.values.flatten(0, 2)
        assert (values.amax(0) - values.amin(0)).amax() >= 100 * LOGIT_TOLERANCE


@contextmanager
def counted(model: HookedBlip) -> Iterator[dict[str, int]]:
    """How often the engine, and the text encoder of the Hugging Face model, are called inside."""
    calls = {"engine": 0, "model": 0}
    engine = Tracer.logits

    def count(name: str) -> None:
        calls[name] += 1

    def logits(*given: Any, **more: Any) -> Any:
        count("engine")
        return engine(*given, **more)

    handle = model.original_model.text_encoder.register_forward_pre_hook(lambda *_: count("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracer, "logits", logits)
        yield calls
    handle.remove()


def test_one_pass() -> None:
    """For all indices, of three presets together too; where words differ, another one for embeddings."""
    for case, passes in (("another picture", 1), ("another question", 2)):
        made = PAIRS[case]()
        cache, metrics = made.cache(), made.metrics()
        for preset in ("block_every", "resid_pre", "attn_head_out_by_pos"):
            with counted(made.corrupted) as calls:
                getattr(ours, f"get_act_patch_{preset}")(made.corrupted, made.tokens, cache, metrics)
            assert calls == {"engine": 1 if "head" in preset else passes, "model": 0}


def test_passes_are_split_where_logits_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    made = PAIRS["another question"]()
    cache, metric = made.cache(), made.metrics()["difference"]
    run = partial(ours.get_act_patch_block_every, made.corrupted, made.tokens, cache, metric, baseline=True)
    whole = run()
    monkeypatch.setattr(tl_replay, "HELD_BYTES", 20 * 4 * 51)
    with counted(made.corrupted) as calls:
        parts = run()
    assert calls["engine"] > 4
    assert_same(whole, parts)
