"""The figures of a report: averages by role and layer, curves over layers, and single maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...metrics import METRICS
from ...plotting import (
    CELL,
    COLORS,
    SMALL_CHARACTER,
    color_bar,
    empty_figure,
    place,
    printable,
    save_figure,
)
from ...sites import HEAD_KINDS
from ..roles import ROLES
from .aggregate import Aggregate, Average
from .profiles import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

ROW = 0.2
ACROSS = 3
"""Panels beside each other."""
LEFT, RIGHT, ABOVE, BELOW, GAP = 1.1, 0.75, 0.5, 0.5, 0.35
MIN_ACROSS = 1.6
ROLE_COLORS = dict(
    zip(
        ROLES,
        ("#7a7a7a", "#0072b2", "#d55e00", "#e69f00", "#56b4e9", "#009e73", "#b8b8b8", "#cc79a7", "#7a7a7a",
         "#009e73"),
        strict=True,
    )
)  # fmt: skip
"""Of Okabe & Ito (2008): people who confuse colours can tell them apart. Roles at the edge are grey."""


def effect_title(metric: str, normalized: bool = False) -> str:
    """What the numbers of a figure are."""
    return f"indirect effect on {METRICS[metric].title}" + (" / total effect" if normalized else "")


def shown_rows(average: Aggregate, group: Average) -> tuple[Floats, tuple[str, ...], str]:
    """What a heatmap shows of an average: [rows, layers], the rows' names and what they are part of.

    Of kinds of heads, the heads at the role whose average effect over all samples is largest.
    """
    if average.kind not in HEAD_KINDS:
        return group.mean, average.rows, ""
    size = np.nan_to_num(np.abs(average.overall.mean)).max((1, 2))
    best = int(size.argmax())
    heads = tuple(f"head {head}" for head in range(group.mean.shape[1]))
    return group.mean[best], heads, f" at “{average.rows[best]}”"


def draw_averages(average: Aggregate, groups: Mapping[str, Average], path: Path) -> None:
    """Heatmaps of the average of all samples and of each group, under one colour scale, saved to `path`.

    White is no effect, and effects the wrong way are white too. Panels are headed by the group and its number
    of samples.
    """
    panels = {"all": average.overall, **groups}
    grids = {name: shown_rows(average, group) for name, group in panels.items()}
    rows, layers = grids["all"][0].shape
    width, height = max(MIN_ACROSS, layers * CELL * 0.7), rows * ROW
    across = 2 if len(panels) == 4 else min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    figure = empty_figure(LEFT + across * (width + GAP) + RIGHT, down * (height + ABOVE) + BELOW)
    low, high = _ends([grid for grid, _, _ in grids.values()], METRICS[average.metric].falls)
    colors = COLORS[average.stack] + ("_r" if METRICS[average.metric].falls else "")
    mesh: QuadMesh | None = None
    for number, (name, (grid, labels, _)) in enumerate(grids.items()):
        column, line = number % across, number // across
        bottom = BELOW + (down - 1 - line) * (height + ABOVE)
        axes = place(figure, LEFT + column * (width + GAP), bottom, width, height)
        mesh = _heatmap(axes, grid, colors, low, high)
        _ticks(axes, labels if column == 0 else None, layers, width)
        count = f"  (n = {panels[name].samples:,})"
        title = _shortened(printable(name), int(width / SMALL_CHARACTER) - len(count)) + count
        axes.set_title(title, fontsize=8, loc="left", pad=4, parse_math=False)
        if number >= len(panels) - across:  # the lowest of its column
            axes.set_xlabel("layer", fontsize=8, labelpad=2)
    assert mesh is not None
    tall = max(height, min(2.2, down * (height + ABOVE) - ABOVE))
    top = BELOW + down * (height + ABOVE) - ABOVE
    bar = place(figure, LEFT + across * (width + GAP) - GAP + 0.16, top - tall, 0.12, tall)
    values = np.concatenate([grid.ravel() for grid, _, _ in grids.values()])
    color_bar(bar, mesh, np.nan_to_num(values), effect_title(average.metric, average.normalized), tall)
    save_figure(figure, path)


def draw_curves(averages: Sequence[Aggregate], path: Path) -> None:
    """Layer by layer the average of each role with its interval, a panel for each of the averages, which are
    of one stack; saved to `path`. Kinds of heads have no curve."""
    across = min(ACROSS, len(averages))
    down = -(-len(averages) // across)
    width, height, above, gap = 2.5, 1.8, 0.4, 0.6
    figure = empty_figure(0.7 + across * (width + gap) + 1.2, down * (height + above + 0.45) + 0.1)
    parts = [part for one in averages for part in (one.overall.lower, one.overall.upper, one.overall.mean)]
    values = np.concatenate([part[np.isfinite(part)] for part in parts])
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    slack = 0.05 * (high - low) or 1e-6
    for number, average in enumerate(averages):
        column, line = number % across, number // across
        bottom = 0.45 + (down - 1 - line) * (height + above + 0.45)
        axes = place(figure, 0.7 + column * (width + gap), bottom, width, height)
        for row in average.rows:
            curve = average.layer_curve(row)
            color = ROLE_COLORS.get(row, "black")
            layers = np.arange(len(curve.mean))
            axes.fill_between(layers, curve.lower, curve.upper, color=color, alpha=0.2, linewidth=0)
            axes.plot(layers, curve.mean, color=color, linewidth=1.3, marker="o", markersize=2.2, label=row)
        axes.set_ylim(low - slack, high + slack)  # panels are there to be compared
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=0)
        axes.set_title(average.kind, fontsize=8, loc="left", pad=4)
        axes.set_xlabel("layer", fontsize=8, labelpad=2)
        axes.set_xticks(range(0, len(curve.mean), 2 if len(curve.mean) > 8 else 1))
        axes.tick_params(labelsize=7, length=2, width=0.5)
        if column == 0:
            axes.set_ylabel(effect_title(average.metric), fontsize=8)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        for edge in ("left", "bottom"):
            axes.spines[edge].set(linewidth=0.5)
        if number == across - 1:
            axes.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(figure, path)


def draw_sample(
    grid: Floats, labels: Sequence[str], stack: str, metric: str, least: float, path: Path
) -> None:
    """One sample's effects [rows, layers], saved to `path`; its colours run over no less than `least`."""
    rows, layers = grid.shape
    width, height = max(MIN_ACROSS, layers * CELL * 0.7), max(rows * ROW, 0.3)
    figure = empty_figure(LEFT + width + RIGHT, height + ABOVE + BELOW)
    falls = METRICS[metric].falls
    low, high = _ends([grid], falls, least)
    axes = place(figure, LEFT, BELOW, width, height)
    mesh = _heatmap(axes, grid, COLORS[stack] + ("_r" if falls else ""), low, high)
    _ticks(axes, labels, layers, width)
    axes.set_xlabel("layer", fontsize=8, labelpad=2)
    bar = place(figure, LEFT + width + 0.12, BELOW, 0.1, height)
    color_bar(bar, mesh, np.nan_to_num(grid), "", height)
    save_figure(figure, path)


