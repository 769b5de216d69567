"""Activation patching of an nnsight-wrapped BLIP: what a loop of traces returns, in one pass of this engine.

    patched = activation_patching(model, clean, corrupted, model.text_encoder.encoder.layer)  # [L, T, 1, V]

Traces of one's own work on the same model before, between and after; their bodies are Python and cannot be
turned into cells, so that the sites are named instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import nnsight
import torch
from torch import Tensor, nn
from transformers import BlipForQuestionAnswering

from ..corrupting import Corruption, InputCorruption
from ..sites import Cell, Site
from .models import UnsupportedError, tracer_of
from .wrapped import Ends, Input, Pair, Place, foreign_hooks, patched_logits, places, rows_of

OWN_TRACE = "write a trace of your own"
TAKEN = {"input_ids", "pixel_values", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}

Metric = Callable[[Tensor], Tensor | float]


def activation_patching(
    model: Any,
    clean: Mapping[str, Tensor],
    corrupted: Mapping[str, Tensor] | Corruption,
    sites: Any,
    tokens: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    metric: Metric | None = None,
    processor: Any = None,
) -> Tensor:
    """The answer's logits in the corrupted run with one state put back to its clean value, site by site: what
    this loop of traces saves.

        with model.trace(**clean):
            state = envoy.output.clone().save()
        with model.trace(**corrupted):
            envoy.output[:, token] = state[:, token]
            logits = model.text_decoder.output.logits.save()

    model: an `NNsight`, or any other root envoy, around a loaded `BlipForQuestionAnswering`.
    clean, corrupted: what is given to a trace: `input_ids` [1, T], `pixel_values` [1, 3, H, W] and
        `decoder_input_ids` [[start token]]; they may differ in the picture, in the words or in both.
        `corrupted` may also be a corruption of `blip_trace.corruption` with its samples.
    sites: envoys, such as `model.text_encoder.encoder.layer`, whose outputs are patched, each at each of the
        `tokens` (of all, unless given; from -1 backwards too). With `heads`, one head's channels at a time of
        what an attention projects: of the output of `attention.self` or the input of
        `attention.E_output.dense`, likewise `crossattention`. Or cells of `blip_trace`, each a `Cell`, a
        `Site` or several sites, without tokens and heads.
    metric: is given the logits [1, 1, V] of each cell, as the trace has them, and returns a number or a
        tensor.
    processor: for a corruption that holds a phrase, or a picture that is no `pixel_values`.

    Returns, where the model is, logits [*grid, 1, V], or the metric's values [*grid, ...]; the grid is
    [envoys, tokens], [envoys, tokens, heads] or [cells]. A corruption's samples come first: [samples, *grid,
    ...].

    Raises UnsupportedError for what the engine does not do, naming what to do with nnsight; TypeError and
    ValueError for what is no such input. Warns where the model has forward hooks, which do not run.
    """
    module = _module(model)
    tracer, ends = tracer_of(module, processor), places(module)
    donor = _input(module, clean)
    made: Corruption | Literal["none"]
    if swapped := isinstance(corrupted, Mapping):
        base = _input(module, corrupted)
        if len(base.ids) != len(donor.ids):
            raise UnsupportedError("a corrupted question of another length", OWN_TRACE)
        made = Pair(donor, base).corruption
    elif callable(corrupted) or isinstance(corrupted, InputCorruption):
        made = corrupted
    else:
        raise TypeError(
            f"corrupted must be the inputs of a trace or a corruption, not a {type(corrupted).__name__}"
        )
    sites = _listed(sites)
    if any(isinstance(site, nnsight.Envoy) for site in sites):
        found = [_place(module, ends, envoy, heads is not None) for envoy in sites]
        grid, cells = _grid(found, _lengths(module, donor, found), tokens, heads)
    elif tokens is not None or heads is not None:
        raise ValueError("tokens and heads go with envoys: a site has its own")
    else:
        grid, cells = (len(sites),), [_cell(site) for site in sites]
    logits, _ = patched_logits(tracer, donor, made, cells)  # [S, cells, 1, V]
    samples = () if swapped else (len(logits),)
    rows = logits.flatten(0, 1)
    if metric is not None:
        rows = torch.stack([_value(metric(row[None])) for row in rows])
    return rows.reshape(*samples, *grid, *rows.shape[1:])


def _module(model: Any) -> Any:
    """The wrapped model, once it is one that the engine stands in for."""
    if not isinstance(model, nnsight.Envoy):
        raise TypeError(f"the model must be wrapped by nnsight, not a {type(model).__name__}")
    module = model._module
    if not isinstance(module, BlipForQuestionAnswering):
        raise TypeError(
            f"only BlipForQuestionAnswering is patched here, and {type(model).__name__} wraps a "
            f"{type(module).__name__}: wrap a loaded model"
        )
    if any(weight.is_meta for weight in module.parameters()):
        raise UnsupportedError("a model that is remote or not loaded", "load it with dispatch=True")
    if model._edits:
        raise UnsupportedError("a model with edits", f"clear_edits() first, or {OWN_TRACE}")
    if any(part.training for part in module.modules()):
        raise UnsupportedError("a model in training mode", f"call eval() first, or {OWN_TRACE}")
    if module.dtype != torch.float32:
        raise UnsupportedError(f"a model in {module.dtype}", OWN_TRACE)
    if any(foreign_hooks(part) for part in module.modules()):
        warnings.warn("the model has forward hooks, which do not run here as in a trace", stacklevel=3)
    return module


def _input(module: Any, inputs: Any) -> Input:
    """What is given to one trace."""
    if other := set(inputs) - TAKEN:
        raise UnsupportedError(f"the input {min(other)}", OWN_TRACE)
    rows = rows_of(inputs, module.config.text_config.pad_token_id, OWN_TRACE)
    if len(rows) != 1:
        raise UnsupportedError(f"a batch of {len(rows)} rows", "call this for one row after the other")
    begun = inputs.get("decoder_input_ids")
    if begun is None:
        raise ValueError("a trace needs decoder_input_ids: the start token of the answer")
    if begun.tolist() != [[module.decoder_start_token_id]]:
        raise UnsupportedError("an answer begun with other tokens than the start token", OWN_TRACE)
    return rows[0]


def _listed(sites: Any) -> list[Any]:
    """The sites; an envoy of a list of modules is the envoys of those."""
    if isinstance(sites, nnsight.Envoy):
        return list(sites) if isinstance(sites._module, nn.ModuleList) else [sites]
    listed = list(sites)
    if not listed:
        raise ValueError("no sites given to patch")
    return listed


def _place(module: Any, ends: Ends, envoy: Any, heads: bool) -> Place:
    if not isinstance(envoy, nnsight.Envoy):
        raise TypeError(f"sites are all envoys or all cells: there is a {type(envoy).__name__} among envoys")
    if all(part is not envoy._module for part in module.modules()):
        raise ValueError(f"{envoy.path} is no envoy of this model")
    if not heads:
        if place := ends.get((envoy._module, "output")):
            return place
        raise UnsupportedError(f"patching the output of {envoy.path}", OWN_TRACE)
    for end in ("output", "input"):
        if (place := ends.get((envoy._module, end))) and place.heads:
            return place
    raise UnsupportedError(f"patching heads at {envoy.path}", OWN_TRACE)


def _lengths(module: Any, donor: Input, found: Sequence[Place]) -> set[int]:
    """How many tokens the stacks of these places have."""
    vision = module.config.vision_config
    tokens = {"text_encoder": len(donor.ids), "text_decoder": 1}
    tokens["vision"] = (vision.image_size // vision.patch_size) ** 2 + 1
    return {tokens[place.stack] for place in found}


def _grid(
    found: Sequence[Place], lengths: set[int], tokens: Sequence[int] | None, heads: Sequence[int] | None
) -> tuple[tuple[int, ...], list[Cell]]:
    if tokens is None and len(lengths) > 1:
        raise ValueError("the envoys' stacks have different numbers of tokens: say which tokens to patch")
    at = _numbers("token", range(min(lengths)) if tokens is None else tokens, min(lengths))
    if heads is None:
        return (len(found), len(at)), [Cell.of(place.sites([token])) for place, token in product(found, at)]
    of = _numbers("head", heads, min(place.heads for place in found))
    cells = [Cell.of(place.sites([token], [head])) for place, token, head in product(found, at, of)]
    return (len(found), len(at), len(of)), cells


def _numbers(what: str, numbers: Sequence[int], limit: int) -> list[int]:
    """Numbers from 0, of such as may count from -1 backwards."""
    if not len(numbers):
        raise ValueError(f"no {what}s given to patch")
    for number in numbers:
        if not -limit <= number < limit:
            raise ValueError(f"there is no {what} {number}: there are {limit}")
    return [range(limit)[number] for number in numbers]


def _cell(given: Any) -> Cell:
    if isinstance(given, Cell):
        return given
    sites = [given] if isinstance(given, Site) else list(given)
    for site in sites:
        if not isinstance(site, Site):
            raise TypeError(f"a cell is made of sites, not of {type(site).__name__}")
    return Cell.of(sites)


def _value(found: Tensor | float) -> Tensor:
    return found if isinstance(found, Tensor) else torch.tensor(found, dtype=torch.float64)
