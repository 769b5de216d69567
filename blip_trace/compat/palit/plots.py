"""The notebooks' heatmaps: their colours, sizes and titles, with labels of what is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...plotting import DPI, check_format, printable, save_figure
from ...result import VANISHING
from ...sites import check_names
from .flow import HiddenFlow
from .layers import BLOCKS
from .settings import Notebook

SIZE = (3.5, 2.0)
"""Inches of a figure of up to 12 layers and 9 tokens; it grows with more."""
COLORS = {"text_encoder": "Purples", "text_decoder": "Reds"}
KIND_COLORS = {"attention": "Greens", "crossattention": "Blues"}


class Part(NamedTuple):
    """What is averaged: the end of its keys in the result, its block and its colours."""

    key: str
    block: str
    colors: str


PARTS = {
    "Question Encoder": Part("TE", "text_encoder", COLORS["text_encoder"]),
    "Answer Decoder": Part("DE", "text_decoder", COLORS["text_decoder"]),
}
KIND_PARTS = {
    "attention": Part("TE", "text_encoder", KIND_COLORS["attention"]),
    "crossattention": Part("DE", "text_encoder", KIND_COLORS["crossattention"]),
}
"""The attention notebook keeps averages of the encoder's two kinds under the main notebook's keys."""
WINDOW_LABEL = "middle one of the restored layers"
NO_EFFECT = "The total effect vanishes: this map shows nothing."

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Look:
    """Everything of a heatmap but its numbers."""

    colors: str
    rows: Sequence[str]
    columns: Sequence[int]
    title: str
    bar: str
    xlabel: str | None
    note: str = ""
    font: str = "Liberation Serif"


def plot_trace_heatmap(
    result: Mapping[str, Any],
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
    *,
    notebook: Notebook | None = None,
    faithful: bool | None = None,
) -> None:
    """Draw a block's map: effects over the total effect (main notebook), or probabilities from the low score
    on (attention notebook); saved to `savepdf` (pdf, png, svg) or shown.

    A total effect that vanishes is not divided by, and the title says so, unless `faithful`. notebook,
    faithful: as the result was made, unless given.

    Raises ValueError for another format, and for what is no result of `calculate_hidden_flow`.
    """
    block, scores = _get(result, "block_name"), _values(_get(result, "scores"))
    check_names("block_name", [block], BLOCKS)
    low, bar = float(_get(result, "low_score")), _probability(result)
    guarded = not _of(result, "faithful", faithful, False) and _vanishes(result)
    if _of(result, "notebook", notebook, "main") == "main":
        with np.errstate(divide="ignore", invalid="ignore"):
            scores = (scores - low) / (np.nan if guarded else _high(result) - low)
        low, bar = 0.0, f"normalized effect, {bar}"
    look = Look(
        COLORS[block],
        _rows(result, scores),
        _columns(result, scores),
        _title(title, f"Impact of restoring {block} after corrupted input", modelname),
        bar,
        xlabel,
        NO_EFFECT if guarded else "",
    )
    _draw(scores, low, look, savepdf)


def plot_kindtrace_heatmap(
    result: Mapping[str, Any],
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
) -> None:
    """Draw the map of a kind, "attention" or "crossattention": probabilities from the low score on. Otherwise
    as `plot_trace_heatmap`."""
    kind, scores = _kind(_get(result, "kind")), _values(_get(result, "scores"))
    guarded = not _of(result, "faithful", None, False) and _vanishes(result)
    usual = f"Impact of restoring {kind} layers in {_get(result, 'block_name')} after corrupted input"
    look = Look(
        KIND_COLORS[kind],
        _rows(result, scores),
        _columns(result, scores),
        _title(title, usual, modelname),
        _probability(result),
        xlabel or WINDOW_LABEL,
        NO_EFFECT if guarded else "",
    )
    _draw(scores, float(_get(result, "low_score")), look, savepdf)


def plot_map(
    result: Mapping[str, Any],
    differences: Any,
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
) -> None:
    """Draw `differences` [tokens, layers] from 0 on, such as normalised effects averaged over results like
    this one. Otherwise as `plot_trace_heatmap`."""
    block, values = _get(result, "block_name"), _values(differences)
    check_names("block_name", [block], BLOCKS)
    look = Look(
        {**COLORS, "text_decoder": "Blues"}[block],
        _rows(result, values),
        _columns(result, values),
        _title(title, f"Impact of restoring {block} after corrupted input", modelname),
        f"effect, {_probability(result)}",
        xlabel,
        "" if np.isfinite(values).any() else NO_EFFECT,
    )
    _draw(values, 0.0, look, savepdf)


def avgnormal_heatmap(
    result: Mapping[str, Any],
    block_name: str,
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
    *,
    start: int = 0,
) -> None:
    """Draw the average effect of a part, "Question Encoder" or "Answer Decoder": result["differences_TE"]
    less result["low_score_TE"], or those of DE. Not divided by anything, in spite of its name.

    start: the layer of the first column. Otherwise as `plot_trace_heatmap`.
    """
    part = _part(block_name)
    _draw_average(result, part, part.block, True, savepdf, title, xlabel, modelname, start)


def avg_heatmap(
    result: Mapping[str, Any],
    block_name: str,
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
    *,
    start: int = 0,
) -> None:
    """As `avgnormal_heatmap`, but the average probability, from the average low score on."""
    part = _part(block_name)
    _draw_average(result, part, part.block, False, savepdf, title, xlabel, modelname, start)


def kind_average_heatmap(
    result: Mapping[str, Any],
    block_name: str,
    kind: str,
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
) -> None:
    """The attention notebook's `avgnormal_heatmap`: the average effect of a kind of the question encoder,
    "Attention" (kept under TE) or "CrossAttention" (under DE), in any case."""
    check_names("part", [block_name], ["Question Encoder"])
    name = _kind(kind)
    what = f"{name} layers in text_encoder"
    label = xlabel or WINDOW_LABEL
    _draw_average(result, KIND_PARTS[name], what, True, savepdf, title, label, modelname, 0)


def _part(name: object) -> Part:
    check_names("part", [str(name)], PARTS)
    return PARTS[str(name)]


def _draw_average(
    result: Mapping[str, Any],
    part: Part,
    what: str,
    effect: bool,
    savepdf: str | Path | None,
    title: str | None,
    xlabel: str | None,
    modelname: str | None,
    start: int,
) -> None:
    """An average over questions, whose words differ: its effect, or its probability."""
    values = _values(_get(result, f"differences_{part.key}"))
    low = float(_get(result, f"low_score_{part.key}"))
    rows, columns = values.shape
    between = [f"Q_token_{number}" for number in range(1, rows - 1)]
    look = Look(
        part.colors,
        ["[DEC]"] if part.block == "text_decoder" else ["[CLS]", *between, "[SEP]"][:rows],
        range(start, start + columns),
        _title(title, f"Impact of restoring {what} after corrupted input", modelname),
        "average effect" if effect else "average probability",
        xlabel,
        font="Liberation Serif" if effect else "Liberation Mono",
    )
    _draw(values - low if effect else values, 0.0 if effect else low, look, savepdf)


def _draw(values: Values, lowest: float, look: Look, savepdf: str | Path | None) -> None:
    """Draw [rows, columns], colours from `lowest` on; what lies below is white, as the colour bar says."""
    from matplotlib import font_manager, rc_context
    from matplotlib import pyplot as plt

    check_format(savepdf)
    rows, columns = values.shape
    known = np.isfinite(values)
    most = max(float(values[known].max(initial=lowest)), lowest + 1e-6)
    below = bool((values[known] < lowest - 0.01 * (most - lowest)).any())
    if not known.any():
        most = 1.0
    # the notebooks' font is Colab's; without it matplotlib would complain of every label
    family = look.font if look.font in font_manager.get_font_names() else "serif"
    size = (SIZE[0] * max(1, columns / 12), SIZE[1] * max(1, rows / 9))
    with rc_context({"font.family": family}):
        figure, axes = plt.subplots(figsize=size, dpi=DPI)
        mesh = axes.pcolor(np.ma.masked_invalid(values), cmap=look.colors, vmin=lowest, vmax=most)
        axes.invert_yaxis()
        axes.set_yticks([row + 0.5 for row in range(rows)])
        axes.set_yticklabels([printable(row) for row in look.rows], parse_math=False)
        axes.set_xticks([column + 0.5 for column in range(columns)])
        axes.set_xticklabels([str(column) for column in look.columns])
        axes.set_title(f"{look.title}\n{look.note}" if look.note else look.title, parse_math=False)
        axes.set_xlabel("layer" if look.xlabel is None else look.xlabel)
        bar = figure.colorbar(mesh, ax=axes, extend="min" if below else "neither")
        bar.set_label(printable(look.bar), fontsize=8, parse_math=False)
        # the notebooks leave the last layer without its number, for which there is hardly room
        axes.tick_params(axis="x", labelsize=10 if columns <= 10 else 8)
        if savepdf is None:
            plt.show()
            return
        path = Path(savepdf)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(figure, path)
        plt.close(figure)


def _values(scores: Any) -> Values:
    values = torch.as_tensor(scores).detach().cpu().double().numpy()
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a map is [tokens, layers], not {list(values.shape)}")
    return values


def _get(result: Mapping[str, Any], key: str) -> Any:
    if key not in result:
        raise ValueError(f"this result has no {key!r}: give one of calculate_hidden_flow, or with its keys")
    return result[key]


def _rows(result: Mapping[str, Any], values: Values) -> Sequence[str]:
    """Labels of the tokens; of a result that was made elsewhere, of the words if there are as many."""
    rows = len(values)
    if isinstance(result, HiddenFlow) and len(result.tokens) == rows:
        return result.tokens
    words = str(_get(result, "question")).split()
    labels = ["[CLS]", *words, "[SEP]"] if _get(result, "block_name") == "text_encoder" else ["[DEC]"]
    return labels if len(labels) == rows else [str(row) for row in range(rows)]


def _columns(result: Mapping[str, Any], values: Values) -> Sequence[int]:
    columns = values.shape[1]
    if isinstance(result, HiddenFlow) and len(result.layers) == columns:
        return result.layers
    return range(columns)


def _of(result: Mapping[str, Any], name: str, given: Any, otherwise: Any) -> Any:
    """A setting: as given, else that by which the result was made."""
    if given is not None:
        return given
    return getattr(result.settings, name) if isinstance(result, HiddenFlow) else otherwise


def _high(result: Mapping[str, Any]) -> float:
    return float(torch.as_tensor(_get(result, "high_score")).flatten()[0])


def _vanishes(result: Mapping[str, Any]) -> bool:
    if isinstance(result, HiddenFlow) and result.trace is not None:
        return result.trace.total_effect_vanishes
    return abs(_high(result) - float(_get(result, "low_score"))) < VANISHING


def _kind(kind: object) -> str:
    name = str(kind).lower()
    check_names("kind", [name], KIND_COLORS)
    return name


def _title(given: str | None, usual: str, modelname: str | None) -> str:
    title = usual if given is None else given
    return f"{title} ({modelname})" if modelname else title


def _probability(result: Mapping[str, Any]) -> str:
    return f"p({str(_get(result, 'answer')).strip()})"
