"""The names of the BLIP causal-tracing notebooks (Palit et al. 2023), on this engine.

`from blip_trace.compat.palit import *` takes the place of the cells that define them in the main notebook
("Cleaned_Corrected_..."), `from blip_trace.compat.palit.attention import *` of those in the notebook of
attention and cross-attention; later cells stay as they are. Signatures and results are the notebooks'; what
is new comes in keyword-only arguments after theirs: see `Options`.

By default the maps are mended: ten samples of a seeded noise that all cells have in common, a normalisation
that does not divide by nothing, labels of the tokens that the model sees. `faithful=True` gives the
notebooks' own arithmetic.
"""

from .flow import (
    HiddenFlow,
    calculate_hidden_flow,
    trace_important_states,
    trace_important_window,
    trace_with_patch,
)
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
from .plots import (
    avg_heatmap,
    avgnormal_heatmap,
    plot_kindtrace_heatmap,
    plot_map,
    plot_trace_heatmap,
)
from .settings import Options, noisy_embedding
from .shown import (
    plot_all_flow,
    plot_average_hidden_flow,
    plot_hidden_flow,
    plot_kind_hidden_flow,
    plotkind_all_flow,
)

__all__ = [
    "BlipVQAOutput",
    "HiddenFlow",
    "ModelandProcessor",
    "Options",
    "avg_heatmap",
    "avgnormal_heatmap",
    "calculate_hidden_flow",
    "customblip_temp",
    "decoding",
    "layername",
    "make_inputs",
    "noisy_embedding",
    "plot_all_flow",
    "plot_average_hidden_flow",
    "plot_hidden_flow",
    "plot_kind_hidden_flow",
    "plot_kindtrace_heatmap",
    "plot_map",
    "plot_trace_heatmap",
    "plotkind_all_flow",
    "predict_from_input",
    "result_gen",
    "trace_important_states",
    "trace_important_window",
    "trace_with_patch",
]
