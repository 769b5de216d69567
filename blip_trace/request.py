"""What a user asks to be mapped, checked, and the cells that this makes for one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from .attribution import Method, check_method
from .metrics import Reads, check_metrics, reads_of
from .sites import (
    DIRECTIONS,
    HEAD_KINDS,
    KINDS,
    Cell,
    Shape,
    check_count,
    check_maps,
    check_names,
    check_tokens,
    grid_cells,
    patch_groups,
)

SEVERED = tuple(name for name, kind in KINDS.items() if kind.place == "update")
"""Kinds whose path can be severed: what a sublayer writes."""


class Options(TypedDict, total=False):
    """Further options of a trace.

    tokens: for a text stack, the tokens whose states are restored, from 0 or from -1 backwards; all of them
        in a stack that is not named. Maps of heads have many cells: those of the last token alone are
        `tokens={"text_encoder": [-1]}`.
    direction: "denoise", or "noise": corrupted states are put into the clean run, and what a cell shows is
        how much of the answer that leaves.
    metrics: what is measured, all in one pass: see `blip_trace.metrics.METRICS`. The first is what the result
        shows unless asked for another (`TraceResult.by`).
    sever: kinds among self_attn, cross_attn and mlp that keep, at the restored tokens, what they write in the
        corrupted run (Meng et al. 2022, figure 3): the state is restored, but cannot act through them.
    patch_group: in the vision stack a cell restores blocks of patch_group x patch_group patches; the class
        token is a cell of its own.
    method: "exact"; "attribution", which estimates all cells from one backward pass, or
        "integrated_gradients", from sixteen; "screen", which estimates them and does the fifty largest
        exactly; or an `Attribution` or `Screen` with other numbers.
    """

    tokens: Mapping[str, Sequence[int]] | None
    direction: str
    metrics: Sequence[str]
    sever: Sequence[str]
    patch_group: int
    method: str | Method


@dataclass(frozen=True)
class Grid:
    """One map of one question: its cells [heads?, groups, layers], a label and a first token for each
    group."""

    cells: tuple[Cell, ...]
    shape: tuple[int, ...]
    labels: tuple[str, ...] | None
    positions: tuple[int, ...]


Grids = Mapping[tuple[str, str], Grid]


@dataclass(frozen=True)
class Request:
    """A checked request for maps; see `Tracer.trace` and `Options`."""

    stacks: tuple[str, ...]
    kinds: tuple[str, ...]
    window: int
    tokens: Mapping[str, Sequence[int]]
    direction: str
    metrics: tuple[str, ...]
    sever: tuple[str, ...]
    patch_group: int
    method: Method | None
    _made: dict[tuple[tuple[str, Shape], ...], Grids] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reads(self) -> Reads:
        """What the metrics take."""
        return reads_of(self.metrics)

    def grids(self, shapes: Mapping[str, Shape]) -> Grids:
        """The maps of a question whose stacks have these shapes, by (stack, kind), made once for each shape.

        Raises ValueError for tokens that are not there.
        """
        key = tuple(shapes.items())
        if key not in self._made:
            self._made[key] = self._grids(shapes)
        return self._made[key]

    def _grids(self, shapes: Mapping[str, Shape]) -> Grids:
        grids = {}
        for stack in self.stacks:
            shape = shapes[stack]
            if stack == "vision":
                named = patch_groups(round((shape.tokens - 1) ** 0.5), self.patch_group)
                labels, groups = tuple(named), list(named.values())
            else:
                labels = None
                groups = [(token,) for token in check_tokens(self.tokens.get(stack), shape.tokens)]
            for kind in self.kinds:
                cells = grid_cells(stack, kind, groups, shape, self.window, self.sever)
                heads = (shape.heads,) if kind in HEAD_KINDS else ()
                size = (*heads, len(groups), shape.layers)
                grids[stack, kind] = Grid(tuple(cells), size, labels, tuple(group[0] for group in groups))
        return grids

    def settings(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "window": self.window,
            "direction": self.direction,
            "sever": list(self.sever),
            "patch_group": self.patch_group,
            "method": "exact" if self.method is None else repr(self.method),
        }


def check_request(
    known: Sequence[str],
    stacks: Sequence[str],
    kinds: Sequence[str],
    window: int,
    foil: object,
    *,
    tokens: Mapping[str, Sequence[int]] | None = None,
    direction: str = "denoise",
    metrics: Sequence[str] = ("probability",),
    sever: Sequence[str] = (),
    patch_group: int = 1,
    method: str | Method = "exact",
) -> Request:
    """A request for maps of a model that has the stacks `known`. Raises ValueError, in one sentence."""
    stacks, kinds = check_maps(stacks, kinds, window, known)
    check_names("direction", direction, DIRECTIONS)
    check_count("patch_group", patch_group, "patches")
    if tokens:
        check_names("stack", list(tokens), [stack for stack in stacks if stack != "vision"])
    metrics = check_metrics(metrics, foil)
    sever = check_names("severed kind", sever, SEVERED) if sever else ()
    return Request(
        stacks,
        kinds,
        window,
        dict(tokens or {}),
        direction,
        metrics,
        sever,
        patch_group,
        check_method(method, metrics, window, sever),
    )
