"""TransformerLens's activation patching (`transformer_lens.patching`, 4.3) for BLIP, all indices in one pass.

    from blip_trace.compat import transformer_lens as patching

    clean, corrupted = (patching.HookedBlip(model, image, processor=processor) for image in images)
    tokens = clean.to_tokens("what color is the circle")
    _, cache = clean.run_with_cache(tokens)
    patching.get_act_patch_resid_mid(corrupted, tokens, cache, metric)  # [layers, tokens]

`HookedBlip` is a model that the library's own functions take, which do a forward pass for each index. Those
of the same names here have the same arguments and results, for the activations of `HOOKS` that are sites of
ours. They run the library's own loop over logits that are there already: the metric gets those [B, A, V] of
one index after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import pandas as pd
from pandas.api.types import is_integer_dtype
from torch import Tensor
from transformer_lens import patching
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.patching import (
    PatchingResult,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
    make_df_from_ranges,
)
from transformer_lens.utilities.components_utils import get_act_name

from ..models import UnsupportedError
from .hooks import HOOKS, layer_and_place
from .model import CachedRun, HookedBlip
from .passes import BY_HAND, Passes
from .replay import Replay, Setter

__all__ = [
    "HOOKS",
    "HookedBlip",
    "PatchingResult",
    "generic_activation_patch",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
]

Metric = Callable[[Tensor], Tensor | float]
Patched: TypeAlias = Tensor | tuple[Tensor, pd.DataFrame] | PatchingResult

SETTERS = (layer_pos_patch_setter, layer_pos_head_vector_patch_setter, layer_head_vector_patch_setter)
"""What is known to copy states from one run into the other, and to do nothing else."""


def generic_activation_patch(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    patching_metric: Metric | Mapping[str, Metric],
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: pd.DataFrame | None = None,
    return_index_df: bool = False,
    *,
    reduce: str = "scalar",
    baseline: bool = False,
) -> Patched:
    """`transformer_lens.patching.generic_activation_patch`, which describes arguments and results.

    model: the corrupted run's; clean_cache: of the clean one's `run_with_cache`, of as many rows or of one.
    The two may differ in pictures, in words or in both; one of them may have a corruption.

    Raises UnsupportedError for setters that are not the library's `SETTERS`, for activations that are no site
    and for runs that the engine cannot mix; ValueError or TypeError for what the library refuses too.
    """
    if (index_axis_names is None) == (index_df is None):
        raise ValueError("give index_axis_names or index_df, one of the two")
    _check_site(activation_name)
    if not any(patch_setter is own for own in SETTERS):
        name = getattr(patch_setter, "__name__", repr(patch_setter))
        raise UnsupportedError(f"the patch setter {name}", BY_HAND)
    sweep = _Sweep(patch_setter, activation_name, index_axis_names, index_df)
    replay = _replay(model, corrupted_tokens, clean_cache, [sweep])
    own_loop: Callable[..., Patched] = patching.generic_activation_patch
    return own_loop(
        replay,
        corrupted_tokens,
        replay.marks,
        patching_metric,
        *sweep,
        return_index_df,
        reduce=reduce,
        baseline=baseline,
    )


class _Sweep(NamedTuple):
    """What is patched, in the order of `generic_activation_patch`."""

    patch_setter: Setter
    activation_name: str
    index_axis_names: Sequence[str] | None = None
    index_df: pd.DataFrame | None = None

    def wanted(self, model: HookedBlip, tokens: Tensor) -> list[tuple[str, Setter, list[int]]]:
        """Every hook's name, the setter and its index. Raises ValueError for axes that do not exist and for
        indices that are no whole numbers."""
        frame = self.index_df
        if frame is None:
            assert self.index_axis_names is not None
            heads, pos = model.cfg.n_heads, tokens.shape[-1]
            sizes = {"layer": model.cfg.n_layers, "pos": pos, "src_pos": pos, "dest_pos": pos}
            sizes |= {"head": heads, "head_index": heads}
            for axis in self.index_axis_names:
                if axis not in sizes:
                    raise ValueError(f"unknown axis {axis!r}: choose among {', '.join(sizes)}")
            axes = list(self.index_axis_names)
            frame = make_df_from_ranges([sizes[axis] for axis in axes], axes)
        elif not all(is_integer_dtype(dtype) for dtype in frame.dtypes):
            raise ValueError("index_df must hold whole numbers")
        name = self.activation_name
        return [
            (get_act_name(name, layer=index[0]), self.patch_setter, index)
            for index in frame.to_numpy().tolist()
        ]


def _check_site(activation_name: str) -> None:
    name = get_act_name(activation_name, layer=0)
    found = layer_and_place(name)
    if found is None:
        raise UnsupportedError(
            f"the activation {activation_name!r}", f"the hook points of a layer are {', '.join(HOOKS)}"
        )
    if found[1].kind is None:
        raise UnsupportedError(f"patching {activation_name!r}, which is no site of the engine,", BY_HAND)


def _replay(model: HookedBlip, tokens: Tensor, cache: ActivationCache, sweeps: Sequence[_Sweep]) -> Replay:
    if not isinstance(model, HookedBlip):
        raise TypeError(f"the model must be a HookedBlip, not {type(model).__name__}")
    run = CachedRun.of(cache)
    if not isinstance(tokens, Tensor):
        raise TypeError(f"the corrupted tokens must be a tensor [B, T], not {type(tokens).__name__}")
    if run.stack != model.stack or run.tracer is not model.tracer:
        raise ValueError(
            "the clean cache is of another stack, model or tracer, or of weights before a change"
        )
    bases = model.rows(tokens)
    wanted = [one for sweep in sweeps for one in sweep.wanted(model, tokens)]
    passes = Passes(model.tracer, model.stack, run.rows, bases, model.answer)
    replay = Replay(model, cache, passes, tokens.shape[-1], wanted)
    run.check(cache, dict.fromkeys(name for name, _, _ in wanted))
    return replay


def _preset(own: Any) -> partial[Patched]:
    """The library's preset with its arguments, of the function here."""
    made = partial(generic_activation_patch, **own.keywords)
    made.__doc__ = own.__doc__
    return made


