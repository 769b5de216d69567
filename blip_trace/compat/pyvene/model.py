"""The model behind pyvene's wrapper, and what pyvene takes from a model, put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pyvene.models.blip.modelings_blip import BlipWrapper
from torch import nn
from transformers import BlipForQuestionAnswering

from ..models import UnsupportedError
from ..wrapped import collects_outputs

PYVENE = "pyvene itself runs the call"
"""What is done instead."""
PARTS = {"vision_model": "model_vis", "text_encoder": "model_text_enc", "text_decoder": "model_text_dec"}
"""Of the Hugging Face model: their names in pyvene's wrapper."""


class _Kept:
    """The model put together of a wrapper's parts, kept by one of them; copies of it begin without."""

    model: Any = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def whole_model(model: nn.Module) -> Any:
    """The `BlipForQuestionAnswering` that pyvene is given, or whose parts its `BlipWrapper` holds: the same
    weights, not a copy. Raises UnsupportedError for another model and for one with a forward of its own."""
    for known in (BlipForQuestionAnswering, BlipWrapper):
        if isinstance(model, known):
            break
    else:
        raise UnsupportedError(f"a {type(model).__name__}", PYVENE)
    if type(model).forward is not known.forward:
        raise UnsupportedError(f"{type(model).__name__} with a forward of its own", PYVENE)
    if isinstance(model, BlipForQuestionAnswering):
        return model
    parts = {name: getattr(model, own) for name, own in PARTS.items()}
    kept: _Kept = vars(parts["text_encoder"]).setdefault("_blip_trace_whole", _Kept())
    if kept.model is None or any(getattr(kept.model, name) is not part for name, part in parts.items()):
        with torch.device("meta"):  # no memory for weights that are exchanged at once
            whole = BlipForQuestionAnswering(model.config)
        for name, part in parts.items():
            setattr(whole, name, part)
        kept.model = whole
    kept.model.decoder_start_token_id = model.decoder_start_token_id
    return kept.model


class Flags:
    """Which modules of a model were in training mode, and which of its weights took gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]
        self._weights = [(weight, weight.requires_grad) for weight in model.parameters()]

    def put_back(self) -> None:
        """Make it so again."""
        for module, mode in self._modes:
            if module.training != mode:
                module.training = mode
        for weight, takes in self._weights:
            if weight.requires_grad != takes:
                weight.requires_grad_(takes)


@contextmanager
def foreign_hooks_aside(model: nn.Module) -> Iterator[None]:
    """Take the model's forward hooks away, as pyvene does, and put them back at the end, as it does not.

    Those stay by which transformers collects `hidden_states` and `attentions`: without them the model would
    return none, for it does not install them twice.
    """
    held = [
        (hooks, dict(hooks))
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    ]
    for hooks, before in held:
        for number, hook in before.items():
            if not collects_outputs(hook):
                del hooks[number]
    try:
        yield
    finally:
        for hooks, before in held:
            added = {number: hook for number, hook in hooks.items() if number not in before}
            hooks.clear()
            hooks.update(before | added)
