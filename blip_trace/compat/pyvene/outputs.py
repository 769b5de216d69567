"""What pyvene's calls return, made of the logits of one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch.nn.functional as F
from pyvene.models.intervenable_base import IntervenableModelOutput
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipTextVisionModelOutput

from .cells import Call, Plan

ENTRIES = (
    "decoder_logits",
    "image_embeds",
    "encoder_last_hidden_state",
    "encoder_hidden_states",
    "decoder_hidden_states",
)
"""Of what pyvene's `BlipWrapper` returns."""


class Read:
    """What calls have read, as it was by then."""

    def __init__(self, model: nn.Module, calls: Iterable[Call]) -> None:
        given = {id(inputs): inputs for call in calls for inputs in (call.base, *call.source_list) if inputs}
        values = (value for inputs in given.values() for value in inputs.values())
        self._inputs = [value for value in values if isinstance(value, Tensor)]
        self._model = model
        self._weights = list(model.parameters())  # kept, so that no other gets its id
        self._stamps = self._now()

    def changed(self) -> bool:
        """Whether inputs or weights were changed in place, or weights exchanged, since then."""
        return self._now() != self._stamps

    def _now(self) -> list[tuple[int, int, int]]:
        tensors = (*self._inputs, *self._model.parameters())
        return [(id(x), x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors]


class _Later:
    """Stands where an entry is not computed yet."""


LATER = _Later()


def _complete(name: str) -> Any:
    """A dictionary's method of this name, run once all entries are computed."""
    plain = getattr(dict, name)

    def method(self: WrapperOutput, *args: Any) -> Any:
        self.complete()
        return plain(self, *args)

    return method


class WrapperOutput(dict[str, Any]):
    """What pyvene's `BlipWrapper` returns, with its entries and in their order.

    `decoder_logits` [B, 1, V] are there; the others are what pyvene's own pass of the same call gives, which
    is run when one of them is first read. It raises RuntimeError where inputs or weights were changed
    meanwhile. Copied or pickled it is a plain dictionary of all entries.
    """

    def __init__(self, logits: Tensor, run: Callable[[], dict[str, Any]], read: Read) -> None:
        super().__init__(dict.fromkeys(ENTRIES, LATER) | {"decoder_logits": logits})
        self._run = run
        self._read = read

    def complete(self) -> None:
        """Compute what is not computed yet."""
        later = [name for name in self if super(WrapperOutput, self).__getitem__(name) is LATER]
        if not later:
            return
        if self._read.changed():
            raise RuntimeError(
                f"{', '.join(later)} cannot be computed any more: the inputs or the model's weights were "
                "changed since the call"
            )
        found = self._run()
        self.update((name, found[name]) for name in later)

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is LATER:
            self.complete()
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        try:
            return self[name]
        except KeyError:
            return default

    def __iter__(self) -> Iterator[str]:
        # Overridden so that dict(self) and {**self} read the entries through __getitem__.
        return super().__iter__()

    values = _complete("values")
    items = _complete("items")
    pop = _complete("pop")
    popitem = _complete("popitem")
    setdefault = _complete("setdefault")
    copy = _complete("copy")
    __eq__ = _complete("__eq__")
    __or__ = _complete("__or__")
    __ror__ = _complete("__ror__")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self)})"

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[list[tuple[str, Any]]]]:
        return dict, (list(self.items()),)


def raw_output(whole: Any, logits: Tensor, labels: Tensor | None, embeds: Tensor) -> Any:
    """What `BlipForQuestionAnswering` returns, with logits [B, 1, V] of a decoder that is given labels [B, 2]
    or None, and image embeddings [B, N, D]."""
    loss = None
    if labels is not None:
        smoothing = whole.text_decoder.label_smoothing
        loss = F.cross_entropy(logits[:, 0], labels[:, 1], label_smoothing=smoothing)
    return BlipTextVisionModelOutput(loss=loss, image_embeds=embeds, last_hidden_state=embeds)


def returned(call: Call, planned: Plan, logits: Tensor, base: Any, counterfactual: Any) -> Any:
    """What `IntervenableModel.forward` returns of these outputs."""
    collected = [logits.clone() for _ in planned.collected] or None
    if call.return_dict:
        return IntervenableModelOutput(
            original_outputs=base, intervened_outputs=counterfactual, collected_activations=collected
        )
    return ((base, collected) if collected else base), counterfactual
