"""Heatmaps of a trace: tokens from the top down, layers from left to right, colour = the metric."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .files import write_whole
from .metrics import METRICS
from .result import TraceResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

COLORS = {"vision": "Greens", "text_encoder": "Purples", "text_decoder": "Reds"}
STACKS = {"vision": "image encoder", "text_encoder": "question encoder", "text_decoder": "answer decoder"}
FORMATS = ("png", "pdf", "svg")
DPI = 200

# inches; saving cuts or grows the margins to what the labels need
CELL = 0.27
MIN_WIDTH, MAX_WIDTH = 2.6, 9.0
BAR, BAR_GAP = 0.12, 0.16
MARGIN = 0.9
CHARACTER = 0.085
SMALL_CHARACTER = 0.052
# a colour bar beside fewer rows would be too short to read: it goes below them
SHORT = 5


def plot_map(
    result: TraceResult,
    stack: str,
    kind: str,
    path: str | Path | None = None,
    token: int | None = None,
    level: float | None = None,
) -> Figure:
    """Draw one map of a trace in the manner of Meng et al. (2022, figure 1) and Palit et al. (2023).

    White is no effect, and cells beyond that are white too: see `TraceResult.color_range`. Of heads, those at
    one token: see `TraceResult.view`. level: cells are crossed out whose bootstrap interval of this level
    holds no effect. Where some cells are estimates, those done exactly have a dot. Saved to `path` if given,
    whole or not at all; its ending names the format.

    Raises KeyError where the map was not traced, ValueError for an unknown format and for a level where
    `TraceResult.interval` does, OSError where the file cannot be written.
    """
    check_format(path)
    view = result.view(stack, kind, token)
    grid = view.grid.numpy()  # [rows, layers]
    rows, layers = grid.shape
    notes = []
    if level is not None:
        lower, upper = result.interval(stack, kind, level)
        notes.append(f"crossed: {100 * level:g}\N{NBSP}% interval holds no effect")

    if result.exact is not None:
        notes.append("dotted: done exactly; the others are estimates")

    width = min(MAX_WIDTH, max(MIN_WIDTH, layers * CELL))
    height = rows * CELL
    short = rows < SHORT
    figure = empty_figure(width + 2 * MARGIN, height + 2 * MARGIN)
    axes = place(figure, MARGIN, MARGIN, width, height)
    low, high, falls = color_scale(result, stack, kind)
    colors = COLORS[stack] + ("_r" if falls else "")
    mesh = axes.pcolormesh(grid, cmap=colors, vmin=low, vmax=high, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    if level is not None:
        _mark(axes, view.cut((lower <= 0) & (upper >= 0)), marker=[(-1, -1), (1, 1)], markersize=7)
    if result.exact is not None:
        _mark(axes, view.cut(result.exact[stack, kind]), marker="o", markersize=1.5)
    _label(axes, view.labels, layers, width)
    write_title(axes, result, stack, kind + view.where, width, notes)

    if short:
        bar = place(figure, MARGIN, MARGIN - 0.45 - BAR, width, BAR)
    else:
        bar = place(figure, MARGIN + width + BAR_GAP, MARGIN, BAR, height)
    color_bar(bar, mesh, grid, metric_title(result), width if short else height, horizontal=short)
    for edge in axes.spines.values():
        edge.set(linewidth=0.5)

    if path is not None:
        save_figure(figure, Path(path))
    return figure


def color_scale(result: TraceResult, stack: str, kind: str) -> tuple[float, float, bool]:
    """The lower and the upper end of a map's colours, and whether the effect grows downwards: then the colour
    map runs the other way, for white to be no effect."""
    none, most = result.color_range(stack, kind)
    return min(none, most), max(none, most), none > most


def metric_title(result: TraceResult) -> str:
    """What the numbers of a trace are: "P(answer)", or that of one of the answer's tokens, from 0."""
    title, tokens = METRICS[result.metric].title, len(result.answer_ids)
    if result.answer_token is None or tokens == 1:
        return title
    return f"{title}, token {result.answer_token % tokens} of the answer"


def _mark(axes: Axes, cells: Tensor, **marker: Any) -> None:
    """A grey mark in each of these cells [rows, layers], edged with white so that dark ones show it too."""
    from matplotlib.patheffects import withStroke

    y, x = np.nonzero(cells.numpy())
    axes.plot(
        x + 0.5,
        y + 0.5,
        linestyle="none",
        markeredgecolor="0.45",
        markerfacecolor="0.45",
        markeredgewidth=0.8,
        path_effects=[withStroke(linewidth=1.8, foreground="white")],
        **marker,
    )


