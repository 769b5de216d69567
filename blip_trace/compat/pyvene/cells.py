"""From a call of pyvene's to cells: what of it one pass can do, and why the rest of it cannot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyvene import CollectIntervention, VanillaIntervention, type_to_module_mapping
from pyvene.models.basic_utils import get_batch_size
from pyvene.models.constants import CONST_INPUT_HOOK, split_head_and_permute
from pyvene.models.modeling_utils import get_dimension_by_component
from torch import Tensor
from transformers import BlipForQuestionAnswering

from ...sites import Cell, Site
from ..models import UnsupportedError
from ..wrapped import End, Ends, Input, Pair, Place, rows_of
from .model import PYVENE

TAKEN = {"input_ids", "pixel_values", "attention_mask"}
TAKEN_BY_DECODER = {"decoder_input_ids", "decoder_attention_mask", "labels"}
"""Of the raw Hugging Face model; pyvene's wrapper gives its decoder the start token."""

Rows = list[list[int]]
"""Positions of each row of the batch."""


@dataclass(frozen=True)
class Call:
    """The arguments of `IntervenableModel.forward`."""

    base: Any
    sources: Any = None
    unit_locations: Any = None
    source_representations: Any = None
    subspaces: Any = None
    labels: Any = None
    output_original_output: bool | None = False
    return_dict: bool | None = None
    use_cache: bool | None = None
    intervention_additional_kwargs: Any = None

    @classmethod
    def of(cls, base: Any, sources: Any, unit_locations: Any, *others: Any) -> Call:
        """A call that knows nothing of what is done with the dictionaries and lists afterwards."""
        copies: dict[int, Any] = {}

        def copied(inputs: Any) -> Any:
            return copies.setdefault(id(inputs), dict(inputs) if isinstance(inputs, Mapping) else inputs)

        listed = isinstance(sources, list)
        sources = [copied(source) for source in sources] if listed else copied(sources)
        return cls(copied(base), sources, deepcopy(unit_locations), *others)

    @property
    def source_list(self) -> list[Any]:
        """The sources as pyvene sees them."""
        return self.sources if isinstance(self.sources, list) else [self.sources]


class Plan(NamedTuple):
    """What a call comes to: for each row of its batch a pair of inputs and a cell; the labels of the decoder
    [B, 2] or None, and for each representation that collects the decoder's logits its positions, or None."""

    pairs: list[Pair]
    cells: list[Cell]
    labels: Tensor | None
    collected: list[Rows | None]


class Known:
    """A model as calls are planned for it; equal inputs are found to be equal once."""

    def __init__(self, whole: Any, ends: Ends) -> None:
        self.whole = whole
        self.ends = ends
        self._pairs: dict[tuple[int, int], list[Pair]] = {}
        self._alive: list[Any] = []

    def pairs(self, base: Mapping[str, Any], source: Mapping[str, Any]) -> list[Pair]:
        """Those of the rows; the same object for rows that are equal."""
        key = id(base), id(source)
        if key not in self._pairs:
            self._alive += base, source  # or another dictionary could get its id
            pad = self.whole.config.text_config.pad_token_id
            bases, donors = (rows_of(inputs, pad, PYVENE) for inputs in (base, source))
            if len(bases) != len(donors):
                raise UnsupportedError("a source of another number of rows", PYVENE)
            self._pairs[key] = _pairs(donors, bases)
        return self._pairs[key]


def _pairs(donors: list[Input], bases: list[Input]) -> list[Pair]:
    pairs: list[Pair] = []
    for donor, base in zip(donors, bases, strict=True):
        if len(donor.ids) != len(base.ids):
            raise UnsupportedError("a source whose question has another length", PYVENE)
        for known in {id(pair): pair for pair in pairs}.values():
            if all(map(torch.equal, (*known.donor, *known.base), (*donor, *base))):
                pairs.append(known)
                break
        else:
            pairs.append(Pair(donor, base))
    return pairs


