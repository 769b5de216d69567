"""A model that has its answers already: TransformerLens's loop runs over it without a forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache

from ..models import UnsupportedError
from .hooks import Patch, Place, layer_and_place, patch_of
from .model import Hook, HookedBlip
from .passes import BY_HAND, Found, Passes

HELD_BYTES = 2**28
"""Of logits that are made at once: more indices take further passes."""

Setter = Callable[[Tensor, list[int], Tensor], Tensor]

_log = logging.getLogger(__name__)


class Marks:
    """A cache of ones for the activations that are sites, so that what is copied from it shows; the others
    are those of a real one."""

    def __init__(self, cache: ActivationCache, model: HookedBlip, tokens: int) -> None:
        self._cache, self._cfg, self._tokens = cache, model.cfg, tokens

    def shape(self, place: Place) -> tuple[int, ...]:
        """That of an activation, of one row."""
        cfg = self._cfg
        parts = (cfg.n_heads, cfg.d_head) if place.form == "heads" else (cfg.d_model,)
        return 1, self._tokens, *parts

    def __getitem__(self, name: str) -> Tensor:
        found = layer_and_place(name)
        if found is None or found[1].kind is None:
            activation: Tensor = self._cache[name]
            return activation
        return torch.ones(()).expand(self.shape(found[1]))


class Replay:
    """Answers `run_with_hooks` for the patches (name, setter, index) that are `wanted`: from passes of the
    engine, made when they are first asked for, as many indices at once as memory allows.

    Hooks at places that are no sites run on the model itself, and a warning is logged.

    Raises UnsupportedError for patches that are no sites, ValueError for an index that does not exist.
    """

    def __init__(
        self,
        model: HookedBlip,
        cache: ActivationCache,
        passes: Passes,
        tokens: int,
        wanted: Sequence[tuple[str, Setter, list[int]]],
    ) -> None:
        self._model, self._passes = model, passes
        self.cfg = model.cfg
        self.marks = Marks(cache, model, tokens)
        patches = [self._wanted(*one) for one in wanted]
        self._order = {patch: number for number, patch in enumerate(dict.fromkeys(patches))}
        self._found: Found | None = None
        self._slow: set[str] = set()

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Sequence[tuple[str, Hook]]) -> Tensor:
        """Logits [B, A, V] with what the hook would have patched."""
        if not fwd_hooks:
            return self._with(None)
        ((name, hook),) = fwd_hooks
        found = layer_and_place(name)
        assert found is not None
        layer, place = found
        if place.kind is None:
            return self._by_hand(name, tokens, fwd_hooks)
        marked = hook(torch.zeros(self.marks.shape(place)), hook=None)
        assert marked is not None
        patch = patch_of(self._model.stack, layer, place, marked != 0)
        assert patch is not None
        return self._with(patch)

    def _wanted(self, name: str, setter: Setter, index: list[int]) -> Patch:
        found = layer_and_place(name)
        if found is None or found[0] >= self.cfg.n_layers:
            raise ValueError(f"the model has no hook {name!r}: it has {self.cfg.n_layers} layers")
        layer, place = found
        try:
            marked = setter(torch.zeros(self.marks.shape(place)), index, self.marks[name])
        except (AssertionError, IndexError) as error:
            said = str(error) or "it has another number of entries"
            raise ValueError(f"the index {index} does not fit {name!r}: {said}") from None
        patch = patch_of(self._model.stack, layer, place, marked != 0)
        if patch is None:
            raise UnsupportedError(f"patching single channels of {name!r}", BY_HAND)
        return patch

    def _with(self, patch: Patch | None) -> Tensor:
        found = self._found
        if found is None or (patch is not None and patch not in found.patched):
            order = list(self._order)
            first = 0 if patch is None else self._order[patch]
            count = max(1, HELD_BYTES // max(1, self._passes.bytes_each))
            self._found = found = self._passes.run(order[first : first + count])
        # a copy, for a metric may change it
        return (found.low if patch is None else found.patched[patch]).clone()

    def _by_hand(self, name: str, tokens: Tensor, fwd_hooks: Sequence[tuple[str, Hook]]) -> Tensor:
        part = name.rpartition("hook_")[2]
        if part not in self._slow:
            self._slow.add(part)
            _log.warning("%s has no site here: a forward pass of the model for each index of it", part)
        return self._model.run_with_hooks(tokens, fwd_hooks)
