"""Parity over random BLIP shapes: any depth, width, head count, vocabulary, question and answer length.

Weights are drawn large, so that every layer matters and a wrong row shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BlipConfig

from blip_trace import engine, hooks, reference
from blip_trace.corruption import GaussianNoise
from blip_trace.embedding import embed_patches
from blip_trace.lowering.blip import MODELS, Blip, lower
from blip_trace.metrics import OWN
from blip_trace.ops import OpSet, get_ops
from blip_trace.sites import DIRECTIONS, HEAD_KINDS, KINDS, VISION_KINDS, Cell, Cut, Shape, Site

VOCABULARY = 41


@st.composite
def models(draw: st.DrawFn) -> Blip:
    heads, size = draw(st.sampled_from([(1, 8), (2, 8), (3, 5), (4, 16), (2, 33)]))
    width = heads * size
    patch = draw(st.sampled_from([4, 8]))
    config = BlipConfig(
        vision_config={
            "hidden_size": width,
            "intermediate_size": draw(st.integers(3, 40)),
            "num_hidden_layers": draw(st.integers(1, 2)),
            "num_attention_heads": draw(st.sampled_from([1, heads])),
            "image_size": patch * draw(st.integers(1, 4)),
            "patch_size": patch,
        },
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": width,
            "intermediate_size": draw(st.integers(3, 40)),
            "num_hidden_layers": draw(st.integers(1, 4)),
            "num_attention_heads": heads,
            "max_position_embeddings": 24,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "sep_token_id": 2,
            "eos_token_id": 2,
        },
    )
    torch.manual_seed(draw(st.integers(0, 2**16)))
    model = draw(st.sampled_from(MODELS))(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model


def encoded(model: Blip, pixels: Tensor) -> Tensor:
    """Image states by the Hugging Face model."""
    return hooks.encode_image(model, hooks.embed_image(model, pixels))


def encoded_by_engine(model: Blip, ops: OpSet, pixels: Tensor) -> Tensor:
    """Image states by the engine."""
    program = lower(model)
    return engine.encode_image(program, ops, embed_patches(program.image, pixels))


@st.composite
def cells(draw: st.DrawFn, shapes: dict[str, Shape]) -> Cell:
    """Any restored and frozen sites and cut edges, across layers, kinds, tokens, heads and stacks."""

    def site(stack: str, shape: Shape) -> st.SearchStrategy[Site]:
        kind = draw(st.sampled_from(sorted(VISION_KINDS if stack == "vision" else KINDS)))
        return st.builds(
            Site,
            stack=st.just(stack),
            layer=st.integers(0, shape.layers - 1),
            kind=st.just(kind),
            token=st.integers(0, shape.tokens - 1),
            head=st.integers(0, shape.heads - 1) if kind in HEAD_KINDS else st.none(),
        )

    def cut(stack: str, shape: Shape, sublayer: Literal["self_attn", "cross_attn"]) -> st.SearchStrategy[Cut]:
        # not the token itself, or the first state: something must be left to attend to
        query = draw(st.integers(0, shape.tokens - 1))
        left, keys = (0, shape.source) if sublayer == "cross_attn" else (query, shape.tokens)
        return st.builds(
            Cut,
            stack=st.just(stack),
            layer=st.integers(0, shape.layers - 1),
            sublayer=st.just(sublayer),
            queries=st.just(frozenset([query])),
            keys=st.frozensets(st.integers(0, keys - 1).filter(lambda key: key != left)),
        )

    sites = st.one_of([site(*item) for item in shapes.items()])
    cuts = st.one_of(
        [
            cut(stack, shape, sublayer)
            for stack, shape in shapes.items()
            if stack != "vision"  # the hooks cut through a mask, which that attention does not take
            for sublayer in ("self_attn", "cross_attn")
        ]
    )
    restored = draw(st.frozensets(sites, min_size=1, max_size=5))
    frozen = draw(st.frozensets(sites, max_size=2)) - restored
    return Cell(restored, frozen, draw(st.frozensets(cuts, max_size=3)))


@st.composite
def tasks(draw: st.DrawFn, model: Blip, patches: bool) -> engine.Task:
    """Any cells under noise on the image states or, where `patches` enter, on those."""
    program = lower(model)
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2, dtype=torch.float64)
    clean = (hooks.embed_image if patches else encoded)(model, pixels)[0].detach()
    text = torch.randint(3, VOCABULARY, (draw(st.integers(1, 12)),))
    answer = torch.randint(3, VOCABULARY, (draw(st.integers(1, 4)),))
    if program.task == "match":
        answer = torch.tensor([draw(st.integers(0, 1))])
    elif draw(st.booleans()):
        answer[-1] = OWN
    samples = draw(st.integers(1, 3))
    noisy = GaussianNoise(std=1.0, samples=samples)(clean)
    words = None
    if draw(st.booleans()):
        words = torch.randn(samples, len(text), program.texts[0].width, dtype=torch.float64)
    task = engine.Task(
        text, answer, clean, noisy, (), draw(st.sampled_from(DIRECTIONS)), words, patches=patches
    )
    lengths = dict(zip([stack.name for stack in program.texts], task.job(program).tokens, strict=True))
    shapes, source = {}, len(clean)
    if patches:
        shapes["vision"] = Shape(source, len(program.image.layers), program.image.heads, 0, False)
    for stack in program.texts:
        tokens = lengths[stack.name]
        shapes[stack.name] = Shape(tokens, len(stack.layers), stack.heads, source, stack.causal)
        source = tokens
    return replace(task, cells=tuple(draw(st.lists(cells(shapes), min_size=1, max_size=6))))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_cells_of_any_model(data: st.DataObject) -> None:
    model = data.draw(models())
    patches = data.draw(st.booleans())
    given = [data.draw(tasks(model, patches)) for _ in range(data.draw(st.integers(1, 2)))]

    truth = hooks.score(model, given)
    ours = engine.score(lower(model), reference, given, memory=data.draw(st.sampled_from([1, 2**28])))
    assert difference(ours, truth) < 1e-11

    model.float()
    single = [
        replace(
            task,
            clean=task.clean.float(),
            corrupted=None if task.corrupted is None else task.corrupted.float(),
            words=None if task.words is None else task.words.float(),
        )
        for task in given
    ]
    # what float32 costs here: the larger of what it costs the unmodified model and the plain-torch engine
    plain = engine.score(lower(model), reference, single, memory=2**28)
    allowed = 2 * max(difference(own, truth) for own in (hooks.score(model, single), plain)) + 1e-6
    native = engine.score(lower(model), get_ops("native"), single, memory=2**28)
    assert difference(native, truth) <= allowed


def probabilities(scores: engine.Scores) -> dict[str, Tensor]:
    """Of the answer in all runs."""
    parts = {"clean": scores.clean, "corrupted": scores.corrupted, "patched": scores.patched}
    return {part: read["log_probability"].exp() for part, read in parts.items()}


def difference(ours: list[engine.Scores], truth: list[engine.Scores]) -> float:
    """Largest difference of any probability."""
    return max(
        (mine[part] - true[part]).abs().max().item()
        for mine, true in zip(map(probabilities, ours), map(probabilities, truth), strict=True)
        for part in true
    )


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(model=models(), images=st.integers(1, 3))
def test_the_image_encoder_of_any_model(model: Blip, images: int) -> None:
    pixels = torch.randn(images, 3, *[model.config.vision_config.image_size] * 2, dtype=torch.float64)
    truth = encoded(model, pixels)
    assert (encoded_by_engine(model, reference, pixels) - truth).abs().max() < 1e-11
    model.float()
    allowed = 2 * (encoded(model, pixels.float()) - truth).abs().max() + 1e-5
    native = encoded_by_engine(model, get_ops("native"), pixels.float())
    assert (native - truth).abs().max() <= allowed
