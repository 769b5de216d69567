"""The functions of `blip_trace.compat.transformer_lens` give what TransformerLens's own of the same names do
on the same model object, which runs the unmodified Hugging Face model once for each index."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import PIL.Image
import pytest
import torch
from torch import Tensor

from blip_trace import (
    GaussianNoise,
    ImageSwap,
    PatchNoise,
    Together,
    TokenNoise,
    Tracer,
    shipped_model,
)
from blip_trace.scenes import COLORS, Scene, random_scene

real = pytest.importorskip("transformer_lens.patching")

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HookedBlip  # noqa: E402
from blip_trace.compat.transformer_lens import replay as tl_replay  # noqa: E402

TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4
"""Of logits and their logarithms, which are about ten times as large as probabilities."""
QUESTION, OTHER = "what color is the square", "what color is the triangle"
PRESETS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn_head_out_by_pos", "attn_head_out_all_pos")


@cache
def loaded(name: str) -> Tracer:
    return Tracer.from_pretrained(shipped_model(name))


def tracer(name: str = "vqa") -> Tracer:
    return loaded(name)


@cache
def pictures(seed: int = 41) -> tuple[PIL.Image.Image, PIL.Image.Image]:
    """A scene (a green square, a yellow triangle, a yellow cross), and it with all colours exchanged."""
    scene = random_scene(Random(seed))
    others = dict(zip(COLORS, [*list(COLORS)[1:], next(iter(COLORS))], strict=True))
    objects = tuple(replace(each, color=others[each.color]) for each in scene.objects)
    return scene.render(64), Scene(objects, scene.background).render(64)


def green(logits: Tensor) -> Tensor:
    """How probable that word is."""
    (word,) = tracer().inputs.known_ids("green")
    return logits[0, -1].log_softmax(-1)[word]


class Pair(NamedTuple):
    """A clean and a corrupted run."""

    clean: HookedBlip
    clean_tokens: Tensor
    corrupted: HookedBlip
    tokens: Tensor

    def cache(self) -> Any:
        return self.clean.run_with_cache(self.clean_tokens)[1]

    def metrics(self) -> dict[str, Callable[[Tensor], Any]]:
        """Of a word that the one says and one that the other says."""
        answer, foil = (
            int(model(tokens)[0, -1].argmax())
            for model, tokens in ((self.clean, self.clean_tokens), (self.corrupted, self.tokens))
        )
        foil = foil if foil != answer else answer - 1
        return {
            "probability": lambda logits: logits[0, -1].softmax(-1)[answer],
            "log_probability": lambda logits: logits[0, -1].log_softmax(-1)[answer].item(),
            "difference": lambda logits: logits[0, -1, answer] - logits[0, -1, foil],
            "rank": lambda logits: (logits[0, -1] > logits[0, -1, answer]).sum().float(),
        }


def blip(picture: int = 0, name: str = "vqa", **given: Any) -> HookedBlip:
    return HookedBlip(tracer(name), pictures()[picture], **given)


def pair(
    clean: HookedBlip, corrupted: HookedBlip, question: str = QUESTION, other: str | None = None
) -> Pair:
    other = question if other is None else other
    return Pair(clean, clean.to_tokens(question), corrupted, corrupted.to_tokens(other))


def decoder(questions: tuple[str, str], picture: int, said: str) -> Pair:
    models = (
        blip(number, stack="text_decoder", question=question)
        for number, question in zip((0, picture), questions, strict=True)
    )
    return pair(*models, said)


NOISE = GaussianNoise(0.0, 2.0, "add", samples=1, seed=1)
WORD_NOISE = TokenNoise(std=2.0, samples=1)
WHERE = "where is the square", "where is the cross"
PAIRS: dict[str, Callable[[], Pair]] = {
    "another picture": lambda: pair(blip(), blip(1)),
    "another question": lambda: pair(blip(), blip(), other=OTHER),
    "noise on the picture": lambda: pair(blip(), blip(corruption=NOISE)),
    "another picture and question": lambda: pair(blip(), blip(1), other=OTHER),
    "another picture by a corruption": lambda: pair(blip(), blip(corruption=ImageSwap(pictures()[1]))),
    "noise on the patches": lambda: pair(blip(), blip(corruption=PatchNoise(std=2.0, samples=1, seed=1))),
    "noise on the words": lambda: pair(blip(), blip(corruption=WORD_NOISE)),
    "noise on both, and another question": lambda: pair(
        blip(), blip(1, corruption=Together(NOISE, WORD_NOISE)), other=OTHER
    ),
    "noise into the clean run": lambda: pair(blip(corruption=NOISE), blip()),
    "noise on the words, into a run with another picture": lambda: pair(blip(corruption=WORD_NOISE), blip(1)),
    "an answer of two words": lambda: pair(blip(answer="center right"), blip(1, answer="top left"), *WHERE),
    "the decoder, another picture": lambda: decoder((QUESTION, QUESTION), 1, ""),
    "the decoder, another question": lambda: decoder(WHERE, 0, "top left"),
    "a caption": lambda: pair(blip(name="caption"), blip(1, "caption"), "a"),
    "a caption begun by nothing": lambda: pair(blip(name="caption"), blip(1, "caption"), ""),
    "a match": lambda: pair(blip(name="match"), blip(1, "match"), "a green square"),
    "a match, another text": lambda: pair(
        blip(name="match"), blip(0, "match"), "a green square", "a red cross"
    ),
}
GRADED = ("noise on the picture", "noise into the clean run")
"""Where the answer's probability itself differs between the indices of every preset."""

FLAT_HEADS = ("the decoder, another picture", "a caption begun by nothing")
"""Of one token: no head of it matters."""


def both(name: str, case: Pair, metric: Any, cache: Any = None, **given: Any) -> tuple[Any, Any]:
    """What a function of the library, and the one of the same name here, return."""
    arguments = case.corrupted, case.tokens, case.cache() if cache is None else cache, metric
    return getattr(real, name)(*arguments, **given), getattr(ours, name)(*arguments, **given)


def assert_same(theirs: Any, found: Any) -> None:
    """The same `PatchingResult`, but for rounding."""
    assert type(found) is type(theirs) is real.PatchingResult
    for own in ("values", "baseline"):
        exact, value = getattr(theirs, own), getattr(found, own)
        if exact is None:
            assert value is None
            continue
        assert value.dtype == exact.dtype == torch.float32
        assert value.shape == exact.shape
        assert (value - exact).abs().max() <= LOGIT_TOLERANCE
    pd.testing.assert_frame_equal(found.index_df, theirs.index_df)
    for own in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(found, own) == getattr(theirs, own)


def check(theirs: Any, found: Any, graded: bool) -> None:
    """Results of `Pair.metrics`, whose cells must differ."""
    assert_same(theirs, found)
    values = theirs["difference"].values
    assert values.max() - values.min() >= 100 * LOGIT_TOLERANCE
    assert theirs["rank"].values.equal(found["rank"].values)
    exact, values = theirs["probability"].values, found["probability"].values
    assert (values - exact).abs().max() <= TOLERANCE
    if graded:
        assert exact.max() - exact.min() >= 100 * TOLERANCE


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


def generic(made: Pair, cache: Any, metric: Any, *arguments: Any, **given: Any) -> tuple[Any, Any]:
    """What `generic_activation_patch` returns there and here."""
    first = made.corrupted, made.tokens, cache, metric, *arguments
    return real.generic_activation_patch(*first, **given), ours.generic_activation_patch(*first, **given)


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