def _label(axes: Axes, labels: tuple[str, ...], layers: int, width: float) -> None:
    """Every layer and every row by name; numbers turn where they would run into each other."""
    axes.set_yticks([row + 0.5 for row in range(len(labels))])
    # a token may be "$"
    axes.set_yticklabels([printable(label) for label in labels], fontsize=8, parse_math=False)
    axes.set_xticks([layer + 0.5 for layer in range(layers)])
    crowded = width / layers < CHARACTER * len(str(layers - 1))
    axes.set_xticklabels([str(layer) for layer in range(layers)], fontsize=8, rotation=90 if crowded else 0)
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("layer", fontsize=8, labelpad=2)


def write_title(
    axes: Axes,
    result: TraceResult,
    stack: str,
    what: str,
    width: float,
    notes: Sequence[str] = (),
    offset: float = 5.0,
) -> None:
    """Write above `axes`, `offset` points away, what was asked and answered and, smaller, what is shown.

    what: the kind of the map, and which part of it. width: of the drawing, in inches. notes: further lines.
    """
    samples = len(result.low_scores)
    window = result.settings.get("window", 1)
    layers = f" in windows of {window} layers" if window != 1 else ""
    small = [
        f"{STACKS[stack]}, {printable(what)} {'corrupted' if result.noising else 'restored'}{layers}",
        f"{metric_title(result)}: corrupted {result.low_score:.3g}, clean {result.high_score:.3g}"
        f" ({samples}\N{NBSP}sample{'s' if samples != 1 else ''})",
        *notes,
    ]
    lines = [(text, "0.35") for text in small]
    if result.total_effect_vanishes:
        lines.append(("The total effect vanishes: this map shows nothing.", "firebrick"))
    room = width + MARGIN
    for line, color in reversed(lines):
        for part in reversed(textwrap.wrap(line, int(room / SMALL_CHARACTER))):
            _line_above(axes, part, offset, fontsize=7, color=color)
            offset += 9.5
    # no break before the answer's first word
    title = f"{printable(result.question)} →\N{NBSP}{printable(result.answer)}"
    for part in reversed(textwrap.wrap(title, int(room / CHARACTER))):
        _line_above(axes, part, offset + 2, fontsize=9, color="black")
        offset += 12.5


def _line_above(axes: Axes, text: str, points: float, fontsize: float, color: str) -> None:
    axes.annotate(
        text,
        xy=(0, 1),
        xycoords="axes fraction",
        xytext=(0, points),
        textcoords="offset points",
        va="bottom",
        fontsize=fontsize,
        color=color,
        parse_math=False,
    )


def color_bar(
    bar: Axes,
    colors: ScalarMappable,
    values: npt.NDArray[np.float32],
    title: str,
    length: float,
    horizontal: bool = False,
) -> None:
    """Fill the axes `bar`, `length` inches long, with a colour bar; it ends in a point where `values` go
    beyond the colours."""
    low, high = colors.get_clim()
    assert low is not None  # of a map whose ends were given
    assert high is not None
    slack = 0.01 * (high - low)
    below, above = float(values.min()) < low - slack, float(values.max()) > high + slack
    drawn = bar.figure.colorbar(
        colors,
        cax=bar,
        orientation="horizontal" if horizontal else "vertical",
        extend="min" if below else "max" if above else "neither",
        extendfrac=0.04,
    )
    drawn.set_label("\n".join(textwrap.wrap(title, int(length / SMALL_CHARACTER))), fontsize=8)
    drawn.outline.set(linewidth=0.5)
    bar.tick_params(labelsize=7, length=2, width=0.5)


def empty_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches that no window shows and pyplot does not know."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def place(figure: Figure, left: float, bottom: float, width: float, height: float) -> Axes:
    """New axes at this place, in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))


def printable(text: str) -> str:
    """Without line breaks and control characters: words of a model's vocabulary are not to be trusted."""
    return "".join(c if c.isprintable() else " " for c in text)


def check_format(path: str | Path | None) -> None:
    """Raise ValueError where a file's ending names no format that is written; None is no file."""
    if path is not None and _format(path) not in FORMATS:
        raise ValueError(f"cannot save a heatmap as {Path(path).name!r}: end it in .{', .'.join(FORMATS)}")


def _format(path: str | Path) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all. Raises OSError where the file cannot be written."""
    data = BytesIO()
    with warnings.catch_warnings():
        # a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(data, format=_format(path), dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    write_whole(path, data.getvalue())
