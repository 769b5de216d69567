"""What the tests of `blip_trace.compat.transformer_lens` share: pairs of runs, the library's functions beside
ours of the same names, and results that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any, NamedTuple

import pandas as pd
import PIL.Image
import pytest
import torch
from torch import Tensor

from blip_trace import GaussianNoise, ImageSwap, PatchNoise, Together, TokenNoise, Tracer, shipped_model
from blip_trace.scenes import COLORS, Scene, random_scene

real = pytest.importorskip("transformer_lens.patching")

from blip_trace.compat import transformer_lens as ours  # noqa: E402
from blip_trace.compat.transformer_lens import HookedBlip  # noqa: E402

TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-4
"""Of logits and their logarithms, which are about ten times as large as probabilities."""
QUESTION, OTHER = "what color is the square", "what color is the triangle"


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


def generic(made: Pair, cache: Any, metric: Any, *arguments: Any, **given: Any) -> tuple[Any, Any]:
    """What `generic_activation_patch` returns there and here."""
    first = made.corrupted, made.tokens, cache, metric, *arguments
    return real.generic_activation_patch(*first, **given), ours.generic_activation_patch(*first, **given)
