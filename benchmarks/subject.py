"""What is traced in the benchmarks: a model, one question, and every cell of its map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForQuestionAnswering

from blip_trace import cost, engine, hooks
from blip_trace.corruption import GaussianNoise
from blip_trace.embedding import embed_patches
from blip_trace.lowering.blip import lower
from blip_trace.lowering.load import shipped_model
from blip_trace.metrics import OWN
from blip_trace.ops import OpSet, get_ops
from blip_trace.sites import HEAD_KINDS, Cell, Shape, grid_cells

TOKENS = 9


@cache
def blip_base(dtype: str) -> BlipForQuestionAnswering:
    """BLIP-VQA-base with random weights (the config's own default of 8 heads is not that model's)."""
    torch.manual_seed(0)
    config = BlipConfig(text_config={"num_attention_heads": 12})
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))  # weights are never made in another type first
    try:
        return BlipForQuestionAnswering(config).eval()
    finally:
        torch.set_default_dtype(before)


def blip_shapes() -> BlipForQuestionAnswering:
    """The trained model that ships."""
    return BlipForQuestionAnswering.from_pretrained(shipped_model()).eval()


def full_study(model: BlipForQuestionAnswering) -> list[Cell]:
    """Three kinds for every token and layer of the question encoder, and every head at the last token."""
    states = [(kind, range(TOKENS)) for kind in ("hidden", "self_attn", "cross_attn")]
    heads = [(kind, range(TOKENS - 1, TOKENS)) for kind in HEAD_KINDS]
    return [cell for kind, tokens in states + heads for cell in grid(model, "text_encoder", kind, tokens)]


def grid(
    model: BlipForQuestionAnswering, stack: str, kind: str, tokens: Iterable[int], window: int = 1
) -> list[Cell]:
    """The cells of a map of these tokens."""
    text = model.config.text_config
    shape = Shape(TOKENS, text.num_hidden_layers, text.num_attention_heads, source=0, causal=False)
    return grid_cells(stack, kind, [(token,) for token in tokens], shape, window)


class Subject:
    """One question of `TOKENS` random tokens about one random image, under noise of `samples` draws."""

    def __init__(self, model: BlipForQuestionAnswering, samples: int, cells: Sequence[Cell] = ()) -> None:
        generator = torch.Generator().manual_seed(0)
        text, side = model.config.text_config, model.config.vision_config.image_size
        self.model = model
        self.samples = samples
        self.ops = get_ops("native", model.device)
        self.program = lower(model)
        self.pixels = torch.randn(1, 3, side, side, generator=generator).to(model.device, model.dtype)
        self.ids = torch.randint(5, text.vocab_size, (TOKENS,), generator=generator)
        self.cells: tuple[Cell, ...] = tuple(cells) or (
            *grid(model, "text_encoder", "hidden", range(TOKENS)),
            *grid(model, "text_decoder", "hidden", range(1)),
        )
        self.task = self._task(self.encoded_by_model()[0])

    def trace(self, ops: OpSet) -> None:
        """The whole map by the engine, with the image encoded anew."""
        clean = engine.encode_image(self.program, ops, embed_patches(self.program.image, self.pixels))[0]
        engine.score(self.program, ops, [self._task(clean)], None)

    @torch.inference_mode()
    def encoded_by_model(self) -> Tensor:
        """Image states [1, N, D] by the Hugging Face model."""
        states: Tensor = self.model.vision_model(pixel_values=self.pixels).last_hidden_state
        return states

    def operations(self) -> int:
        """What must be done for the map, by formula."""
        (image,) = engine.image_plan(self.program, 1, len(self.task.clean)).stacks
        text = engine.plan_pass(self.program, [self.task])
        return cost.image_operations(self.program.image, image) + cost.operations(self.program, text)

    @torch.inference_mode()
    def clean_states(self, cells: tuple[Cell, ...]) -> dict[Cell, Tensor]:
        """The clean state [C] of each of these one-site cells."""
        sites = {site for cell in cells for site in cell.sites}
        with hooks.recording(self.model, sites) as states:
            hooks.answer_logits(self.model, self.task, self.task.clean[None])
        return {cell: states[site][0] for cell in cells for site in cell.sites}

    def _task(self, clean: Tensor) -> engine.Task:
        corrupted = GaussianNoise(samples=self.samples)(clean).to(clean.dtype)
        return engine.Task(self.ids, torch.tensor([OWN]), clean, corrupted, self.cells)
