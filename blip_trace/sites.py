"""Which states can be restored, and which are restored together: Site, Cell, windows, grids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

STACKS = ("vision", "text_encoder", "text_decoder")
DIRECTIONS = ("denoise", "noise")
"""Clean states into the corrupted run, or corrupted states into the clean run."""


class Kind(NamedTuple):
    """Where a kind of state lives: at the end of a sublayer, either what the sublayer wrote to the residual
    stream (`update`) or the stream after it (`stream`, normalised in a post-norm layer), or one head's part
    of what an attention projects for that (`head`)."""

    sublayer: Literal["self_attn", "cross_attn", "mlp"]
    place: Literal["update", "stream", "head"]


KINDS: dict[str, Kind] = {
    "hidden": Kind("mlp", "stream"),
    "hidden_after_self_attn": Kind("self_attn", "stream"),
    "hidden_after_cross_attn": Kind("cross_attn", "stream"),
    "self_attn": Kind("self_attn", "update"),
    "cross_attn": Kind("cross_attn", "update"),
    "mlp": Kind("mlp", "update"),
    "self_attn_head": Kind("self_attn", "head"),
    "cross_attn_head": Kind("cross_attn", "head"),
}
HEAD_KINDS = tuple(name for name, kind in KINDS.items() if kind.place == "head")


@dataclass(frozen=True)
class Site:
    """One place whose state can be restored: layer, token and head count from 0. Kinds of a whole state have
    no head."""

    stack: str
    layer: int
    kind: str
    token: int
    head: int | None = None

    def __post_init__(self) -> None:
        if (self.head is None) == (self.kind in HEAD_KINDS):
            raise ValueError(f"a site of kind {self.kind!r} with head {self.head}: only heads have a number")


@dataclass(frozen=True)
class Cell:
    """The sites restored together in one run: one number of the map."""

    sites: frozenset[Site]

    @classmethod
    def of(cls, sites: Iterable[Site]) -> Cell:
        """A cell of these sites; their order does not matter."""
        return cls(frozenset(sites))

    @classmethod
    def each(cls, stack: str, kind: str, index: ArrayLike) -> list[Cell]:
        """A cell of one site for each row of `index`, whole numbers [n, 2] of layers and tokens or, for kinds
        of heads, [n, 3] of layers, tokens and heads. Raises ValueError for another shape."""
        rows = np.asarray(index)
        columns = 3 if kind in HEAD_KINDS else 2
        if rows.ndim != 2 or rows.shape[1] != columns or not np.issubdtype(rows.dtype, np.integer):
            raise ValueError(
                f"sites of kind {kind!r} are whole numbers [n, {columns}], not {list(rows.shape)}"
            )
        return [cls.of([Site(stack, layer, kind, token, *head)]) for layer, token, *head in rows.tolist()]


def check_cells(
    cells: Sequence[Cell | Site | Iterable[Site]], lengths: Mapping[str, int], layers: int, heads: int
) -> tuple[Cell, ...]:
    """Cells of what may also be given as a site or as several; `lengths`: tokens of each stack.

    Raises ValueError where there are none, for a cell without sites and for a site that does not exist,
    TypeError for anything else.
    """
    made = []
    for given in cells:
        cell = given if isinstance(given, Cell) else Cell.of([given] if isinstance(given, Site) else given)
        if not cell.sites:
            raise ValueError("a cell without sites restores nothing")
        for site in cell.sites:
            _check_site(site, lengths, layers, heads)
        made.append(cell)
    if not made:
        raise ValueError("no cells given to restore")
    return tuple(made)


def _check_site(site: object, lengths: Mapping[str, int], layers: int, heads: int) -> None:
    if not isinstance(site, Site):
        raise TypeError(f"a cell is made of sites, not of {type(site).__name__}")
    check_names("stack", site.stack, lengths)
    check_names("kind", site.kind, KINDS)
    limits = {"layer": (site.layer, layers), "token": (site.token, lengths[site.stack])}
    if site.head is not None:
        limits["head"] = (site.head, heads)
    for what, (number, limit) in limits.items():
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < limit:
            raise ValueError(f"{site.stack} has no {what} {number!r}: it has {limit} (0 to {limit - 1})")


def window_layers(layer: int, window: int, layers: int) -> range:
    """Layers that a window centred on `layer` restores, of a stack of `layers`.

    ROME's rule (Meng et al. 2022, `trace_important_window`): from max(0, l - w // 2) up to but not including
    min(L, l + ceil(w / 2)); a window of one is the layer itself.
    """
    return range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))


def grid_cells(
    stack: str, kind: str, tokens: Iterable[int], layers: int, window: int, heads: int
) -> list[Cell]:
    """The cells of one map, token by token and layer by layer; of a kind that has heads, head by head of
    those."""
    tokens = tuple(tokens)
    return [
        Cell.of(Site(stack, w, kind, token, head) for w in window_layers(layer, window, layers))
        for head in (range(heads) if kind in HEAD_KINDS else (None,))
        for token in tokens
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


def check_tokens(tokens: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """Positions in a stack of `length` tokens, counted from 0; None: all.

    Raises ValueError for an empty list and for a token that is not there.
    """
    if tokens is None:
        return tuple(range(length))
    if not tokens:
        raise ValueError("no tokens given to restore")
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or not -length <= token < length:
            raise ValueError(f"there is no token {token!r}: this stack has {length} (0 to {length - 1})")
    return tuple(dict.fromkeys(token % length for token in tokens))
