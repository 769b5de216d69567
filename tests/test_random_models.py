"""Parity over random BLIP shapes: any depth, width, head count, vocabulary, question and answer length.

Weights are drawn large, so that every layer matters and a wrong row shows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import BlipConfig, BlipForQuestionAnswering

from blip_trace import engine, hooks, reference
from blip_trace.corruption import GaussianNoise
from blip_trace.lowering.blip import lower
from blip_trace.ops import get_ops
from blip_trace.sites import DIRECTIONS, HEAD_KINDS, KINDS, Cell, Site

VOCABULARY = 41


@st.composite
def models(draw: st.DrawFn) -> BlipForQuestionAnswering:
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
    model = BlipForQuestionAnswering(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 2 / weight[0].numel() ** 0.5)
            else:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model


@st.composite
def cells(draw: st.DrawFn, layers: int, heads: int, tokens: dict[str, int]) -> Cell:
    """Any set of sites, across layers, kinds, tokens, heads and stacks."""

    def site(stack: str) -> st.SearchStrategy[Site]:
        kind = draw(st.sampled_from(sorted(KINDS)))
        return st.builds(
            Site,
            stack=st.just(stack),
            layer=st.integers(0, layers - 1),
            kind=st.just(kind),
            token=st.integers(0, tokens[stack] - 1),
            head=st.integers(0, heads - 1) if kind in HEAD_KINDS else st.none(),
        )

    return Cell.of(draw(st.lists(st.one_of([site(stack) for stack in tokens]), min_size=1, max_size=5)))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_cells_of_any_model(data: st.DataObject) -> None:
    model = data.draw(models())
    tasks = []
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2, dtype=torch.float64)
    clean = hooks.encode_images(model, pixels)[0]
    for _ in range(data.draw(st.integers(1, 2))):
        tokens = {"text_encoder": data.draw(st.integers(1, 12)), "text_decoder": data.draw(st.integers(1, 4))}
        question, answer = (torch.randint(3, VOCABULARY, (n,)) for n in tokens.values())
        config = model.config.text_config
        shape = (config.num_hidden_layers, config.num_attention_heads)
        chosen = data.draw(st.lists(cells(*shape, tokens), min_size=1, max_size=6))
        noise = GaussianNoise(std=1.0, samples=data.draw(st.integers(1, 3)))
        direction = data.draw(st.sampled_from(DIRECTIONS))
        tasks.append(engine.Task(question, answer, clean, noise(clean), tuple(chosen), direction))

    truth = hooks.score(model, tasks)
    ours = engine.score(lower(model), reference, tasks, memory=data.draw(st.sampled_from([1, 2**28])))
    assert difference(ours, truth) < 1e-11

    model.float()
    single = [replace(t, clean=t.clean.float(), corrupted=t.corrupted.float()) for t in tasks]
    allowed = 2 * difference(hooks.score(model, single), truth) + 1e-6
    native = engine.score(lower(model), get_ops("native"), single, memory=2**28)
    assert difference(native, truth) <= allowed


def difference(ours: list[engine.Scores], truth: list[engine.Scores]) -> float:
    """Largest difference of any probability."""
    return max(
        (getattr(mine, part).exp() - getattr(true, part).exp()).abs().max().item()
        for mine, true in zip(ours, truth, strict=True)
        for part in ("clean", "corrupted", "restored")
    )


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(model=models(), images=st.integers(1, 3))
def test_the_image_encoder_of_any_model(model: BlipForQuestionAnswering, images: int) -> None:
    pixels = torch.randn(images, 3, *[model.config.vision_config.image_size] * 2, dtype=torch.float64)
    truth = hooks.encode_images(model, pixels)
    assert (engine.encode_images(lower(model), reference, pixels) - truth).abs().max() < 1e-11
    model.float()
    allowed = 2 * (hooks.encode_images(model, pixels.float()) - truth).abs().max() + 1e-5
    native = engine.encode_images(lower(model), get_ops("native"), pixels.float())
    assert (native - truth).abs().max() <= allowed
