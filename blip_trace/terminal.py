"""A trace in the terminal: maps as coloured numbers, readable without the colours too."""

from __future__ import annotations

import math

from rich.cells import cell_len, set_cell_size
from rich.color import Color
from rich.console import Console, Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from .metrics import METRICS
from .plotting import metric_title, printable
from .result import TraceResult

HUES = {"vision": (0, 109, 44), "text_encoder": (84, 39, 143), "text_decoder": (165, 15, 21)}
"""The darkest colour of each stack's maps: those of the heatmaps."""
MAX_LABEL = 16
MAX_ROWS = 80
"""Of maps with more rows only the strongest cells are printed."""
STRONGEST = 5


def print_trace(console: Console, result: TraceResult, seconds: float | None = None) -> None:
    """Print what was asked and answered, every map, and each map's strongest cells.

    seconds: how long the trace took.
    """
    console.print(_summary(result, seconds))
    for stack, kind in result.restored:
        console.print()
        # lines of a wide map are not folded: off a terminal they are whole, on a narrow one they are cut
        console.print(
            render_map(result, stack, kind), no_wrap=True, overflow="ignore", crop=console.is_terminal
        )
        console.print(strongest_cells(result, stack, kind))


def _summary(result: TraceResult, seconds: float | None) -> RenderableType:
    samples = len(result.low_scores)
    spread = f" ± {float(result.low_scores.std()):.2g}" if samples > 1 else ""
    many = "s" if samples > 1 else ""
    title = metric_title(result)
    rows = [
        ("question", printable(result.question)),
        ("answer", printable(result.answer)),
        ("clean", f"{title} = {result.high_score:.4g}"),
        ("corrupted", f"{title} = {result.low_score:.4g}{spread} over {samples} sample{many}"),
    ]
    if seconds is not None:
        how = "{backend}, {dtype}, threads: {threads}".format_map(result.settings)
        rows.append(("traced", f"in {seconds:.2f} s ({how})"))
    rows += _how_exact(result)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows:
        table.add_row(name, Text(value))
    if not result.total_effect_vanishes:
        return table
    warning = "The total effect vanishes: the corruption leaves this answer as it is, the maps show nothing."
    return Group(table, Text(warning, style="bold red"))


def _how_exact(result: TraceResult) -> list[tuple[str, str]]:
    """What the summary says of estimates, and of a screen's check."""
    rows = []
    if result.exact is not None:
        done = sum(int(marks.sum()) for marks in result.exact.values())
        cells = sum(marks.numel() for marks in result.exact.values())
        rows.append(("exact", f"{done:,} of {cells:,} cells; ~ marks estimates of the others"))
    if (screen := result.settings.get("screen")) is not None:
        correlation, missed = screen["rank_correlation"], 100 * screen["missed"]
        text = f"rank correlation {correlation:.2f}, {missed:.0f} % of the largest effects missed"
        rows.append(("check", text))
    return rows


def render_map(result: TraceResult, stack: str, kind: str) -> Text:
    """One map, as `TraceResult.view` cuts it: a row for each token or head, a column for each layer;
    hundredths of the metric, or of a power of ten where all of them are small, or whole numbers where some
    are large. Of more than `MAX_ROWS` rows, only what it is."""
    grid, rows, where, _ = result.view(stack, kind)
    state = "corrupted" if result.noising else "restored"
    text = Text()
    text.append(f"{stack}, {kind}{printable(where)}", style="bold")
    text.append(f": {metric_title(result)} with that state {state}")
    if len(rows) > MAX_ROWS:
        return text.append(f" ({len(rows)} rows, not printed)")
    peak = max(float(grid.abs().max()), abs(result.high_score))
    exponent = 0 if peak >= 0.1 else max(-30, math.floor(math.log10(max(peak, 1e-30)))) + 1
    unit = f", in units of 1e{exponent}" if exponent else ""
    decimals = 2 if peak < 100 else 0
    texts = [[f"{value / 10.0**exponent:.{decimals}f}" for value in row] for row in grid.tolist()]
    width = max(len(text) for row in texts for text in row)
    none, most = result.color_range(stack, kind)
    shares = ((grid - none) / (most - none)).tolist()

    labels = [printable(label) for label in rows]
    label_width = min(MAX_LABEL, max(map(cell_len, labels)))
    text.append(f"{unit}\n")
    text.append(" " * (label_width + 1))
    for layer in range(grid.shape[1]):
        text.append(f"{layer:>{width}}  ", style="dim")
    for label, numbers, row in zip(labels, texts, shares, strict=True):
        text.append("\n" + " " * max(0, label_width - cell_len(label)))
        text.append(set_cell_size(label, min(label_width, cell_len(label))) + " ")
        for number, share in zip(numbers, row, strict=True):
            text.append(f" {number:>{width}} ", style=_shade(stack, share))
    return text


def _shade(stack: str, share: float) -> Style:
    """White to the stack's colour; the numbers stay readable on it."""
    share = min(1.0, max(0.0, share))
    r, g, b = (round(255 + (dark - 255) * share) for dark in HUES[stack])
    ink = "black" if 0.299 * r + 0.587 * g + 0.114 * b > 140 else "white"
    return Style(color=ink, bgcolor=Color.from_rgb(r, g, b))


def strongest_cells(result: TraceResult, stack: str, kind: str, count: int = STRONGEST) -> Table:
    """The cells of a map with the largest effects: those that bring most of the answer back or, in
    noising, take most of it away."""
    grid = result.grid(stack, kind)  # [tokens, layers] or [heads, tokens, layers]
    shares = result.normalized(stack, kind)
    exact = None if result.exact is None else result.exact[stack, kind].flatten()
    labels, places = result.tokens(stack), result.positions[stack]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("strongest")
    table.add_column("layer", justify="right")
    table.add_column(metric_title(result), justify="right")
    table.add_column("of the total effect", justify="right")
    effects = result.indirect_effect(stack, kind).flatten()
    rises = not METRICS[result.metric].falls
    for cell in effects.argsort(descending=rises)[:count].tolist():
        rows, layer = divmod(cell, grid.shape[-1])
        head, token = divmod(rows, grid.shape[-2])
        share = float(shares.flatten()[cell])
        mark = "" if exact is None or exact[cell] else "~"
        table.add_row(
            Text(
                f"{printable(labels[token])} ({places[token]})"
                + (f", head {head}" if grid.dim() == 3 else "")
            ),
            str(layer),
            f"{mark}{float(grid.flatten()[cell]):.4g}",
            "-" if math.isnan(share) else f"{100 * share:.0f} %",
        )
    return table
