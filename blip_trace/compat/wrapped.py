"""What adapters of tools that wrap the model share: which state a module's input or output is, and a pair of
inputs whose cells go through one pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..corrupting import Corruption
from ..corruption import ImageSwap, Together, TokenSwap
from ..hooks import site_module
from ..mapping import UNCORRUPTED
from ..sites import Cell, Site
from ..tracer import Tracer
from .layers import KINDS
from .models import UnsupportedError

End = Literal["input", "output"]
Ends = dict[tuple[nn.Module, End], "Place"]

BEFORE = "hidden of the layer before"
TEXT_ENDS: dict[End, dict[str, tuple[str, ...]]] = {
    "input": {
        BEFORE: ("", "attention", "attention.self"),
        "hidden_after_self_attn": ("attention.output.LayerNorm", "crossattention", "crossattention.self"),
        "hidden_after_cross_attn": ("crossattention.output.LayerNorm", "intermediate", "intermediate.dense"),
        "hidden": ("output.LayerNorm",),
        "self_attn": ("attention.output", "attention.output.dense"),
        "cross_attn": ("crossattention.output", "crossattention.output.dense"),
        "mlp": ("output", "output.dense"),
    },
    "output": {
        **{kind: tuple(name for name in KINDS if KINDS[name] == kind) for kind in KINDS.values()},
        "mlp": ("output.dense", "intermediate", "intermediate.dense"),
    },
}
"""Modules of a text layer, and the kind whose restoration at a token equals restoring the module's whole
input or output there. Two things make it so: what comes behind works
token by token up to that kind, or the input, edited in place, is also the residual."""
VISION_ENDS: dict[End, dict[str, tuple[str, ...]]] = {
    "input": {
        BEFORE: ("", "layer_norm1"),
        "self_attn": ("self_attn.projection",),
        "mlp": ("mlp", "mlp.fc1", "mlp.fc2"),
    },
    "output": {
        "hidden": ("",),
        "self_attn": ("self_attn", "self_attn.projection"),
        "mlp": ("mlp", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    },
}
"""Likewise of a layer of the image encoder."""
WIDE = {
    ("intermediate", "output"),
    ("intermediate.dense", "output"),
    ("output", "input"),
    ("output.dense", "input"),
    ("mlp.fc1", "output"),
    ("mlp.fc2", "input"),
}
"""Where there are as many channels as the MLP has inside."""
CONTEXTS = {
    (f"{attention}.{name}", end)
    for attention in ("attention", "crossattention")
    for name, end in (("self", "output"), ("output", "input"), ("output.dense", "input"))
}
"""Where the channels are those of the heads, one behind the other."""


class Place(NamedTuple):
    """A module's input or output [B, T, width] as a kind of state; `heads` share its channels, if not 0."""

    stack: str
    layer: int
    kind: str
    width: int
    heads: int = 0

    def sites(self, tokens: Iterable[int], heads: Iterable[int] | None = None) -> set[Site]:
        """The sites of these tokens, of these heads alone unless None."""
        if heads is None:
            return {Site(self.stack, self.layer, self.kind, token) for token in tokens}
        heads = tuple(heads)
        kind = f"{self.kind}_head"
        return {Site(self.stack, self.layer, kind, token, head) for token in tokens for head in heads}


def places(model: Any) -> Ends:
    """All inputs and outputs of modules of a `BlipForQuestionAnswering` that are states of the engine."""
    found: Ends = {}
    text, vision = model.config.text_config, model.config.vision_config
    for stack, config in (("vision", vision), ("text_encoder", text), ("text_decoder", text)):
        last = config.num_hidden_layers - 1
        for layer in range(last + 1):
            found |= _ends(site_module(model, stack, layer, "hidden"), stack, layer, config)
        for whole in _wholes(model, stack):
            found[whole, "output"] = Place(stack, last, "hidden", config.hidden_size)
    return found