get_act_patch_resid_pre = _preset(patching.get_act_patch_resid_pre)
get_act_patch_resid_mid = _preset(patching.get_act_patch_resid_mid)
get_act_patch_attn_out = _preset(patching.get_act_patch_attn_out)
get_act_patch_mlp_out = _preset(patching.get_act_patch_mlp_out)
get_act_patch_attn_head_out_by_pos = _preset(patching.get_act_patch_attn_head_out_by_pos)
get_act_patch_attn_head_out_all_pos = _preset(patching.get_act_patch_attn_head_out_all_pos)

# what is no site: each raises an UnsupportedError that names it
get_act_patch_attn_head_q_by_pos = _preset(patching.get_act_patch_attn_head_q_by_pos)
get_act_patch_attn_head_k_by_pos = _preset(patching.get_act_patch_attn_head_k_by_pos)
get_act_patch_attn_head_v_by_pos = _preset(patching.get_act_patch_attn_head_v_by_pos)
get_act_patch_attn_head_q_all_pos = _preset(patching.get_act_patch_attn_head_q_all_pos)
get_act_patch_attn_head_k_all_pos = _preset(patching.get_act_patch_attn_head_k_all_pos)
get_act_patch_attn_head_v_all_pos = _preset(patching.get_act_patch_attn_head_v_all_pos)
get_act_patch_attn_head_pattern_by_pos = _preset(patching.get_act_patch_attn_head_pattern_by_pos)
get_act_patch_attn_head_pattern_all_pos = _preset(patching.get_act_patch_attn_head_pattern_all_pos)
get_act_patch_attn_head_pattern_dest_src_pos = _preset(patching.get_act_patch_attn_head_pattern_dest_src_pos)


def _every(
    whole: Callable[..., Tensor | PatchingResult],
    sites: Sequence[Any],
    model: HookedBlip,
    tokens: Tensor,
    cache: ActivationCache,
    metric: Metric | Mapping[str, Metric],
    given: Mapping[str, Any],
) -> Tensor | PatchingResult:
    """A function of the library that calls several presets, of which these `sites` are done in one pass."""
    for name in given:
        if name not in ("reduce", "baseline"):
            raise UnsupportedError(
                f"the argument {name!r} of several presets at once", "call them one by one"
            )
    replay = _replay(model, tokens, cache, [_Sweep(**preset.keywords) for preset in sites])
    return whole(replay, tokens, replay.marks, metric, **given)


def get_act_patch_block_every(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """resid_pre, attn_out and mlp_out in one pass: [3, layer, pos]. Arguments, results and errors as in
    `generic_activation_patch`; kwargs: `reduce` and `baseline`."""
    sites = get_act_patch_resid_pre, get_act_patch_attn_out, get_act_patch_mlp_out
    whole = patching.get_act_patch_block_every
    return _every(whole, sites, model, corrupted_tokens, clean_cache, metric, kwargs)


def get_act_patch_attn_head_all_pos_every(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """Output, query, key, value and pattern of every head: [5, layer, head].

    Only the outputs are done in one pass: the other four are no sites, take a forward pass of the Hugging
    Face model for each index, and a warning is logged for each. Otherwise as `get_act_patch_block_every`.
    """
    sites = [get_act_patch_attn_head_out_all_pos]
    whole = patching.get_act_patch_attn_head_all_pos_every
    return _every(whole, sites, model, corrupted_tokens, clean_cache, metric, kwargs)


def get_act_patch_attn_head_by_pos_every(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    metric: Metric | Mapping[str, Metric],
    **kwargs: Any,
) -> Tensor | PatchingResult:
    """As `get_act_patch_attn_head_all_pos_every`, position by position: [5, layer, pos, head]."""
    sites = [get_act_patch_attn_head_out_by_pos]
    whole = patching.get_act_patch_attn_head_by_pos_every
    return _every(whole, sites, model, corrupted_tokens, clean_cache, metric, kwargs)


def get_act_patch_direct_path(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    corrupted_cache: ActivationCache,
    patching_metric: Metric,
    src_layer: int,
    src_head: int,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Always raises UnsupportedError: in a post-norm layer a head's output reaches no later head by itself,
    and the library's own function refuses such models too."""
    raise UnsupportedError(
        "direct path patching", "the method is defined for pre-norm layers, BLIP's are not"
    )


def get_act_patch_direct_path_all_sources(
    model: HookedBlip,
    corrupted_tokens: Tensor,
    clean_cache: ActivationCache,
    corrupted_cache: ActivationCache,
    patching_metric: Metric,
    component: str = "q",
    verbose: bool = True,
) -> Tensor:
    """Always raises UnsupportedError, as `get_act_patch_direct_path` does."""
    raise UnsupportedError(
        "direct path patching", "the method is defined for pre-norm layers, BLIP's are not"
    )
