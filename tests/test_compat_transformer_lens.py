"""The functions of `blip_trace.compat.transformer_lens` give what TransformerLens's own of the same names do
on the same model object, which runs the unmodified Hugging Face model once for each index.

Batches, and how many passes they take, are in test_compat_transformer_lens_passes.py.
"""

from __future__ import annotations

import logging

import pandas as pd
import PIL.Image
import pytest
import torch
from torch import Tensor

from blip_trace import Tracer

real = pytest.importorskip("transformer_lens.patching")

from transformer_lens_helpers import (  # noqa: E402
    FLAT_HEADS,
    GRADED,
    LOGIT_TOLERANCE,
    PAIRS,
    TOLERANCE,
    assert_same,
    blip,
    both,
    check,
    generic,
    pair,
)

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HookedBlip  # noqa: E402

PRESETS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_out_all_pos")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("case", list(PAIRS)[:3])
def test_presets(case: str, preset: str) -> None:
    made = PAIRS[case]()
    theirs, found = both(f"get_act_patch_{preset}", made, made.metrics(), baseline=True)
    assert theirs.values.dim() == len(theirs.axis_names) + 1
    check(theirs, found, case in GRADED)


@pytest.mark.parametrize("case", list(PAIRS)[3:])
def test_pairs(case: str) -> None:
    """Runs that differ in anything, in every stack."""
    made = PAIRS[case]()
    cache, metrics = made.cache(), made.metrics()
    theirs, found = both("get_act_patch_block_every", made, metrics, cache, baseline=True)
    check(theirs, found, case in GRADED)
    if case not in FLAT_HEADS:
        check(*both("get_act_patch_attn_head_out_all_pos", made, metrics, cache), False)


@pytest.mark.parametrize(
    ("activation", "setter", "axes"),
    [
        ("resid_post", "layer_pos", ("layer", "pos")),
        ("resid_mid2", "layer_pos", ("layer", "pos")),
        ("cross_attn_out", "layer_pos", ("layer", "pos")),
        ("cross_attn_z", "layer_pos_head_vector", ("layer", "pos", "head")),
        ("cross_attn_z", "layer_head_vector", ("layer", "head_index")),
        ("z", "layer_pos", ("layer", "dest_pos")),
        ("z", "layer_head_vector", ("layer", "head")),
    ],
)
def test_any_site(activation: str, setter: str, axes: tuple[str, ...]) -> None:
    """Everything in the table of hooks that has a site; of heads also all of a position together."""
    made = PAIRS["noise on the picture"]()
    how = getattr(real, f"{setter}_patch_setter"), activation, axes
    check(*generic(made, made.cache(), made.metrics(), *how), True)


def test_frames_of_indices() -> None:
    made = PAIRS["another question"]()
    cache, metric = made.cache(), made.metrics()["difference"]
    how = real.layer_pos_patch_setter, "resid_pre"
    (values, frame), (found, own) = generic(made, cache, metric, *how, ("layer", "pos"), None, True)
    pd.testing.assert_frame_equal(own, frame)
    assert (found - values).abs().max() <= LOGIT_TOLERANCE
    wanted = pd.DataFrame([[3, -2], [0, 5], [0, 5], [0, 4], [1, -1]], columns=["layer", "pos"])
    (values, frame), (found, own) = generic(made, cache, metric, *how, index_df=wanted, return_index_df=True)
    assert own is frame is wanted
    assert found.shape == (5,)
    assert found.dtype == torch.float32
    assert (found - values).abs().max() <= LOGIT_TOLERANCE
    assert values.max() - values.min() >= 100 * LOGIT_TOLERANCE
    assert_same(*generic(made, cache, metric, *how, index_df=wanted, baseline=True))


def test_plain_tensors() -> None:
    """As most metrics are written: one function, one number, a tensor of the axes."""
    made = PAIRS["noise on the picture"]()
    cache = made.cache()
    for metric in (made.metrics()["probability"], made.metrics()["log_probability"]):
        for preset in ("get_act_patch_block_every", "get_act_patch_resid_mid"):
            values, found = both(preset, made, metric, cache)
            assert found.dtype == values.dtype == torch.float32
            assert found.shape == values.shape
            assert (found - values).abs().max() <= TOLERANCE
            assert values.max() - values.min() >= 100 * TOLERANCE


@pytest.mark.parametrize("preset", ["all_pos_every", "by_pos_every"])
def test_heads_of_every_kind(
    tiny_tracer: Tracer, picture: PIL.Image.Image, preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no site is done by forward passes, which a warning says."""
    models = HookedBlip(tiny_tracer, picture), HookedBlip(tiny_tracer, picture.rotate(90))
    made = pair(*models, "what color is the red", "what shape is the blue")
    metric = {"logit": lambda logits: logits[0, -1, 11]}
    with caplog.at_level(logging.WARNING, "blip_trace"):
        theirs, found = both(f"get_act_patch_attn_head_{preset}", made, metric, baseline=True)
    assert_same(theirs, found)
    spreads = theirs.values[0].flatten(1).amax(1) - theirs.values[0].flatten(1).amin(1)
    assert spreads.min() >= 100 * LOGIT_TOLERANCE
    said = [
        record.getMessage().split()[0] for record in caplog.records if record.name.startswith("blip_trace")
    ]
    assert said == ["q", "k", "v", "pattern"]
    values, found = both(f"get_act_patch_attn_head_{preset}", made, metric["logit"])
    assert (found - values).abs().max() <= LOGIT_TOLERANCE


def test_metrics_own_their_logits() -> None:
    """They may change them; and all of it may run in inference mode."""
    made = PAIRS["another picture"]()
    frame = pd.DataFrame([[3, 6], [3, 6], [1, 2]], columns=["layer", "pos"])

    def metric(logits: Tensor) -> Tensor:
        logits[0, -1] += 1
        return logits[0, -1, 25]

    how = real.layer_pos_patch_setter, "mlp_out"
    for mode in (False, True):
        with torch.inference_mode(mode):
            theirs, found = generic(made, made.cache(), metric, *how, index_df=frame, baseline=True)
        assert_same(theirs, found)
        assert theirs.values[0] == theirs.values[1]
        assert (theirs.values[0] - theirs.values[2]).abs() >= 100 * LOGIT_TOLERANCE


def test_nothing_differs() -> None:
    made = pair(blip(), blip())
    found = ours.get_act_patch_block_every(
        made.corrupted, made.tokens, made.cache(), made.metrics()["probability"]
    )
    assert (found - found[0, 0, 0]).abs().max() <= TOLERANCE