def plan(made: Any, known: Known, call: Call) -> Plan:
    """The cells of a call of an intervenable model, row by row.

    Raises UnsupportedError for whatever one pass cannot do, ValueError for what pyvene does not take either.
    """
    locations = made._broadcast_unit_locations(get_batch_size(call.base), call.unit_locations)
    _check_call(made, call)
    source_of = _sources(made, call, locations)
    donors = [source for source in source_of.values() if source is not None]
    if not donors:
        raise UnsupportedError("a call without sources", PYVENE)
    if not all(_same(donors[0], other) for other in donors[1:]):
        raise UnsupportedError("a call with several different sources", PYVENE)
    labels, same_length = _check_decoder(known.whole, made.model, call, donors[0])
    pairs = known.pairs(call.base, donors[0])
    sites: list[set[Site]] = [set() for _ in pairs]
    collected: list[Rows | None] = []
    theirs, ours = locations["sources->base"]
    for number, key in enumerate(made.sorted_keys):
        here = _at(ours, number)
        if type(made.interventions[key]) is CollectIntervention:
            _check_collected(made, known.whole, key, source_of[key], labels)
            collected.append(None if here is None else _table(here, len(pairs)))
        elif source_of[key] is not None:
            place = _place(made, known.ends, key)
            if place.stack == "text_decoder" and here is None and not same_length:
                raise UnsupportedError("a source whose answer has another length", PYVENE)
            _add_sites(sites, made, key, place, (_at(theirs, number), here), pairs)
    if any(rows not in (None, [[0]] * len(pairs)) for rows in collected):
        raise UnsupportedError("a position behind the answer's first token", PYVENE)
    return Plan(pairs, [Cell.of(own) for own in sites], labels, collected)


def _check_call(made: Any, call: Call) -> None:
    refused = {
        f"the mode {made.mode}": made.mode != "parallel",
        "as_adaptor": made.as_adaptor,
        "linking interventions": bool(made._intervention_reverse_link),
        "source_representations": call.source_representations is not None,
        "choosing subspaces": call.subspaces is not None,
        "use_cache": call.use_cache is not None,
        "intervention_additional_kwargs": bool(call.intervention_additional_kwargs),
        "a call without sources": call.sources is None,
        "taking gradients": torch.is_grad_enabled() and _takes_gradients(made, call),
    }
    for part, found in refused.items():
        if found:
            raise UnsupportedError(part, PYVENE)


def _takes_gradients(made: Any, call: Call) -> bool:
    tensors = (x for inputs in (call.base, *call.source_list) if inputs is not None for x in inputs.values())
    return made.model_has_grad or any(isinstance(x, Tensor) and x.requires_grad for x in tensors)


def _sources(made: Any, call: Call, locations: Any) -> dict[str, Any]:
    """The source of each representation, by key; None: it does nothing."""
    groups = made._intervention_group
    sources = call.source_list
    sources = sources * len(groups) if len(sources) == 1 else sources
    if list(groups) != list(range(len(sources))):
        raise UnsupportedError("group keys that do not count the sources", PYVENE)
    made._input_validation(call.base, sources, locations, None, None)
    return {key: sources[group] for group, keys in groups.items() for key in keys}


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    def equal(mine: object, theirs: object) -> bool:
        both = isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        return torch.equal(mine, theirs) if both else mine is theirs  # type: ignore[arg-type]

    alike = one is other or one.keys() == other.keys()
    return alike and all(equal(value, other[name]) for name, value in one.items())


def _check_decoder(whole: Any, model: Any, call: Call, source: Any) -> tuple[Tensor | None, bool]:
    """The decoder's labels, if there are any, and whether it is given as many tokens in both runs."""
    raw = model is whole
    for inputs in (call.base, source):
        if other := set(inputs) - TAKEN - (TAKEN_BY_DECODER if raw else set()):
            raise UnsupportedError(f"the input {min(other)}", PYVENE)
    if not raw:
        if call.labels is not None:
            raise UnsupportedError("labels for pyvene's wrapper", PYVENE)
        return None, True
    flags = whole.config
    if not flags.return_dict or flags.output_hidden_states or flags.output_attentions:
        raise UnsupportedError("a model whose config changes what it returns", PYVENE)
    if call.labels is not None and ("labels" in call.base or call.output_original_output):
        raise UnsupportedError("labels of one of two runs", PYVENE)
    labels = call.base.get("labels") if call.labels is None else call.labels
    own = _decoder_length(whole, call.base.get("decoder_input_ids"), labels)
    theirs = _decoder_length(whole, source.get("decoder_input_ids"), source.get("labels"))
    return labels, own == theirs


def _decoder_length(whole: Any, ids: Tensor | None, labels: Tensor | None) -> int:
    given = labels if ids is None else ids
    if given is None:
        raise ValueError("a run needs decoder_input_ids or labels")
    expected = 1 if labels is None else 2  # of labels the last is not put in but predicted
    alike = labels is None or torch.equal(given, labels)
    if not alike or given.shape[1] != expected or bool((given[:, 0] != whole.decoder_start_token_id).any()):
        raise UnsupportedError("an answer other than one token behind the start token", PYVENE)
    return expected


def _check_collected(made: Any, whole: Any, key: str, source: Any, labels: Tensor | None) -> None:
    hook = made.intervention_hooks[key]
    whole_output = made.interventions[key].interchange_dim is None and made.representations[key].unit == "pos"
    of_logits = hook.__self__ is whole.text_decoder and hook.__func__.__name__ != CONST_INPUT_HOOK
    if not (whole_output and of_logits and labels is None and source is None):
        raise UnsupportedError("collecting anything but the decoder's logits", PYVENE)


