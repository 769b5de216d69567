"""The image encoder's map over the picture: a panel for each layer, colour where a patch matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .plotting import (
    BAR,
    BAR_GAP,
    COLORS,
    MARGIN,
    MIN_WIDTH,
    check_format,
    color_bar,
    color_scale,
    empty_figure,
    metric_title,
    place,
    save_figure,
    write_title,
)
from .result import TraceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

COLUMNS = 6
# inches: a panel's side, what lies between panels, what stands above each of them, and the class token in it
PANEL, GAP = 1.4, 0.14
HEAD, SQUARE = 0.24, 0.1
POINTS = 72
"""In an inch."""
FADED = 0.45
"""How far the picture goes towards white: the map is to stand out, what is seen to be known still."""


def plot_image(
    result: TraceResult,
    kind: str = "hidden",
    path: str | Path | None = None,
    layers: Sequence[int] | None = None,
) -> Figure:
    """Draw a map of the vision stack over the picture, one panel for each layer: all of them, or `layers`.

    Blocks of patches are the more coloured, and the less transparent, the larger their effect, on one scale
    in all panels: see `TraceResult.color_range`. The class token is the small square above the picture.
    Saved to `path` if given, whole or not at all; its ending names the format.

    Raises KeyError where the vision stack was not traced, ValueError for a trace that kept no picture, for a
    layer that is not there and for an unknown format, OSError where the file cannot be written.
    """
    check_format(path)
    grid = result.grid("vision", kind).numpy()  # [groups, layers]
    if result.picture is None:
        raise ValueError("this trace kept no picture that its map could be drawn on")
    shown = _check_layers(layers, grid.shape[1])
    picture = FADED + (1 - FADED) * result.picture.numpy() / 255
    edges = _edges(result)
    low, high, falls = color_scale(result, "vision", kind)
    style = {"cmap": _see_through(falls), "vmin": low, "vmax": high}

    rows = math.ceil(len(shown) / COLUMNS)
    columns = math.ceil(len(shown) / rows)
    side = max(PANEL, (MIN_WIDTH - (columns - 1) * GAP) / columns)
    width = columns * side + (columns - 1) * GAP
    height = rows * side + (rows - 1) * HEAD
    figure = empty_figure(width + 2 * MARGIN, height + 2 * MARGIN)
    for number, layer in enumerate(shown):
        row, column = divmod(number, columns)
        left, bottom = MARGIN + column * (side + GAP), MARGIN + (rows - 1 - row) * (side + HEAD)
        axes = place(figure, left, bottom, side, side)
        mesh = _draw(axes, picture, edges, grid[1:, layer], style)
        axes.set_title(f"layer {layer}", fontsize=8, pad=4.3, loc="right")
        _class_token(axes, mesh.to_rgba(grid[0, layer]), side)
        if number == 0:
            blocks = result.settings.get("patch_group", 1)
            notes = [f"in blocks of {blocks} × {blocks} patches"] if blocks > 1 else []
            write_title(axes, result, "vision", kind, width, notes, offset=HEAD * POINTS)
    bar = place(figure, MARGIN + width + BAR_GAP, MARGIN, BAR, height)
    color_bar(bar, mesh, grid[:, shown], metric_title(result), height)

    if path is not None:
        save_figure(figure, Path(path))
    return figure


def _check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    if not layers:
        raise ValueError("no layers given to show")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < count:
            raise ValueError(f"vision has no layer {layer!r}: it has {count} (0 to {count - 1})")
    return list(layers)


def _edges(result: TraceResult) -> list[int]:
    """Where blocks begin and end, in patches, across as well as down; those at the far edges may be smaller.

    A single block is the whole picture, however many patches that has.
    """
    labels, block = result.tokens("vision"), result.settings.get("patch_group", 1)
    if "1,0" not in labels:
        return [0, 1]
    # its first patch is the first of row number `block`, and the class token stands before all patches
    side = (result.positions["vision"][labels.index("1,0")] - 1) // block
    return [*range(0, side, block), side]


def _see_through(falls: bool) -> ListedColormap:
    """The stack's colours from their middle on, from wholly transparent to nearly opaque; `falls`: the other
    way round."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    colors = colormaps[COLORS["vision"]](np.linspace(0.4, 1, 256))
    colors[:, 3] = np.linspace(0, 0.9, 256)
    return ListedColormap(colors[::-1] if falls else colors)


def _draw(
    axes: Axes,
    picture: npt.NDArray[np.float64],
    edges: list[int],
    values: npt.NDArray[np.float32],
    style: dict[str, Any],
) -> Any:
    """One panel: the picture [H, W, 3], and `values` [blocks] over it, row by row."""
    end, blocks = edges[-1], len(edges) - 1
    axes.imshow(picture, extent=(0, end, end, 0))
    # as pixels in vector files too, where transparent blocks would show seams
    mesh = axes.pcolormesh(edges, edges, values.reshape(blocks, blocks), rasterized=True, **style)
    axes.set(xlim=(0, end), ylim=(end, 0), xticks=[], yticks=[])
    for edge in axes.spines.values():
        edge.set(linewidth=0.5, color="0.4")
    return mesh


def _class_token(axes: Axes, color: npt.NDArray[np.float64], side: float) -> None:
    """Its colour and its name, at the upper left above a panel of `side` inches."""
    from matplotlib.patches import Rectangle

    size, above = SQUARE / side, 1 + 0.05 / side
    square = Rectangle(
        (0, above), size, size, transform=axes.transAxes, facecolor=color, edgecolor="0.4", linewidth=0.5
    )
    axes.add_patch(square).set_clip_on(False)
    axes.text(
        1.4 * size, above + size / 2, "class", transform=axes.transAxes, fontsize=7, va="center_baseline"
    )
