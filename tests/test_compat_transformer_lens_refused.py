"""What `blip_trace.compat.transformer_lens` refuses, each in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from blip_trace import GaussianNoise
from blip_trace.compat.models import UnsupportedError

real = pytest.importorskip("transformer_lens.patching")

from transformer_lens_helpers import (  # noqa: E402
    NOISE,
    OTHER,
    QUESTION,
    WORD_NOISE,
    Pair,
    blip,
    decoder,
    green,
    pair,
    pictures,
    tracer,
)

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HookedBlip  # noqa: E402


def call(made: Pair, name: str = "get_act_patch_resid_mid", cache: Any = None, **given: Any) -> Any:
    cache = made.cache() if cache is None else cache
    return getattr(ours, name)(made.corrupted, made.tokens, cache, green, **given)


NO_SITES = [
    name
    for name in dir(real)
    if name.startswith("get_act_patch_attn_head_") and not name.endswith("every") and "_out_" not in name
]


@pytest.mark.parametrize("name", NO_SITES)
def test_presets_that_are_no_sites(name: str) -> None:
    assert len(NO_SITES) == 9
    made = pair(blip(), blip(1))
    with pytest.raises(UnsupportedError, match=r"patching '(q|k|v|pattern)'.*transformer_lens\.patching"):
        call(made, name)


def own_setter(corrupted: Tensor, index: list[int], clean: Tensor) -> Tensor:
    return corrupted


def sweep(made: Pair, setter: Any, activation: str, axes: Any = ("layer", "pos"), **given: Any) -> Any:
    """`generic_activation_patch` of this."""
    metric = given.pop("metric", green)
    cache = given.pop("cache", None) or made.cache()
    return ours.generic_activation_patch(
        made.corrupted, made.tokens, cache, metric, setter, activation, axes, **given
    )


def changed_cache(made: Pair) -> Any:
    cache = made.cache()
    cache["resid_mid", 1][:, 2] = 0
    return cache


def exchanged_cache(made: Pair) -> Any:
    cache = made.cache()
    cache.cache_dict["blocks.0.hook_resid_mid"] = cache["resid_mid", 1]
    return cache


def no_text() -> Pair:
    """A word's ending without the word."""
    clean, _, corrupted, _ = decoder((QUESTION, QUESTION), 1, "")
    tokens = torch.tensor([[5, tracer().processor.tokenizer.vocab["##s"]]])
    return Pair(clean, tokens, corrupted, tokens)


