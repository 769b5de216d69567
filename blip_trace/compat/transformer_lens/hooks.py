"""The hook points of a BLIP's text stacks: TransformerLens's names, where they are in the Hugging Face model,
and which of our sites each one is."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ...sites import Site


class Place(NamedTuple):
    """Where an activation is found in each layer.

    module, side: a module of the Hugging Face layer ("" is the layer itself), and whether the activation is
    what it takes or what it gives. form: "stream" [B, T, C], "heads" [B, T, H, C / H] or "pattern" [B, H, T,
    keys]. kind: the kind of our sites that it is, `shift` layers further; None: none of them.
    """

    module: str
    side: Literal["input", "output"]
    form: Literal["stream", "heads", "pattern"]
    kind: str | None
    shift: int = 0


HOOKS: dict[str, Place] = {
    "hook_resid_pre": Place("", "input", "stream", "hidden", -1),
    "hook_attn_out": Place("attention.output.dense", "output", "stream", "self_attn"),
    "hook_resid_mid": Place("attention.output", "output", "stream", "hidden_after_self_attn"),
    "hook_cross_attn_out": Place("crossattention.output.dense", "output", "stream", "cross_attn"),
    "hook_resid_mid2": Place("crossattention.output", "output", "stream", "hidden_after_cross_attn"),
    "hook_mlp_out": Place("output.dense", "output", "stream", "mlp"),
    "hook_resid_post": Place("", "output", "stream", "hidden"),
    "attn.hook_z": Place("attention.output.dense", "input", "heads", "self_attn_head"),
    "hook_cross_attn_z": Place("crossattention.output.dense", "input", "heads", "cross_attn_head"),
    "attn.hook_q": Place("attention.self.query", "output", "heads", None),
    "attn.hook_k": Place("attention.self.key", "output", "heads", None),
    "attn.hook_v": Place("attention.self.value", "output", "heads", None),
    "attn.hook_pattern": Place("attention.self.dropout", "input", "pattern", None),
    "hook_cross_attn_q": Place("crossattention.self.query", "output", "heads", None),
    "hook_cross_attn_k": Place("crossattention.self.key", "output", "heads", None),
    "hook_cross_attn_v": Place("crossattention.self.value", "output", "heads", None),
    "hook_cross_attn_pattern": Place("crossattention.self.dropout", "input", "pattern", None),
}
"""Behind "blocks.{layer}.": the names of TransformerLens (those of its T5 for what only an encoder-decoder
has), and for what happens inside a cross-attention the names that its `get_act_name` makes of
"cross_attn_z" and the like.

A BLIP's layers are post-norm: the stream (`resid_...`) is taken behind the LayerNorm, as the next sublayer
reads it. `hook_resid_pre` of layer 0 are the embeddings, which are no site.
"""

_NAME = re.compile(r"blocks\.(\d+)\.(.+)")


def layer_and_place(name: str) -> tuple[int, Place] | None:
    """What a hook's full name says; None where it names no hook of a BLIP."""
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in HOOKS:
        return None
    return int(match[1]), HOOKS[match[2]]


def layers_of(model: Any, stack: str) -> Any:
    """The layers of a text stack of the Hugging Face model."""
    return (model.text_encoder if stack == "text_encoder" else model.text_decoder.bert).encoder.layer


class Words(NamedTuple):
    """The embeddings of these tokens: what layer 0 takes."""

    tokens: frozenset[int]


Patch = frozenset[Site] | Words
"""What is patched together in one run."""


def patch_of(stack: str, layer: int, place: Place, marked: Tensor) -> Patch | None:
    """What an activation [1, T, C] or [1, T, H, C / H] is made of where it is `marked` (bool of its shape);
    None where no sites are just that."""
    assert place.kind is not None
    whole = marked[0].all(-1)
    if not whole.equal(marked[0].any(-1)):
        return None
    layer += place.shift
    where = whole.nonzero().tolist()
    if layer < 0:
        return Words(frozenset(token for (token,) in where))
    return frozenset(Site(stack, layer, place.kind, token, *head) for token, *head in where)
