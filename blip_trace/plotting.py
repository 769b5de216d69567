"""Heatmaps of a trace: tokens from the top down, layers from left to right, colour = P(answer)."""

from __future__ import annotations

import textwrap
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from .result import TraceResult, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
# a colour bar beside fewer rows would be too short to read: it goes below them
SHORT = 5


def plot_map(
    result: TraceResult, stack: str, kind: str, path: str | Path | None = None, token: int | None = None
) -> Figure:
    """Draw one map of a trace in the manner of Meng et al. (2022, figure 1) and Palit et al. (2023).

    White is no effect, and cells beyond that are white too: see `TraceResult.color_range`. Of heads, those at
    one token: see `TraceResult.view`. Saved to `path` if given, whole or not at all; its ending names the
    format.

    Raises KeyError where the map was not traced, ValueError for an unknown format, OSError where the file
    cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if path is not None and _format(path) not in FORMATS:
        raise ValueError(f"cannot save a heatmap as {Path(path).name!r}: end it in .{', .'.join(FORMATS)}")
    view = result.view(stack, kind, token)
    grid = view.grid.numpy()  # [rows, layers]
    rows, layers = grid.shape
    low, high = result.color_range(stack, kind)

    width = min(MAX_WIDTH, max(MIN_WIDTH, layers * CELL))
    height = rows * CELL
    short = rows < SHORT
    size = (width + 2 * MARGIN, height + 2 * MARGIN)
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)

    def place(left: float, bottom: float, width: float, height: float) -> Axes:
        return figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))

    axes = place(MARGIN, MARGIN, width, height)
    colors_of = COLORS[stack] + ("_r" if result.noising else "")
    mesh = axes.pcolormesh(grid, cmap=colors_of, vmin=low, vmax=high, edgecolors="white", linewidth=0.5)
    axes.invert_yaxis()
    _label(axes, view.labels, layers, width)
    _title(axes, result, stack, kind + view.where, width)

    if short:
        bar = place(MARGIN, MARGIN - 0.45 - BAR, width, BAR)
    else:
        bar = place(MARGIN + width + BAR_GAP, MARGIN, BAR, height)
    slack = 0.01 * (high - low)
    below, above = float(grid.min()) < low - slack, float(grid.max()) > high + slack
    colors = figure.colorbar(
        mesh,
        cax=bar,
        orientation="horizontal" if short else "vertical",
        extend="min" if below else "max" if above else "neither",
        extendfrac=0.04,
    )
    colors.set_label("P(answer)", fontsize=8)
    bar.tick_params(labelsize=7, length=2, width=0.5)
    for edge in (colors.outline, *axes.spines.values()):
        edge.set(linewidth=0.5)

    if path is not None:
        _save(figure, Path(path))
    return figure


def _label(axes: Axes, labels: tuple[str, ...], layers: int, width: float) -> None:
    """Every layer and every row by name; numbers turn where they would run into each other."""
    axes.set_yticks([row + 0.5 for row in range(len(labels))])
    # a token may be "$"
    axes.set_yticklabels([_printable(label) for label in labels], fontsize=8, parse_math=False)
    axes.set_xticks([layer + 0.5 for layer in range(layers)])
    crowded = width / layers < CHARACTER * len(str(layers - 1))
    axes.set_xticklabels([str(layer) for layer in range(layers)], fontsize=8, rotation=90 if crowded else 0)
    axes.tick_params(length=0, pad=3)
    axes.set_xlabel("layer", fontsize=8, labelpad=2)


def _title(axes: Axes, result: TraceResult, stack: str, what: str, width: float) -> None:
    samples = len(result.low_scores)
    window = result.settings.get("window", 1)
    layers = f" in windows of {window} layers" if window != 1 else ""
    subtitle = [
        f"{STACKS[stack]}, {_printable(what)} {'corrupted' if result.noising else 'restored'}{layers}",
        f"P(answer): corrupted {result.low_score:.3g}, clean {result.high_score:.3g}"
        f" ({samples} sample{'s' if samples != 1 else ''})",
    ]
    if result.total_effect_vanishes:
        subtitle.append("The total effect vanishes: this map shows nothing.")
    columns = int((width + MARGIN) / CHARACTER)
    # no break before the answer's first word
    title = textwrap.wrap(f"{_printable(result.question)} →\N{NBSP}{_printable(result.answer)}", columns)

    offset = 5.0  # points above the map
    for line in reversed(subtitle):
        color = "firebrick" if line.startswith("The total") else "0.35"
        _line_above(axes, line, offset, fontsize=7, color=color)
        offset += 9.5
    for line in reversed(title):
        _line_above(axes, line, offset + 2, fontsize=9, color="black")
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


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _format(path: str | Path) -> str:
    return Path(path).suffix.lower().removeprefix(".")


def _save(figure: Figure, path: Path) -> None:
    data = BytesIO()
    with warnings.catch_warnings():
        # a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(data, format=_format(path), dpi=DPI, bbox_inches="tight", pad_inches=0.08)
    write_whole(path, data.getvalue())
