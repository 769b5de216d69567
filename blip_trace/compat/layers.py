"""How tools that know a model by its modules name the states that they patch, and the sites that these are.

A name is that of a module of the Hugging Face model (`named_modules`), whose output is the state.
"""

from __future__ import annotations

import re

from ..sites import Site
from .models import UnsupportedError

STACKS = {
    "text_encoder": "text_encoder.encoder.layer",
    "text_decoder": "text_decoder.bert.encoder.layer",
}
"""The text stacks, and where their layers are."""

CONTEXTS = {"attention.self": "self_attn_head", "crossattention.self": "cross_attn_head"}
"""Modules that put out the heads side by side, before the output projection."""

KINDS = {
    "": "hidden",
    "output": "hidden",
    "output.LayerNorm": "hidden",
    "output.dense": "mlp",
    "attention": "hidden_after_self_attn",
    "attention.output": "hidden_after_self_attn",
    "attention.output.LayerNorm": "hidden_after_self_attn",
    "attention.output.dense": "self_attn",
    "crossattention": "hidden_after_cross_attn",
    "crossattention.output": "hidden_after_cross_attn",
    "crossattention.output.LayerNorm": "hidden_after_cross_attn",
    "crossattention.output.dense": "cross_attn",
    # the projection behind them works token by token: all heads of a token together are what it writes
    "attention.self": "self_attn",
    "crossattention.self": "cross_attn",
}
"""Modules of a layer, and the kind of state that each puts out."""

_NAME = re.compile(rf"({'|'.join(map(re.escape, STACKS.values()))})\.(\d+)(?:\.(.+))?")


def layer_name(stack: str, layer: int, module: str = "") -> str:
    """The name of a layer, or of a module in it."""
    return f"{STACKS[stack]}.{layer}{'.' if module else ''}{module}"


def site(name: str, token: int, head: int | None = None) -> Site:
    """The state that this module puts out at a token; head: one head's part of it.

    Raises UnsupportedError for modules that are no state of a text layer, and for a head of one that has
    none.
    """
    match = _NAME.fullmatch(name)
    stack, layer, module = match.groups(default="") if match else ("", "", None)
    if module not in KINDS:
        raise UnsupportedError(
            f"patching {name!r}", "its states are those of a text layer and of its sublayers; hook it by hand"
        )
    if head is not None and module not in CONTEXTS:
        raise UnsupportedError(
            f"a head of {name!r}", "only attention.self and crossattention.self have heads"
        )
    kind = KINDS[module] if head is None else CONTEXTS[module]
    owner = next(own for own, path in STACKS.items() if path == stack)
    return Site(owner, int(layer), kind, int(token), head)
