"""`compat.nnsight` gives what loops of real traces save, and leaves the user's traces and hooks alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from nnsight import NNsight
from nnsight.modeling.transformers import TransformersModel
from test_parity import TOLERANCE, tracer
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import Cell, GaussianNoise, PixelNoise, Site, TokenNoise, shipped_model
from blip_trace.compat.nnsight import activation_patching
from blip_trace.scenes import COLORS, random_scene

LAYERS, HEADS, WIDTH = 4, 4, 128
TEXTS = ("what is the color of the triangle", "what is the shape of the triangle")


@cache
def model() -> Any:
    """The shipped model, for this file alone: tools leave their traces on it."""
    return BlipForQuestionAnswering.from_pretrained(shipped_model()).eval()


@cache
def wrapped() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # submodules called `output`
        return NNsight(model())


@cache
def pictures() -> tuple[Tensor, Tensor]:
    """Pixel values of a scene, and of the same scene in other colours."""
    scene = random_scene(Random(24))
    names = list(COLORS)
    other = dict(zip(names, names[1:] + names[:1], strict=True))
    objects = tuple(replace(one, color=other[one.color]) for one in scene.objects)
    pixels = tracer("hooks").inputs.pixels
    return pixels(scene.render(64)), pixels(replace(scene, objects=objects).render(64))


def question(text: int = 0) -> Tensor:
    """Ids [1, 9] of one of the two questions."""
    return tracer("hooks").inputs.question_ids(TEXTS[text])[None]


def run(picture: int = 0, text: int = 0) -> dict[str, Tensor]:
    """What a trace is given: one of the two pictures, and one of the two questions."""
    start = torch.tensor([[model().decoder_start_token_id]])
    return {"input_ids": question(text), "pixel_values": pictures()[picture], "decoder_input_ids": start}


CLEAN = run()
OTHERS = {"picture": run(1), "words": run(0, 1), "both": run(1, 1)}
TOKENS = question().shape[1]


def logits(nn_model: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), nn_model.trace(**inputs):
        found = nn_model.text_decoder.output.logits.save()
    return found[0]


def loop(
    nn_model: Any,
    clean: dict[str, Tensor],
    corrupted: dict[str, Tensor],
    envoys: Sequence[Any],
    tokens: Sequence[int] = range(TOKENS),
    heads: Sequence[int] | None = None,
) -> Tensor:
    """One trace of the clean run and then one for each cell, as the documentation of nnsight shows it."""
    part, found = WIDTH // HEADS, []
    with torch.no_grad():
        for envoy in envoys:
            with nn_model.trace(**clean):
                state = (envoy.output if heads is None else envoy.input).clone().save()
            for token in tokens:
                for head in (None,) if heads is None else heads:
                    with nn_model.trace(**corrupted):
                        if head is None:
                            envoy.output[:, token] = state[:, token]
                        else:
                            own = slice(head * part, head * part + part)
                            envoy.input[:, token, own] = state[:, token, own]
                        out = nn_model.text_decoder.output.logits.save()
                    found.append(out[0])
    size = (len(envoys), len(tokens), *(() if heads is None else (len(heads),)))
    return torch.stack(found).reshape(*size, 1, -1)


def assert_same(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    """Logits [*grid, 1, V] of a map that is not flat: most of its cells are alike, so that logarithms of the
    probabilities of words that are said at all count too."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    mine, truth = (x.double().log_softmax(-1).flatten(0, -2) for x in (ours, theirs))
    spread = (truth.exp().max(0).values - truth.exp().min(0).values).max()
    assert spread >= 100 * tolerance
    assert (mine.exp() - truth.exp()).abs().max() <= tolerance
    said = truth.exp().max(0).values > 1e-3
    assert (mine - truth)[:, said].abs().max() <= 10 * tolerance


BLOCKS: dict[str, Callable[[Any], Any]] = {
    "hidden": lambda layer: layer,
    "hidden, at its end": lambda layer: layer.E_output.LayerNorm,
    "after self-attention": lambda layer: layer.attention.E_output,
    "after cross-attention": lambda layer: layer.crossattention.E_output,
    "self-attention": lambda layer: layer.attention.E_output.dense,
    "cross-attention": lambda layer: layer.crossattention.E_output.dense,
    "mlp": lambda layer: layer.E_output.dense,
    "mlp, inside": lambda layer: layer.intermediate,
}


@pytest.mark.parametrize(
    ("name", "other"), [("hidden", "words"), ("hidden", "picture"), *((name, "both") for name in BLOCKS)]
)
def test_a_grid_of_envoys(name: str, other: str) -> None:
    envoys = [BLOCKS[name](layer) for layer in wrapped().text_encoder.encoder.layer]
    ours = activation_patching(wrapped(), CLEAN, OTHERS[other], envoys)
    assert_same(ours, loop(wrapped(), CLEAN, OTHERS[other], envoys))
    assert not ours.requires_grad
    assert not ours.is_inference()


