"""ROME's heatmap of a result: raw scores from the low score upwards, the subject's tokens starred."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...plotting import check_format, printable, save_figure

COLORS = {"": "Purples", "mlp": "Greens", "attn": "Reds", "cross_attn": "Oranges"}
NAMES = {"mlp": "MLP", "attn": "self-attention", "cross_attn": "cross-attention"}
EVERY = 5
"""Layers from one labelled to the next."""


def plot_trace_heatmap(
    result: Mapping[str, Any],
    savepdf: str | Path | None = None,
    title: str | None = None,
    xlabel: str | None = None,
    modelname: str | None = None,
) -> None:
    """Draw what `calculate_hidden_flow` returned, or `read_case` read.

    savepdf: where to save it, whole or not at all (.pdf, .png or .svg), its folder made if need be; None:
    shown. xlabel: in the place of the layers' description; the answer is then not written below the colour
    bar. Raises ValueError for another format and for a result without scores (a wrong prediction), OSError
    where the file cannot be written.
    """
    from matplotlib import pyplot as plt

    check_format(savepdf)
    if "scores" not in result:
        raise ValueError("the result has no scores: the prediction was not the expected one")
    scores, low = np.asarray(result["scores"], dtype=np.float64), float(result["low_score"])
    kind = str(result["kind"]) if result["kind"] else ""  # ROME's older files say "None"
    kind = "" if kind == "None" else kind
    layers = range(0, scores.shape[1], EVERY)
    with plt.rc_context(rc={"font.family": "serif", "font.serif": ["Times New Roman", "DejaVu Serif"]}):
        figure, axes = plt.subplots(figsize=(3.5, 2), dpi=200)
        high = max(float(np.nanmax(scores)), low + 1e-6)
        mesh = axes.pcolor(scores, cmap=COLORS[kind], vmin=low, vmax=high)
        axes.invert_yaxis()
        axes.set_yticks([row + 0.5 for row in range(len(scores))])
        axes.set_yticklabels(_labels(result, scores), parse_math=False)
        axes.set_xticks([layer + 0.5 for layer in layers])
        axes.set_xticklabels([str(layer) for layer in layers])
        what = NAMES.get(kind, "state")
        axes.set_title(title or f"{what} restored under noise")
        centre = f"centre of {int(result.get('window', 10))} restored {what} layers"
        axes.set_xlabel(xlabel or (centre if kind else f"the one restored layer of {modelname or 'BLIP'}"))
        bar = figure.colorbar(mesh)
        if xlabel is None and result.get("answer") is not None:
            answer = printable(str(result["answer"]).strip())
            bar.ax.set_title(f"p({answer})", y=-0.16, loc="left", fontsize=10, parse_math=False)
        if savepdf is None:
            plt.show()
        else:
            path = Path(savepdf)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_figure(figure, path)
            plt.close(figure)


def _labels(result: Mapping[str, Any], scores: npt.NDArray[np.float64]) -> list[str]:
    """A label for each row; of the last token of the subject alone, where the map has just that."""
    first, behind = (int(place) for place in result["subject_range"])
    labels = [printable(str(token)) for token in result["input_tokens"]]
    labels[first:behind] = [f"{label}*" for label in labels[first:behind]]
    return labels[behind - 1 : behind] if len(scores) == 1 else labels
