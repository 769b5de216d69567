"""The notebooks' functions that trace and then draw, or only seem to."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Unpack

from ...plotting import check_format
from .flow import HiddenFlow, calculate_hidden_flow
from .model import ModelandProcessor, customblip_temp
from .plots import KIND_COLORS, plot_kindtrace_heatmap, plot_trace_heatmap
from .settings import Options, refuse_unused


def plot_hidden_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    block_name: str,
    savepdf: str | Path | None = None,
    **options: Unpack[Options],
) -> HiddenFlow | None:
    """`calculate_hidden_flow` of a block. Main notebook: its result; it is drawn where there is a `savepdf`
    to draw it to. Attention notebook: drawn, saved or shown, and nothing is returned."""
    check_format(savepdf)
    result = calculate_hidden_flow(mt, new_model, image, question, block_name, **options)
    main = result.settings.notebook == "main"
    if savepdf is not None or not main:
        plot_trace_heatmap(result, savepdf)
    return result if main else None


def plot_all_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    savepdf: str | Path | None = None,
    subject: str | None = None,
    **options: Unpack[Options],
) -> HiddenFlow | None:
    """`plot_hidden_flow` of the one block that each notebook lists here: the text encoder (main), the text
    decoder (attention). Raises UnsupportedError for a subject, which both take and ignore."""
    refuse_unused(subject=subject)
    block = "text_decoder" if options.get("notebook") == "attention" else "text_encoder"
    return plot_hidden_flow(mt, new_model, image, question, block, savepdf, **options)


def plot_average_hidden_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    block_name: str,
    savepdf: str | Path | None = None,
    **options: Unpack[Options],
) -> HiddenFlow:
    """`calculate_hidden_flow` of a block, for a loop that averages; drawn too where there is a `savepdf`."""
    check_format(savepdf)
    result = calculate_hidden_flow(mt, new_model, image, question, block_name, **options)
    if savepdf is not None:
        plot_trace_heatmap(result, savepdf)
    return result


def plot_kind_hidden_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    block_name: str,
    kind: str,
    savepdf: str | Path | None = None,
    **options: Unpack[Options],
) -> None:
    """Draw the map of a kind, "attention" or "crossattention"; saved to `savepdf` or shown."""
    check_format(savepdf)
    plot_kindtrace_heatmap(
        calculate_hidden_flow(mt, new_model, image, question, block_name, kind, **options), savepdf
    )


def plot_kindavg_hidden_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    block_name: str,
    kind: str,
    savepdf: str | Path | None = None,
    **options: Unpack[Options],
) -> HiddenFlow:
    """`calculate_hidden_flow` of a kind, for a loop that averages; drawn too where there is a `savepdf`."""
    check_format(savepdf)
    result = calculate_hidden_flow(mt, new_model, image, question, block_name, kind, **options)
    if savepdf is not None:
        plot_kindtrace_heatmap(result, savepdf)
    return result


def plotkind_all_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    savepdf: str | Path | None = None,
    subject: str | None = None,
    **options: Unpack[Options],
) -> None:
    """Draw the question encoder's maps of both kinds: shown, or saved to `savepdf` with the kind's name
    added, "map.pdf" to "map_attention.pdf" and "map_crossattention.pdf".

    Raises UnsupportedError for a subject, which the notebook takes and ignores.
    """
    refuse_unused(subject=subject)
    for kind in KIND_COLORS:
        path = None if savepdf is None else Path(savepdf)
        own = None if path is None else path.with_name(f"{path.stem}_{kind}{path.suffix}")
        plot_kind_hidden_flow(mt, new_model, image, question, "text_encoder", kind, own, **options)