def _place(made: Any, ends: Ends, key: str) -> Place:
    intervention, representation = made.interventions[key], made.representations[key]
    if type(intervention) is not VanillaIntervention:
        raise UnsupportedError(f"an intervention of type {type(intervention).__name__}", PYVENE)
    if intervention.is_source_constant:
        raise UnsupportedError("an intervention with a constant source", PYVENE)
    hook = made.intervention_hooks[key]
    end: End = "input" if hook.__func__.__name__ == CONST_INPUT_HOOK else "output"
    if (hook.__self__, end) not in ends:
        layer = "" if "." in representation.component else f" of layer {representation.layer}"
        raise UnsupportedError(f"the component {representation.component!r}{layer}", PYVENE)
    place = ends[hook.__self__, end]
    if place.stack == "vision" and isinstance(made.model, BlipForQuestionAnswering):
        raise UnsupportedError("a state of the image encoder of a model without pyvene's wrapper", PYVENE)
    return place


def _add_sites(
    sites: list[set[Site]], made: Any, key: str, place: Place, locations: tuple[Any, Any], pairs: list[Pair]
) -> None:
    """What a representation exchanges, row by row; locations: of the source and of the base."""
    representation, unit = made.representations[key], made.representations[key].unit
    if (locations[0] is None) != (locations[1] is None):
        raise UnsupportedError("locations of the source alone or of the base alone", PYVENE)
    if place.stack == "vision" and any(pair.same_image for pair in pairs):
        raise UnsupportedError("a state of the image encoder where both runs have one picture", PYVENE)
    length = {"text_encoder": len(pairs[0].base.ids), "text_decoder": 1, "vision": _patches(made)}
    everywhere = [list(range(length[place.stack]))] * len(pairs)
    dim = made.interventions[key].interchange_dim
    width = place.width if dim is None else int(dim)
    tokens = everywhere
    heads: Sequence[list[int] | None] = [_leading_heads(place, width)] * len(pairs)
    if locations[1] is not None:
        _check_unit(made, place, representation, width)
        if unit == "pos":
            tokens = _rows(*locations, len(pairs))
            if made.use_fast and any(own != tokens[0] for own in tokens):
                raise UnsupportedError("use_fast, by which all rows get row 0's position,", PYVENE)
        elif unit == "h":
            heads = _rows(*locations, len(pairs))
        else:
            heads, tokens = (_rows(*level, len(pairs)) for level in zip(*locations, strict=True))
    for own, at, of in zip(sites, tokens, heads, strict=True):
        if not set(at) <= set(everywhere[0]) or not set(of or ()) <= set(range(place.heads)):
            raise UnsupportedError("a position that is not there", PYVENE)
        own |= place.sites(at, of)


def _patches(made: Any) -> int:
    vision = made.model.config.vision_config
    count: int = (vision.image_size // vision.patch_size) ** 2 + 1
    return count


def _leading_heads(place: Place, width: int) -> list[int] | None:
    """Which heads the first `width` channels are; None: all of the state."""
    if width >= place.width:
        return None
    channels = place.width // place.heads if place.heads else 0
    if not channels or width % channels:
        raise UnsupportedError("exchanging the first channels of a state alone", PYVENE)
    return list(range(width // channels))


def _check_unit(made: Any, place: Place, representation: Any, width: int) -> None:
    kind = type(made.model)
    splits = type_to_module_mapping.get(kind, {}).get(representation.component, ())[2:]
    if representation.unit == "pos" and not splits:
        return
    if representation.unit in ("h", "h.pos") and len(splits) == 1 and place.heads:
        ((split, parts),) = splits
        heads = (
            get_dimension_by_component(kind, made.model.config, parts) if isinstance(parts, str) else parts
        )
        if split is split_head_and_permute and heads == place.heads and width * heads >= place.width:
            return
    raise UnsupportedError(f"the unit {representation.unit!r} of this component", PYVENE)


def _at(locations: Any, number: int) -> Any:
    return None if locations is None else locations[number]


def _rows(theirs: Any, ours: Any, batch: int) -> Rows:
    """Positions that are the same in source and base."""
    there, here = _table(theirs, batch), _table(ours, batch)
    if there != here:
        raise UnsupportedError("a state that goes to another position", PYVENE)
    return here


def _table(locations: Any, batch: int) -> Rows:
    try:
        table = torch.tensor(locations)
    except (TypeError, ValueError, RuntimeError):  # no table
        table = torch.empty(0)
    if table.dim() != 2 or len(table) != batch or not table.numel() or table.is_floating_point():
        raise UnsupportedError("locations that are not whole numbers [rows, units]", PYVENE)
    rows: Rows = table.tolist()
    return rows
