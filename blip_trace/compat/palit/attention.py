"""The names of the notebook of attention and cross-attention, where it differs from the main one.

`from blip_trace.compat.palit.attention import *` takes the place of the cells that define them. The same
functions as in `blip_trace.compat.palit`, with `notebook="attention"`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..models import UnsupportedError
from . import flow, plots, shown
from .flow import HiddenFlow
from .layers import layername
from .model import (
    BlipVQAOutput,
    ModelandProcessor,
    customblip_temp,
    decoding,
    make_inputs,
    predict_from_input,
    result_gen,
)
from .plots import plot_kindtrace_heatmap
from .settings import FACTOR, Options, check_rows, refuse_share

__all__ = [
    "BlipVQAOutput",
    "HiddenFlow",
    "ModelandProcessor",
    "Options",
    "avgnormal_heatmap",
    "calculate_hidden_flow",
    "customblip_temp",
    "decoding",
    "layername",
    "make_inputs",
    "noisy_embedding",
    "plot_all_flow",
    "plot_hidden_flow",
    "plot_kind_hidden_flow",
    "plot_kindavg_hidden_flow",
    "plot_kindtrace_heatmap",
    "plot_trace_heatmap",
    "plotkind_all_flow",
    "predict_from_input",
    "result_gen",
    "trace_important_states",
    "trace_important_window",
    "trace_with_patch",
]

trace_with_patch = partial(flow.trace_with_patch, notebook="attention")
trace_important_states = partial(flow.trace_important_states, notebook="attention")
trace_important_window = partial(flow.trace_important_window, notebook="attention")
calculate_hidden_flow = partial(flow.calculate_hidden_flow, notebook="attention")
plot_trace_heatmap = partial(plots.plot_trace_heatmap, notebook="attention")
avgnormal_heatmap = plots.kind_average_heatmap
plot_hidden_flow = partial(shown.plot_hidden_flow, notebook="attention")
plot_all_flow = partial(shown.plot_all_flow, notebook="attention")
plot_kind_hidden_flow = partial(shown.plot_kind_hidden_flow, notebook="attention")
plot_kindavg_hidden_flow = partial(shown.plot_kindavg_hidden_flow, notebook="attention")
plotkind_all_flow = partial(shown.plotkind_all_flow, notebook="attention")


def noisy_embedding(
    image_embed_tensor: Tensor,
    uniform_noise: bool = True,
    noise: float | Callable[[Tensor], Tensor] = FACTOR,
    percentage_dimensions: float = 1,
) -> Tensor:
    """Multiply row 1 of image embeddings [2, N, D] by `noise`, or put noise(row) there, in place; returns
    them. Nothing is drawn.

    Raises ValueError for another shape; UnsupportedError for other values of uniform_noise and
    percentage_dimensions, which the notebook takes and does not use.
    """
    check_rows(image_embed_tensor)
    refuse_share(percentage_dimensions)
    if uniform_noise is not True:
        raise UnsupportedError(
            f"uniform_noise={uniform_noise!r}",
            "the notebook draws no noise, uniform or other; give `noise` a function that does",
        )
    row = image_embed_tensor[1]
    with torch.no_grad():
        row.copy_(noise(row) if callable(noise) else row * noise)
    return image_embed_tensor
