"""What the notebooks call layers, and which sites those are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ...sites import Cell, Site, check_names
from ..models import UnsupportedError

BLOCKS = {"text_encoder": "model_text_enc", "text_decoder": "model_text_dec.bert"}
"""The notebooks' blocks, which are our stacks, and their modules in `customblip_temp`."""
STATES = {
    None: "hidden",
    "attention": "hidden_after_self_attn",
    "crossattention": "hidden_after_cross_attn",
    "attention.output.dense": "self_attn",
    "crossattention.output.dense": "cross_attn",
    "output.dense": "mlp",
}
"""The kind of state that a layer's module of this name puts out; None: the layer itself.

`attention` and `crossattention` are states of the residual stream, after the residual and its LayerNorm.
"""
_LAYER = re.compile(r"(model_text_enc|model_text_dec\.bert)\.encoder\.layer\.(\d+)(?:\.(.+))?")
_EMBEDDINGS = frozenset(f"{module}.embeddings" for module in BLOCKS.values())
_STACKS = {module: block for block, module in BLOCKS.items()}


def layername(model: Any, num: int, block_name: str, kind: str | None = None) -> str:
    """The name within `customblip_temp` of a layer's module: its `kind`, or of the layer itself; "embed" for
    the block's embeddings, "cls.decoder" for what makes the logits of the text decoder.

    `model` is there for the notebooks' sake. Raises ValueError for an unknown block.
    """
    check_names("block_name", [block_name], BLOCKS)
    module = BLOCKS[block_name]
    if kind == "embed":
        return f"{module}.embeddings"
    if kind == "cls.decoder" and block_name == "text_decoder":
        return "model_text_dec.cls.predictions.decoder"
    return f"{module}.encoder.layer.{num}" + ("" if kind is None else f".{kind}")


def cell_of(new_model: Any, patching_layers: Sequence[tuple[int, str]], tokens: Mapping[str, int]) -> Cell:
    """The cell that restores these (token, layer name) pairs, in stacks of so many `tokens`; it may be empty.

    Embeddings add nothing to it: no image has entered them, so both runs have the same. Raises TypeError for
    what is no such pair, ValueError for a name or a token that is not there, and UnsupportedError for modules
    whose outputs cannot be restored.
    """
    sites = set()
    for pair in patching_layers:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[1], str)):
            raise TypeError(f"patching_layers holds (token, layer name) pairs, not {pair!r}")
        token, name = pair
        if name in _EMBEDDINGS:
            continue
        found = _LAYER.fullmatch(name)
        if found is None or found[3] not in STATES:
            _refuse(new_model, name)
        stack = _STACKS[found[1]]
        if isinstance(token, int) and not isinstance(token, bool) and -tokens[stack] <= token < 0:
            token += tokens[stack]
        sites.add(Site(stack, int(found[2]), STATES[found[3]], token))
    return Cell.of(sites)


def _refuse(new_model: Any, name: str) -> NoReturn:
    if name not in dict(new_model.named_modules()):
        raise ValueError(f"new_model has no module {name!r}")
    if name.startswith("model_vis"):
        instead = (
            "the notebooks corrupt what it puts out; restore states of the image encoder by "
            'Tracer.trace(stacks=["vision"], corruption=PixelNoise())'
        )
    else:
        kinds = ", ".join(map(repr, STATES.keys() - {None}))
        instead = f"restore a layer, or one of its modules {kinds}"
    raise UnsupportedError(f"restoring the output of {name}", instead)
