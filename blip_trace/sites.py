"""Which states can be restored, frozen or cut off, and which of it happens in one run: Site, Cut, Cell,
grids."""

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
VISION_KINDS = ("hidden", "self_attn", "mlp")
"""What the image encoder has of them: it attends to nothing but itself."""


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
class Cut:
    """Edges of one layer's attention taken away: the tokens `queries` do not see the tokens `keys`, in any
    head (attention knockout: Geva et al. 2023, section 5).

    `keys` are tokens of the same stack (sublayer "self_attn") or of the one that it attends to
    ("cross_attn": image tokens, of which 0 is the class token, or tokens of the question).
    """

    stack: str
    layer: int
    sublayer: Literal["self_attn", "cross_attn"]
    queries: frozenset[int]
    keys: frozenset[int]


@dataclass(frozen=True)
class Cell:
    """What one run changes: one number of the map.

    `sites` take their states from the other run: the clean one where a corrupted run is restored. `frozen`
    sites keep those of the run that is changed, whatever happens before them. `cuts` are attention edges
    that it lacks.
    """

    sites: frozenset[Site] = frozenset()
    frozen: frozenset[Site] = frozenset()
    cuts: frozenset[Cut] = frozenset()

    def __post_init__(self) -> None:
        if both := self.sites & self.frozen:
            raise ValueError(f"a site cannot be restored and frozen at once: {next(iter(both))}")

    @classmethod
    def of(cls, sites: Iterable[Site] = (), frozen: Iterable[Site] = (), cuts: Iterable[Cut] = ()) -> Cell:
        """A cell of these; their order does not matter."""
        return cls(frozenset(sites), frozenset(frozen), frozenset(cuts))

    @classmethod
    def knockout(
        cls,
        stack: str,
        sublayer: Literal["self_attn", "cross_attn"],
        queries: Iterable[int],
        keys: Iterable[int],
        layers: Iterable[int],
    ) -> Cell:
        """A cell without these attention edges in these layers: see `Cut`."""
        edges = frozenset(queries), frozenset(keys)
        return cls.of(cuts=(Cut(stack, layer, sublayer, *edges) for layer in layers))

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


class Shape(NamedTuple):
    """What a stack has: tokens, layers, heads, the tokens of the stack that its cross-attention reads (0
    where it has none), and whether a token sees only those before it."""

    tokens: int
    layers: int
    heads: int
    source: int
    causal: bool


def check_cells(
    cells: Sequence[Cell | Site | Iterable[Site]], shapes: Mapping[str, Shape]
) -> tuple[Cell, ...]:
    """Cells of what may also be given as a site or as several; `shapes` of the stacks that can be changed.

    Raises ValueError where there are none, for a cell that changes nothing, for a site or an edge that does
    not exist and for a cut that leaves a token nothing to attend to; TypeError for anything else.
    """
    made = []
    for given in cells:
        cell = given if isinstance(given, Cell) else Cell.of([given] if isinstance(given, Site) else given)
        if not cell.sites and not cell.cuts:
            raise ValueError("a cell without sites restores nothing")
        for site in cell.sites | cell.frozen:
            _check_site(site, shapes)
        _check_cuts(cell.cuts, shapes)
        made.append(cell)
    if not made:
        raise ValueError("no cells given to restore")
    return tuple(made)


def _check_site(site: object, shapes: Mapping[str, Shape]) -> None:
    if not isinstance(site, Site):
        raise TypeError(f"a cell is made of sites, not of {type(site).__name__}")
    check_names("stack", site.stack, shapes)
    shape = shapes[site.stack]
    check_names("kind", site.kind, VISION_KINDS if site.stack == "vision" else KINDS)
    _check_number(site.stack, "layer", site.layer, shape.layers)
    _check_number(site.stack, "token", site.token, shape.tokens)
    if site.head is not None:
        _check_number(site.stack, "head", site.head, shape.heads)