BY_POS, HEADS = real.layer_pos_patch_setter, real.layer_head_vector_patch_setter
UNSUPPORTED: dict[str, tuple[Callable[[Pair], Any], str]] = {
    "a setter of one's own": (lambda made: sweep(made, own_setter, "resid_mid"), "setter own_setter"),
    "a wrapped setter": (lambda made: sweep(made, partial(BY_POS), "resid_mid"), "setter functools.partial"),
    "channels": (lambda made: sweep(made, HEADS, "resid_mid", ("layer", "head")), "single channels"),
    "no hook": (lambda made: sweep(made, BY_POS, "mlp_post"), "'mlp_post'.*hook_resid_mid2"),
    "a dictionary": (
        lambda made: call(made, cache=dict(made.cache().items())),
        "run_with_cache did not make",
    ),
    "a cache that was changed": (lambda made: call(made, cache=changed_cache(made)), "1.hook_resid_mid' was"),
    "a cache with exchanged entries": (
        lambda made: call(made, cache=exchanged_cache(made)),
        "0.hook_resid_mid' w",
    ),
    "another length": (
        lambda made: call(made._replace(tokens=made.clean.to_tokens("what color"))),
        "7 and 4",
    ),
    "padding": (
        lambda made: made.clean(torch.nn.functional.pad(made.tokens, (0, 2))),
        "padding is not supported here: make a batch of texts of one length",
    ),
    "unequal texts": (lambda made: made.clean.to_tokens([QUESTION, "what color"]), "unequal length"),
    "two corruptions": (
        lambda made: call(pair(blip(corruption=NOISE), blip(corruption=WORD_NOISE))),
        "between two runs that a corruption changed",
    ),
    "another answer": (
        lambda made: call(pair(*decoder((QUESTION, QUESTION), 1, "top left")[::2], "top left", "top right")),
        "answers of other words",
    ),
    "another caption": (
        lambda made: call(pair(blip(name="caption"), blip(0, "caption"), "a green", "a blue")),
        "captions of other words",
    ),
    "tokens of no text": (lambda made: call(no_text()), r"the tokens \[\d+\], which are those of no text"),
    "a frame for all": (
        lambda made: call(made, "get_act_patch_block_every", return_index_df=True),
        "return_index_df",
    ),
    "paths": (
        lambda made: ours.get_act_patch_direct_path(*made[2:], made.cache(), made.cache(), max, 0, 0),
        "direct path patching.*pre-norm",
    ),
    "all paths": (
        lambda made: ours.get_act_patch_direct_path_all_sources(*made[2:], made.cache(), made.cache(), max),
        "direct path patching.*pre-norm",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case: str) -> None:
    """Each with a sentence; the library itself, where it can, does it with the same objects."""
    run, said = UNSUPPORTED[case]
    with pytest.raises(UnsupportedError, match=said):
        run(pair(blip(), blip(1)))


def of_rows(made: Pair, rows: int) -> Pair:
    return made._replace(tokens=made.tokens.expand(rows, -1))


BAD: dict[str, tuple[Callable[[Pair], Any], str]] = {
    "both axes and frame": (lambda made: call(made, index_df=pd.DataFrame([[0, 0]])), "one of the two"),
    "neither": (lambda made: sweep(made, BY_POS, "resid_mid", None), "one of the two"),
    "an unknown axis": (
        lambda made: sweep(made, BY_POS, "resid_mid", ("layer", "token")),
        "unknown axis 'token'",
    ),
    "an axis too many": (
        lambda made: sweep(made, BY_POS, "resid_mid", ("layer", "pos", "head")),
        r"\[0, 0, 0\] does not fit 'blocks.0.hook_resid_mid'",
    ),
    "a position that is not there": (
        lambda made: sweep(made, BY_POS, "resid_mid", None, index_df=pd.DataFrame([[0, 7]])),
        r"\[0, 7\] does not fit.*out of bounds",
    ),
    "a layer that is not there": (
        lambda made: sweep(made, BY_POS, "resid_mid", None, index_df=pd.DataFrame([[4, 0]])),
        "no hook 'blocks.4.hook_resid_mid': it has 4 layers",
    ),
    "fractions": (
        lambda made: sweep(made, BY_POS, "resid_mid", None, index_df=pd.DataFrame([[0.0, 1.5]])),
        "whole numbers",
    ),
    "another reduction": (lambda made: call(made, reduce="sum"), "reduce must be one of"),
    "metrics of rows": (
        lambda made: sweep(made, BY_POS, "resid_mid", metric=lambda logits: logits[:, -1, 0]),
        "scalar",
    ),
    "a result and a frame": (lambda made: call(made, baseline=True, return_index_df=True), "return_index_df"),
    "another number of rows": (
        lambda made: call(
            of_rows(made, 2), cache=of_rows(made, 3).clean.run_with_cache(made.tokens.expand(3, -1))[1]
        ),
        "holds 3 rows, the corrupted tokens are 2",
    ),
    "what the cache left out": (
        lambda made: call(
            made, cache=made.clean.run_with_cache(made.tokens, names_filter="blocks.0.hook_mlp_out")[1]
        ),
        "holds no 'blocks.0.hook_resid_mid'",
    ),
    "another stack": (
        lambda made: call(made, cache=decoder((QUESTION, QUESTION), 1, "").cache()),
        "another stack",
    ),
    "another model": (
        lambda made: call(made, cache=pair(*([blip(name="match")] * 2), "a cross").cache()),
        "model or tracer",
    ),
    "pictures for other rows": (
        lambda made: HookedBlip(tracer(), pictures())(made.tokens),
        "2 pictures for 1 rows",
    ),
    "no picture": (lambda made: HookedBlip(tracer(), []), "no image"),
    "no text": (lambda made: made.clean.to_tokens([]), "no text"),
    "samples for other rows": (
        lambda made: blip(corruption=GaussianNoise(samples=3))(made.tokens),
        r"3 samples for 1 rows.*tokens.expand\(3, -1\)",
    ),
    "one row of tokens": (lambda made: made.clean(made.tokens[0]), r"tokens must be \[B, T\], not \[7\]"),
    "an unknown hook": (
        lambda made: made.clean.run_with_hooks(made.tokens, [("blocks.4.hook_resid_mid", max)]),
        "no hook point 'blocks.4.hook_resid_mid': there are blocks.0 to blocks.3",
    ),
    "an unknown stack": (
        lambda made: blip(stack="vision"),
        "unknown stack 'vision': choose among text_encoder",
    ),
    "a decoder without a question": (
        lambda made: blip(stack="text_decoder"),
        "text_decoder takes a question",
    ),
    "a question twice": (lambda made: blip(question=QUESTION), "text_encoder takes no question"),
    "an answer to a text": (lambda made: blip(name="match", answer="match"), "takes no answer"),
    "an answer in a decoder": (
        lambda made: blip(stack="text_decoder", question=QUESTION, answer="green"),
        "takes no answer",
    ),
    "questions for other rows": (
        lambda made: blip(stack="text_decoder", question=[QUESTION, OTHER])(torch.tensor([[5]])),
        "2 questions for 1 rows",
    ),
    "a decoder begun by something else": (
        lambda made: blip(stack="text_decoder", question=QUESTION)(torch.tensor([[7]])),
        "begin with 5",
    ),
    "no single token": (lambda made: blip().to_single_token("green square"), "no single token"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    run, said = BAD[case]
    with pytest.raises(ValueError, match=said):
        run(pair(blip(), blip(1)))


def test_types() -> None:
    made = pair(blip(), blip(1))
    with pytest.raises(TypeError, match="must be a HookedBlip, not Blip"):
        call(made._replace(corrupted=made.corrupted.original_model), cache=made.cache())
    with pytest.raises(TypeError, match="must be a tensor"):
        call(made._replace(tokens=QUESTION), cache=made.cache())
    with pytest.raises(TypeError, match="must be callable"):
        blip(corruption=3)
    with pytest.raises(TypeError, match="can be traced"):
        HookedBlip(nn.Linear(1, 1), pictures()[0])