@pytest.mark.parametrize("attention", ["attention", "crossattention"])
def test_a_grid_of_heads(attention: str) -> None:
    layers = [getattr(layer, attention) for layer in wrapped().text_encoder.encoder.layer][1:]
    envoys, tokens = [layer.E_output.dense for layer in layers], [3, -2, -1]
    theirs = loop(wrapped(), CLEAN, OTHERS["both"], envoys, tokens, range(HEADS))
    for own in (envoys, [layer.self for layer in layers]):
        ours = activation_patching(wrapped(), CLEAN, OTHERS["both"], own, tokens, range(HEADS))
        assert ours.shape == (3, 3, HEADS, 1, model().config.text_config.vocab_size)
        assert_same(ours, theirs)


def test_other_stacks() -> None:
    nn_model, other = wrapped(), OTHERS["picture"]
    decoder = [layer.crossattention.E_output.dense for layer in nn_model.text_decoder.bert.encoder.layer]
    ours = activation_patching(nn_model, CLEAN, other, decoder)
    assert_same(ours, loop(nn_model, CLEAN, other, decoder, [0]))
    image = [nn_model.vision_model.encoder.layers[layer].mlp for layer in (0, 3)]
    tokens = [0, 52, 53, 61]
    ours = activation_patching(nn_model, CLEAN, other, image, tokens)
    assert_same(ours, loop(nn_model, CLEAN, other, image, tokens))
    assert activation_patching(nn_model, CLEAN, other, image[1]).shape[:2] == (1, 65)
    mixed = activation_patching(nn_model, CLEAN, other, [decoder[3], image[0]], [0])
    assert (mixed[1, 0] - ours[0, 0]).abs().max() <= TOLERANCE


def test_a_list_of_modules_and_one_envoy() -> None:
    layers = wrapped().text_encoder.encoder.layer
    grid = activation_patching(wrapped(), CLEAN, OTHERS["picture"], layers)
    assert grid.shape[:3] == (LAYERS, TOKENS, 1)
    one = activation_patching(wrapped(), CLEAN, OTHERS["picture"], layers[3], [7])
    assert (one[0, 0] - grid[3, 7]).abs().max() <= TOLERANCE


def test_cells_of_ones_own() -> None:
    """Several sites at once, against a trace that patches them all."""
    sites = [Site("text_encoder", 2, "cross_attn", 7), Site("text_encoder", 3, "hidden", 7)]
    ours = activation_patching(wrapped(), CLEAN, OTHERS["picture"], [Cell.of(sites), sites, sites[0]])
    layers = wrapped().text_encoder.encoder.layer
    lower_part = layers[2].crossattention.E_output.dense
    with torch.no_grad():
        with wrapped().trace(**CLEAN):
            lower = lower_part.output.clone().save()
            upper = layers[3].output.clone().save()
        with wrapped().trace(**OTHERS["picture"]):
            lower_part.output[:, 7] = lower[:, 7]
            layers[3].output[:, 7] = upper[:, 7]
            out = wrapped().text_decoder.output.logits.save()
    alone = loop(wrapped(), CLEAN, OTHERS["picture"], [lower_part], [7])[0]
    assert torch.equal(ours[0], ours[1])
    assert_same(ours, torch.cat((out, out, alone)))


@pytest.mark.parametrize("by", ["number", "numbers"])
def test_a_metric(by: str) -> None:
    answer = int(logits(wrapped(), CLEAN)[-1].argmax())

    def probability(found: Tensor) -> float:
        assert found.shape == (1, 1, model().config.text_config.vocab_size)
        return float(found[0, -1].double().softmax(-1)[answer])

    def several(found: Tensor) -> Tensor:
        return found[0, -1].softmax(-1)[[answer, 1, 2]]

    metric: Any = probability if by == "number" else several
    layers = wrapped().text_encoder.encoder.layer
    ours = activation_patching(wrapped(), CLEAN, OTHERS["picture"], layers, metric=metric)
    theirs = loop(wrapped(), CLEAN, OTHERS["picture"], layers)[..., 0, :].double().softmax(-1)
    assert ours.shape == (LAYERS, TOKENS) + (() if by == "number" else (3,))
    assert ours.dtype == (torch.float64 if by == "number" else torch.float32)
    first = ours if by == "number" else ours[..., 0]
    assert (first - theirs[..., answer]).abs().max() <= TOLERANCE
    assert first.max() - first.min() > 0.5