def _check_cuts(cuts: Iterable[object], shapes: Mapping[str, Shape]) -> None:
    lost: dict[tuple[str, int, str, int], set[int]] = {}
    for cut in cuts:
        if not isinstance(cut, Cut):
            raise TypeError(f"attention edges are given by a Cut, not by {type(cut).__name__}")
        check_names("stack", cut.stack, [stack for stack in shapes if stack != "vision"])
        shape = shapes[cut.stack]
        check_names("sublayer", cut.sublayer, ["self_attn", "cross_attn"] if shape.source else ["self_attn"])
        _check_number(cut.stack, "layer", cut.layer, shape.layers)
        keys = shape.tokens if cut.sublayer == "self_attn" else shape.source
        for key in cut.keys:
            _check_number(f"what {cut.stack} attends to", "token", key, keys)
        for query in cut.queries:
            _check_number(cut.stack, "token", query, shape.tokens)
            seen = range(query + 1) if cut.sublayer == "self_attn" and shape.causal else range(keys)
            gone = lost.setdefault((cut.stack, cut.layer, cut.sublayer, query), set())
            gone.update(cut.keys)
            if gone.issuperset(seen):
                raise ValueError(
                    f"token {query} of {cut.stack} has nothing left to attend to in layer {cut.layer}: "
                    f"all its {cut.sublayer} edges are cut"
                )


def _check_number(what: str, name: str, number: object, limit: int) -> None:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < limit:
        raise ValueError(f"{what} has no {name} {number!r}: it has {limit} (0 to {limit - 1})")


def window_layers(layer: int, window: int, layers: int) -> range:
    """Layers that a window centred on `layer` restores, of a stack of `layers`.

    ROME's rule (Meng et al. 2022, `trace_important_window`): from max(0, l - w // 2) up to but not including
    min(L, l + ceil(w / 2)); a window of one is the layer itself.
    """
    return range(max(0, layer - window // 2), min(layers, layer - (-window // 2)))


def grid_cells(
    stack: str,
    kind: str,
    groups: Iterable[Sequence[int]],
    shape: Shape,
    window: int = 1,
    sever: Sequence[str] = (),
) -> list[Cell]:
    """The cells of one map, group of tokens by group of tokens and layer by layer; of a kind that has heads,
    head by head of those.

    A group's tokens are restored together: usually there is one. `sever`: kinds that are frozen in all layers
    at the tokens restored (the severed paths of Meng et al. 2022, section 2.2).
    """
    groups = [tuple(group) for group in groups]
    return [
        _severed(
            {
                Site(stack, near, kind, token, head)
                for near in window_layers(layer, window, shape.layers)
                for token in group
            },
            sever,
            shape.layers,
        )
        for head in (range(shape.heads) if kind in HEAD_KINDS else (None,))
        for group in groups
        for layer in range(shape.layers)
    ]


def _severed(sites: set[Site], sever: Sequence[str], layers: int) -> Cell:
    first = min(site.layer for site in sites)
    frozen = {
        Site(stack, layer, kind, token)
        for stack, token in {(site.stack, site.token) for site in sites}
        for kind in sever
        for layer in range(first, layers)  # before that nothing differs
    }
    return Cell.of(sites, frozen - sites)


def patch_groups(side: int, block: int) -> dict[str, tuple[int, ...]]:
    """The image tokens of a picture of side x side patches, by label: the class token, then blocks of
    block x block patches from the top left on, row by row (smaller ones at the right and lower edge)."""
    groups: dict[str, tuple[int, ...]] = {"class": (0,)}
    for top in range(0, side, block):
        for left in range(0, side, block):
            rows, columns = (range(first, min(first + block, side)) for first in (top, left))
            groups[f"{top // block},{left // block}"] = tuple(1 + y * side + x for y in rows for x in columns)
    return groups


def check_count(what: str, count: object, of: str = "") -> None:
    """Raises ValueError where `count` is no whole number, `of` whatever is counted, of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(
            f"{what} must be a whole number {f'of {of} ' if of else ''}of at least 1, not {count!r}"
        )


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
    stacks: Sequence[str], kinds: Sequence[str], window: int, known: Iterable[str] = STACKS
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stacks and kinds as tuples without repetitions; `known`: the stacks of the model.

    Raises ValueError for an unknown or missing name, for a kind that a stack does not have, and for a window
    that is no whole number of layers.
    """
    check_count("window", window, "layers")
    stacks, kinds = check_names("stack", stacks, known), check_names("kind", kinds, KINDS)
    if "vision" in stacks:
        for kind in kinds:
            if kind not in VISION_KINDS:
                raise ValueError(f"the vision stack has no kind {kind!r}: it has {', '.join(VISION_KINDS)}")
    return stacks, kinds


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
