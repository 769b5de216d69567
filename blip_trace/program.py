"""A model as data: Program > Stack > Layer > Sublayer, packed weights and flags, no code per model.

`lowering/` makes Programs out of Hugging Face models; `engine.py` runs them. Weights are views of the
model's own wherever no repacking is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import torch
from torch import Tensor

SublayerName = Literal["self_attn", "cross_attn", "mlp"]


@dataclass(frozen=True)
class Linear:
    """y = x weight^T + bias; weight [out, in], bias [out]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Norm:
    """LayerNorm over the last dimension; weight and bias [C]."""

    weight: Tensor
    bias: Tensor
    eps: float


@dataclass(frozen=True)
class SelfAttention:
    """qkv packs query, key and value projections [3 C, C]; `out` carries the value bias too."""

    qkv: Linear
    out: Linear
    norm: Norm
    heads: int
    causal: bool
    name: Literal["self_attn"] = "self_attn"


@dataclass(frozen=True)
class CrossAttention:
    """Attention to another stack's final states [m, D].

    `key` and `value` [C, D] have no biases: a key's drops out of the softmax, a value's is in `out.bias`.
    """

    query: Linear
    key: Tensor
    value: Tensor
    out: Linear
    norm: Norm
    heads: int
    name: Literal["cross_attn"] = "cross_attn"


@dataclass(frozen=True)
class Mlp:
    """down(GELU(up(x)))."""

    up: Linear
    down: Linear
    norm: Norm
    name: Literal["mlp"] = "mlp"


Sublayer = SelfAttention | CrossAttention | Mlp


@dataclass(frozen=True)
class Layer:
    """Sublayers in the order in which they write to the residual stream."""

    sublayers: tuple[Sublayer, ...]


@dataclass(frozen=True)
class TokenEmbedding:
    """Word [V, C] plus learned position [P, C], then `norm`."""

    words: Tensor
    positions: Tensor
    norm: Norm


@dataclass(frozen=True)
class PatchEmbedding:
    """Image patches to tokens: projection [C, 3 p p], a class token, learned positions [1 + patches, C]."""

    projection: Linear
    class_token: Tensor
    positions: Tensor
    patch_size: int
    image_size: int


@dataclass(frozen=True)
class Stack:
    """A run of layers over one residual stream.

    `norm_first`: a sublayer's norm is applied to its input (pre-norm) instead of to its sum with the stream.
    `attends_to`: the stack whose final states its cross-attention reads.
    """

    name: str
    embedding: TokenEmbedding | PatchEmbedding
    layers: tuple[Layer, ...]
    norm_first: bool
    final_norm: Norm | None = None
    attends_to: str | None = None

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.layers[0].sublayers[0].norm.weight.shape[0]

    @property
    def heads(self) -> int:
        """Heads of its attention."""
        return next(s.heads for s in self.layers[0].sublayers if isinstance(s, SelfAttention))

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return next(s.causal for s in self.layers[0].sublayers if isinstance(s, SelfAttention))

    def steps(self) -> Iterator[tuple[int, Sublayer]]:
        """Every sublayer with the number of its layer, in the order of computation."""
        for number, layer in enumerate(self.layers):
            for sublayer in layer.sublayers:
                yield number, sublayer


@dataclass(frozen=True)
class Head:
    """From the last stack's states to what is scored: GELU(dense) and norm where there are such, decoder
    [V, C] of a vocabulary or of classes."""

    dense: Linear | None
    norm: Norm | None
    decoder: Linear


@dataclass(frozen=True)
class Program:
    """A model that says something about an image.

    `image` encodes the picture; the text stacks follow in the order of computation, the first attending to
    the image, each further one to that before it; `head` reads the last one. `task` says which text goes
    where:

    - "answer": a question into the first text stack, its answer, begun by `start_token`, into the second;
    - "continue": a text and what follows it into the one text stack, which is causal;
    - "match": a text into the one text stack; its first token says whether it fits the image.
    """

    image: Stack
    texts: tuple[Stack, ...]
    head: Head
    task: Literal["answer", "continue", "match"]
    start_token: int

    @property
    def stacks(self) -> dict[str, Stack]:
        """The stacks by name, in the order of computation."""
        return {stack.name: stack for stack in (self.image, *self.texts)}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.decoder.weight.device

    def tensors(self) -> Iterator[Tensor]:
        """Every weight of the program."""
        yield from _tensors(self)


def _tensors(node: object) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif is_dataclass(node):
        for field in fields(node):
            yield from _tensors(getattr(node, field.name))
    elif isinstance(node, tuple):
        for child in node:
            yield from _tensors(child)