def _ends(block: nn.Module, stack: str, layer: int, config: Any) -> Ends:
    found: Ends = {}
    for end, kinds in (VISION_ENDS if stack == "vision" else TEXT_ENDS).items():
        for kind, names in kinds.items():
            at = (layer - 1, "hidden") if kind == BEFORE else (layer, kind)
            if at[0] < 0:
                continue  # the embeddings: no state that the engine can change
            for name in names:
                width = config.intermediate_size if (name, end) in WIDE else config.hidden_size
                heads = config.num_attention_heads if (name, end) in CONTEXTS else 0
                found[block.get_submodule(name), end] = Place(stack, *at, width, heads)
    return found


def _wholes(model: Any, stack: str) -> tuple[nn.Module, ...]:
    """The modules whose (first) output is what the last layer of a stack gives, normalised or not."""
    if stack == "vision":
        return model.vision_model, model.vision_model.encoder
    text = model.text_encoder if stack == "text_encoder" else model.text_decoder.bert
    return text, text.encoder


class Input(NamedTuple):
    """What the model is given: pixels [1, 3, H, W] and the question's ids [T]."""

    pixels: Tensor
    ids: Tensor


def rows_of(inputs: Mapping[str, Any], pad: int, instead: str) -> list[Input]:
    """The rows of `input_ids` [B, T] and `pixel_values` [B, 3, H, W].

    Raises ValueError where one is missing or their rows differ in number, UnsupportedError, naming `instead`,
    for padding and for an `attention_mask` that hides anything.
    """
    ids, pixels = inputs.get("input_ids"), inputs.get("pixel_values")
    if not isinstance(ids, Tensor) or not isinstance(pixels, Tensor) or ids.dim() != 2 or pixels.dim() != 4:
        raise ValueError("a run needs input_ids [B, T] and pixel_values [B, 3, H, W]")
    if len(ids) != len(pixels):
        raise ValueError(f"input_ids have {len(ids)} rows but pixel_values {len(pixels)}")
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = inputs.get(name)
        if mask is not None and not bool((torch.as_tensor(mask) == 1).all()):
            raise UnsupportedError(f"an {name} that hides tokens", instead)
    if bool((ids == pad).any()):
        raise UnsupportedError("padding in input_ids", instead)
    return [Input(pixels[row : row + 1], ids[row]) for row in range(len(ids))]


@dataclass(frozen=True, eq=False)
class Pair:
    """States of `donor`'s run go into the run of `base`."""

    donor: Input
    base: Input

    @property
    def corruption(self) -> Corruption | Literal["none"]:
        """What makes the base of the donor."""
        swaps: list[Corruption] = []
        if not self.same_image:
            swaps.append(ImageSwap(self.base.pixels))
        if not torch.equal(self.donor.ids, self.base.ids):
            swaps.append(TokenSwap(self.base.ids))
        if not swaps:
            return UNCORRUPTED
        return swaps[0] if len(swaps) == 1 else Together(*swaps)

    @property
    def same_image(self) -> bool:
        """Both have the same picture."""
        return torch.equal(self.donor.pixels, self.base.pixels)


def patched_logits(
    tracer: Tracer, donor: Input, corruption: Corruption | Literal["none"], cells: Sequence[Cell]
) -> tuple[Tensor, Tensor]:
    """Logits [S, cells, 1, V] of the corrupted runs with each cell's states of the donor's run, and those
    [S, 1, V] of the corrupted runs alone: of the answer's first token, and where the model is. Raises as
    `Tracer.logits` does."""
    # The image encoder is run for every cell of a pass that changes it anywhere: those go by themselves.
    deep = [any(site.stack == "vision" for site in cell.sites) for cell in cells]
    order = sorted(range(len(cells)), key=deep.__getitem__)
    parts = []
    for _, numbers in groupby(order, key=deep.__getitem__):
        own = [cells[number] for number in numbers]
        parts.append(tracer.logits(donor.pixels, donor.ids, own, corruption=corruption))
    found = parts[0].cells
    if len(parts) > 1:
        found = torch.cat([part.cells for part in parts], dim=1)[:, torch.tensor(order).argsort()]
    # results may be written to, what the engine made in inference mode may not
    return found.to(tracer.device, copy=True), parts[0].low.to(tracer.device, copy=True)


def collects_outputs(hook: Any) -> bool:
    """Whether a hook is one of those by which transformers collects `hidden_states` and `attentions`."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def foreign_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks beside those."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return not all(map(collects_outputs, hooks))
