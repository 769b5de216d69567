"""What a user asks to be mapped, checked, and the cells that this makes for one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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


@dataclass(frozen=True)
class Maps:
    """All maps of one question by (stack, kind), and all their cells, one map behind the other."""

    grids: Mapping[tuple[str, str], Grid]
    cells: tuple[Cell, ...]


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
    _made: dict[tuple[tuple[str, Shape], ...], Maps] = field(default_factory=dict, compare=False, repr=False)

    @property
    def reads(self) -> Reads:
        """What the metrics take."""
        return reads_of(self.metrics)

    def maps(self, shapes: Mapping[str, Shape]) -> Maps:
        """The maps of a question whose stacks have these shapes, made once for each shape.

        Raises ValueError for tokens that are not there.
        """
        key = tuple(shapes.items())
        if key not in self._made:
            grids = {
                (stack, kind): self._grid(stack, kind, shapes[stack])
                for stack in self.stacks
                for kind in self.kinds
            }
            self._made[key] = Maps(grids, tuple(cell for grid in grids.values() for cell in grid.cells))
        return self._made[key]

    def _grid(self, stack: str, kind: str, shape: Shape) -> Grid:
        if stack == "vision":
            return _image_grid(kind, shape, self.window, self.sever, self.patch_group)
        tokens = check_tokens(self.tokens.get(stack), shape.tokens)
        return _text_grid(stack, kind, tuple(tokens), shape, self.window, self.sever)

    def settings(self) -> dict[str, Any]:
        """What a result says of it."""
        return {
            "window": self.window,
            "direction": self.direction,
            "sever": list(self.sever),
            "patch_group": self.patch_group,
            "method": "exact" if self.method is None else repr(self.method),
        }


# Cells are made once: plans and passes compare them, and the same ones are compared in no time.
@lru_cache(maxsize=256)
def _text_grid(
    stack: str, kind: str, tokens: tuple[int, ...], shape: Shape, window: int, sever: tuple[str, ...]
) -> Grid:
    cells = grid_cells(stack, kind, [(token,) for token in tokens], shape, window, sever)
    return Grid(tuple(cells), (*_heads(kind, shape), len(tokens), shape.layers), None, tokens)


@lru_cache(maxsize=16)
def _image_grid(kind: str, shape: Shape, window: int, sever: tuple[str, ...], patch_group: int) -> Grid:
    named = patch_groups(round((shape.tokens - 1) ** 0.5), patch_group)
    cells = grid_cells("vision", kind, named.values(), shape, window, sever)
    size = (*_heads(kind, shape), len(named), shape.layers)
    return Grid(tuple(cells), size, tuple(named), tuple(group[0] for group in named.values()))


def _heads(kind: str, shape: Shape) -> tuple[int, ...]:
    return (shape.heads,) if kind in HEAD_KINDS else ()


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