def _heatmap(axes: Axes, grid: Floats, colors: str, low: float, high: float) -> QuadMesh:
    """Cells without a number are grey."""
    axes.set_facecolor("0.93")
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap=colors, vmin=low, vmax=high, edgecolors="white", linewidth=0.4
    )
    axes.invert_yaxis()
    for edge in axes.spines.values():
        edge.set(linewidth=0.5)
    return mesh


def _ends(grids: Sequence[Floats], falls: bool, least: float = 0.0) -> tuple[float, float]:
    """The ends of the colours: no effect, and the largest of any of the grids, but at least `least`."""
    values = np.nan_to_num(np.concatenate([grid.ravel() for grid in grids]))
    least = max(least, 1e-6)
    return (min(float(values.min()), -least), 0.0) if falls else (0.0, max(float(values.max()), least))


def _ticks(axes: Axes, labels: Sequence[str] | None, layers: int, width: float) -> None:
    """Every row by name; as many layers as there is room for."""
    if labels is None:
        axes.set_yticks([])
    else:
        axes.set_yticks([row + 0.5 for row in range(len(labels))])
        axes.set_yticklabels([printable(label) for label in labels], fontsize=8, parse_math=False)
    step = 1 if width / layers >= 0.17 else 2
    axes.set_xticks([layer + 0.5 for layer in range(0, layers, step)])
    axes.set_xticklabels([str(layer) for layer in range(0, layers, step)], fontsize=7)
    axes.tick_params(length=0, pad=3)


def _shortened(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 1, 6)] + "…"