def test_a_corruption_with_samples() -> None:
    noise = PixelNoise(std=1.0, samples=2)
    layers = wrapped().text_encoder.encoder.layer
    ours = activation_patching(wrapped(), CLEAN, noise, layers, [6, 7, 8])
    noisy = noise.apply(CLEAN["pixel_values"][0])
    theirs = [
        loop(wrapped(), CLEAN, {**CLEAN, "pixel_values": sample[None]}, layers, [6, 7, 8]) for sample in noisy
    ]
    assert ours.shape[:3] == (2, LAYERS, 3)
    assert_same(ours, torch.stack(theirs))
    phrase = TokenNoise(span="triangle", samples=3)
    processor = tracer("hooks").processor
    assert activation_patching(wrapped(), CLEAN, phrase, layers[2:4], processor=processor).shape[0] == 3
    with pytest.raises(ValueError, match="without a processor"):
        activation_patching(wrapped(), CLEAN, phrase, layers[2:4])


def test_noise_on_the_image_embeddings() -> None:
    """Larger than elsewhere: the noise makes embeddings of which float32 rounds much away."""
    layers = wrapped().text_encoder.encoder.layer
    ours = activation_patching(wrapped(), CLEAN, GaussianNoise(samples=1), [layers[2], layers[3]], [6, 7])
    noise = 1 + 5 * torch.randn(1, 65, WIDTH, generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        for layer in (layers[2], layers[3]):
            with wrapped().trace(**CLEAN):
                state = layer.output.clone().save()
            for token in (6, 7):
                with wrapped().trace(**CLEAN):
                    states = wrapped().vision_model.output.last_hidden_state
                    states[:] = states * noise
                    layer.output[:, token] = state[:, token]
                    out = wrapped().text_decoder.output.logits.save()
                found.append(out[0])
    assert_same(ours[0], torch.stack(found).reshape(2, 2, 1, -1), tolerance=2e-5)


def test_a_transformers_model() -> None:
    processor = tracer("hooks").processor
    parts = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn_model = TransformersModel(model(), processor=processor, task="image-text-to-text", **parts)
    layers = nn_model.text_encoder.encoder.layer
    ours = activation_patching(nn_model, CLEAN, OTHERS["picture"], layers, [6, 7])
    assert_same(ours, loop(nn_model, CLEAN, OTHERS["picture"], layers, [6, 7]))
    # Envoys of another wrapper around the same model are the same sites.
    of_other = activation_patching(
        nn_model, CLEAN, OTHERS["picture"], wrapped().text_encoder.encoder.layer, [6, 7]
    )
    assert torch.equal(ours, of_other)


def patched() -> Tensor:
    return activation_patching(wrapped(), CLEAN, OTHERS["both"], wrapped().text_encoder.encoder.layer)


def test_beside_the_users_own_traces() -> None:
    """Traces before, between, around and after give what they give without us."""
    fresh = deepcopy(model())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = NNsight(fresh)
    expected = loop(alone, CLEAN, OTHERS["both"], alone.text_encoder.encoder.layer, [6, 7])
    plain = logits(alone, CLEAN)

    layers = wrapped().text_encoder.encoder.layer
    first = patched()
    assert torch.equal(loop(wrapped(), CLEAN, OTHERS["both"], layers, [6, 7]), expected)
    with torch.no_grad():
        with wrapped().trace(**CLEAN):
            state = layers[3].output[:, 7].clone().save()
            inside = patched().save()
            out = wrapped().text_decoder.output.logits.save()
        with wrapped().session():
            with wrapped().trace(**CLEAN):
                kept = layers[3].output[:, 7]
            between = patched().save()
            with wrapped().trace(**OTHERS["both"]):
                layers[3].output[:, 7] = kept
                restored = wrapped().text_decoder.output.logits.save()
    assert torch.equal(out[0], plain)
    assert state.shape == (1, WIDTH)
    assert torch.equal(restored[0], expected[3, 1])
    for again in (inside, between, patched()):
        assert torch.equal(again, first)
    assert torch.equal(logits(wrapped(), CLEAN), plain)


@pytest.fixture
def own_hooks() -> Iterator[list[str]]:
    """A forward hook and a pre-hook that note when they fire."""
    fired: list[str] = []
    layer = model().text_encoder.encoder.layer[2]
    handles = [
        layer.register_forward_hook(lambda *_: fired.append("after")),
        layer.register_forward_pre_hook(lambda *_: fired.append("before")),
    ]
    yield fired
    for handle in handles:
        handle.remove()


def test_the_users_own_hooks(own_hooks: list[str]) -> None:
    expected = patched_quietly()
    with pytest.warns(UserWarning, match="forward hooks, which do not run here"):
        assert torch.equal(patched(), expected)
    assert own_hooks == []
    logits(wrapped(), CLEAN)
    assert own_hooks == ["before", "after"]


def patched_quietly() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return patched()


def test_nothing_is_left_on_the_model() -> None:
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model().modules())

    before, flags = hooks(), [weight.requires_grad for weight in model().parameters()]
    patched()
    assert hooks() == before
    assert [weight.requires_grad for weight in model().parameters()] == flags
    # The hooks by which transformers collects states are no reason to warn.
    states = model()(**CLEAN, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched()
    assert len(model()(**CLEAN, output_hidden_states=True).hidden_states) == LAYERS + 1
