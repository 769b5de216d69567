"""The unmodified Hugging Face model over a batch of rows, with functions at its hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ... import hooks
from ...devices import send
from ...tracer import Tracer
from .hooks import Place, layer_and_place, layers_of
from .rows import Row, stacked

Edit = Callable[[Tensor], Tensor | None]
"""Takes an activation, which it may change, and returns what is to stand in its place; None: that."""


@torch.no_grad()
def forward(tracer: Tracer, rows: Sequence[Row], answer: Tensor) -> Tensor:
    """Logits [B, A, V]: of a decoder of its own tokens at each of them, else of the answer [A] behind a
    question at each of its; of a matching model [B, 1, 2]."""
    model: Any = tracer.model
    ids = send(torch.stack([row.ids for row in rows]), model.device)
    images, words = stacked(rows, hooks.word_table(model))
    # a copy, for transformers adds the positions to it in place
    edits = {model.get_input_embeddings(): lambda _: words.clone()} if _corrupted(rows) else {}
    logits: Tensor
    if tracer.program.task == "continue":
        with hooks.editing(edits):
            logits = model.text_decoder(input_ids=ids, encoder_hidden_states=images, use_cache=False).logits
        return logits
    with hooks.editing(edits):
        text = model.text_encoder(input_ids=ids, encoder_hidden_states=images).last_hidden_state
    if tracer.program.task == "match":
        logits = model.itm_head(text[:, :1])
        return logits
    decoded = [row.decoded for row in rows if row.decoded is not None]
    start = torch.tensor([tracer.program.start_token])
    given = torch.stack(decoded) if decoded else torch.cat((start, answer[:-1])).expand(len(rows), -1)
    given = send(given, model.device)
    logits = model.text_decoder(input_ids=given, encoder_hidden_states=text, use_cache=False).logits
    return logits


def _corrupted(rows: Sequence[Row]) -> bool:
    return any(row.words is not None for row in rows)


@contextmanager
def hooked(model: Any, stack: str, edits: Iterable[tuple[str, Edit]]) -> Iterator[None]:
    """Hand the activations of these hook points (full names) to functions, in the forward passes that are run
    inside."""
    layers, heads = layers_of(model, stack), hooks.text_heads(model)
    handles = []
    try:
        for name, edit in edits:
            found = layer_and_place(name)
            assert found is not None
            layer, place = found
            handles.append(_attach(layers[layer].get_submodule(place.module), place, heads, edit))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attach(module: nn.Module, place: Place, heads: int, edit: Edit) -> RemovableHandle:
    def edited(found: Tensor) -> Tensor:
        found = found.clone()
        if place.form == "heads":
            found = found.unflatten(-1, (heads, -1))
        made = edit(found)
        made = found if made is None else made
        return made.flatten(-2) if place.form == "heads" else made

    if place.side == "input":
        return module.register_forward_pre_hook(lambda _, args: (edited(args[0]), *args[1:]))
    return module.register_forward_hook(lambda _, __, output: edited(output))
