"""Which states can be restored, and which are restored together: Site, Cell, windows, grids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

STACKS = ("vision", "text_encoder", "text_decoder")


class Kind(NamedTuple):
    """Where a kind of state lives: at the end of a sublayer, either what the sublayer wrote to the residual
    stream (`update`) or the stream after it (`stream`, normalised in a post-norm layer)."""

    sublayer: Literal["self_attn", "cross_attn", "mlp"]
    place: Literal["update", "stream"]


KINDS: dict[str, Kind] = {
    "hidden": Kind("mlp", "stream"),
    "hidden_after_self_attn": Kind("self_attn", "stream"),
    "hidden_after_cross_attn": Kind("cross_attn", "stream"),
    "self_attn": Kind("self_attn", "update"),
    "cross_attn": Kind("cross_attn", "update"),
    "mlp": Kind("mlp", "update"),
}


@dataclass(frozen=True, order=True)
class Site:
    """One place whose state can be restored: layer and token count from 0."""

    stack: str
    layer: int
    kind: str
    token: int


@dataclass(frozen=True)
class Cell:
    """The sites restored together in one run: one number of the map."""

    sites: frozenset[Site]

    @classmethod
    def of(cls, sites: Iterable[Site]) -> Cell:
        """A cell of these sites; their order does not matter."""
        return cls(frozenset(sites))


def window_layers(layer: int, window: int, layers: int) -> range:
    """Layers that a window centred on `layer` restores, of a stack of `layers`.

    ROME's rule (Meng et al. 2022, `trace_important_window`): from max(0, l - w // 2) up to but not including
    min(L, l + ceil(w / 2)); a window of one is the layer itself.
    """
    return range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))


def grid_cells(stack: str, kind: str, tokens: int, layers: int, window: int) -> list[Cell]:
    """The cells of one map, token by token and layer by layer: cell (t, l) is number t * layers + l."""
    return [
        Cell.of(Site(stack, w, kind, token) for w in window_layers(layer, window, layers))
        for token in range(tokens)
        for layer in range(layers)
    ]


def check_names(what: str, names: Sequence[str], known: Iterable[str]) -> tuple[str, ...]:
    """`names` as a tuple without repetitions, in their order.

    Raises ValueError for an empty list and for a name that is not among `known`.
    """
    if isinstance(names, str):
        names = (names,)
    known = tuple(known)
    if not names:
        raise ValueError(f"no {what} given: choose among {', '.join(known)}")
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: choose among {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def check_maps(
    stacks: Sequence[str], kinds: Sequence[str], window: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stacks and kinds as tuples without repetitions.

    Raises ValueError for an unknown or missing name, for the vision stack, and for a window that is no whole
    number of layers.
    """
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(f"window must be a whole number of layers of at least 1, not {window!r}")
    stacks = check_names("stack", stacks, STACKS)
    if "vision" in stacks:
        raise ValueError(
            "the vision stack lies before the corrupted image embeddings: nothing in it can be restored"
        )
    return stacks, check_names("kind", kinds, KINDS)
