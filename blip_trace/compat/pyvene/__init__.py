"""pyvene's interchange interventions on BLIP, with its names, arguments and results, on this engine.

    from blip_trace.compat import pyvene as pv  # instead of: import pyvene as pv

`IntervenableModel` is a drop-in for pyvene's: a call that is covered goes through the engine, any other
through pyvene itself, and the log of this module says why. `interchange` does a whole grid of calls in one
pass. All other names of this module are pyvene's own.

Unlike pyvene's, a call leaves the model as it was: forward hooks that are not pyvene's do not fire during a
call, as with pyvene, but stay; and unless something is trained, training mode and `requires_grad` are put
back.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import pyvene
import torch
from pyvene import IntervenableConfig, TrainableIntervention
from torch import Tensor, nn

from ...sites import Cell
from ...tracer import Tracer
from ..models import UnsupportedError, tracer_of
from ..wrapped import Pair, patched_logits, places
from .cells import Call, Known, Plan, plan
from .model import PYVENE, Flags, foreign_hooks_aside, whole_model
from .outputs import Read, WrapperOutput, raw_output, returned

LOGGER = logging.getLogger(__name__)

Config: TypeAlias = IntervenableConfig | list[Any] | dict[str, Any]


def __getattr__(name: str) -> Any:
    return getattr(pyvene, name)


class IntervenableModel(pyvene.IntervenableModel):  # type: ignore[misc]
    """pyvene's `IntervenableModel`, whose covered calls take one pass of the engine.

    Covered are vanilla interventions from one source into the same positions of a float32
    `BlipForQuestionAnswering` or of pyvene's `BlipWrapper` around one, in parallel mode: the
    components of text layers and of the image encoder's layers, by name or as strings, that
    `wrapped.places` knows, and heads that are registered as pyvene asks for. Rows of a batch are done one by
    one; those that are equal share a pass.
    """

    use_fast: bool
    _made = False

    def __init__(self, config: Config, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(config, model, **kwargs)
        self._own_handles: list[Any] = []
        self._made = True

    def disable_model_gradients(self) -> None:
        """As pyvene's: the model is frozen for good. pyvene does it to every model that it is given; here it
        is done, without being asked, only where something is trained."""
        if self._made or self._trains:
            super().disable_model_gradients()
        self.model_has_grad = False

    @property
    def _trains(self) -> bool:
        trained = (isinstance(own, TrainableIntervention) for own in self.interventions.values())
        return any(trained) or any(True for _ in self.interventions.parameters())

    def forward(
        self,
        base: Any,
        sources: Any = None,
        unit_locations: Any = None,
        source_representations: Any = None,
        subspaces: Any = None,
        labels: Tensor | None = None,
        output_original_output: bool | None = False,
        return_dict: bool | None = None,
        use_cache: bool | None = None,
        intervention_additional_kwargs: Any = None,
    ) -> Any:
        """As pyvene's. Of what `BlipWrapper` returns, entries beside the logits are computed, by pyvene, when
        they are first read. Raises what pyvene raises."""
        call = Call.of(
            base,
            sources,
            unit_locations,
            source_representations,
            subspaces,
            labels,
            output_original_output,
            return_dict,
            use_cache,
            intervention_additional_kwargs,
        )
        return _answer(self.model, [(self, call)])[0]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As pyvene's, by pyvene itself."""
        say(str(UnsupportedError("generate", PYVENE)))
        with self.lent():
            return super().generate(*args, **kwargs)

    def by_pyvene(self, call: Call, use_fast: bool) -> Any:
        """A call as pyvene itself does it, with `use_fast` as it was by then."""
        sources = None if call.sources is None else list(call.source_list)
        now, self.use_fast = self.use_fast, use_fast
        try:
            with self.lent():
                return super().forward(**vars(replace(call, sources=sources)))  # pyvene lengthens the list
        finally:
            self.use_fast |= now

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The model as pyvene wants it: without others' hooks and, unless something is trained, in evaluation
        mode and without gradients of weights. All is put back at the end."""
        flags = Flags(self.model)
        with foreign_hooks_aside(self.model):
            try:
                if not (self._trains or self.model_has_grad):
                    self.model.eval().requires_grad_(False)
                yield
            finally:
                self._remove_forward_hooks()
                flags.put_back()

    def get_device(self) -> torch.device:
        """Where the model is; pyvene's own `BlipWrapper` does not say it."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def _intervention_getter(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(super()._intervention_getter(*args, **kwargs))

    def _intervention_setter(self, *args: Any, **kwargs: Any) -> Any:
        return self._noted(super()._intervention_setter(*args, **kwargs))

    def _noted(self, handles: Any) -> Any:
        self._own_handles += handles.handlers
        return handles

    def _remove_forward_hooks(self) -> None:
        """Those that this object put there; pyvene's own method removes all that the model has."""
        while self._own_handles:
            self._own_handles.pop().remove()


def build_intervenable_model(config: Config, model: nn.Module, **kwargs: Any) -> IntervenableModel:
    """pyvene's factory, for the model above."""
    return IntervenableModel(config, model, **kwargs)


def interchange(
    model: nn.Module,
    configs: Sequence[Config],
    base: Any,
    sources: Any,
    unit_locations: Sequence[Mapping[str, Any] | None],
    labels: Tensor | None = None,
    output_original_output: bool = False,
    return_dict: bool | None = None,
) -> list[list[Any]]:
    """A grid of interchange interventions in one pass: for each config and, within it, for each of the
    locations what `IntervenableModel(config, model)(base, sources, locations, ...)` returns.

    model: pyvene's `BlipWrapper` or a `BlipForQuestionAnswering`. configs: each an `IntervenableConfig`, or
    what stands for one. All else as in a call. What is not covered is done by pyvene itself, call by call.
    Raises what pyvene raises.
    """
    first = Call.of(base, sources, None, None, None, labels, output_original_output, return_dict)
    calls = [replace(first, unit_locations=locations) for locations in deepcopy(list(unit_locations))]
    made = [IntervenableModel(config, model) for config in configs]
    found = iter(_answer(model, [(own, call) for own in made for call in calls]))
    return [[next(found) for _ in calls] for _ in made]


@lru_cache(maxsize=1000)
def say(reason: str) -> None:
    """Log why pyvene itself is run, once."""
    LOGGER.warning("%s", reason)


def reason(error: UnsupportedError | ValueError) -> str:
    """What to log of a call, or of inputs or a model that the engine refuses."""
    return str(error) if isinstance(error, UnsupportedError) else f"{error}: {PYVENE}"


class Answer(NamedTuple):
    """Logits [B, 1, V] of a planned call: counterfactual ones and the base's."""

    plan: Plan
    patched: Tensor
    low: Tensor


Asked = Sequence[tuple[IntervenableModel, Call]]


def _answer(model: nn.Module, asked: Asked) -> list[Any]:
    """What these calls return, the covered ones by one pass for each pair of inputs."""
    flags = Flags(model)
    fast: list[bool] = []
    try:
        whole = _whole(model)
        found = _computed(tracer_of(whole), _plans(Known(whole, places(whole)), asked, fast))
    except (UnsupportedError, ValueError) as error:
        found = [reason(error)] * len(asked)
    finally:
        flags.put_back()
    fast += [made.use_fast for made, _ in asked[len(fast) :]]
    covered = [call for (_, call), got in zip(asked, found, strict=True) if not isinstance(got, str)]
    read = Read(model, covered)
    embeds: dict[int, Tensor] = {}
    results = []
    for (made, call), got, its_fast in zip(asked, found, fast, strict=True):
        if isinstance(got, str):
            say(got)
            results.append(made.by_pyvene(call, its_fast))
        elif made.model is whole:
            results.append(_raw_result(made, call, got, embeds))
        else:
            results.append(_wrapper_result(made, call, got, its_fast, read))
    return results


def _whole(model: nn.Module) -> Any:
    whole = whole_model(model)
    if whole.dtype != torch.float32:
        raise UnsupportedError(f"a model in {whole.dtype}", PYVENE)
    return whole


def _plans(known: Known, asked: Asked, fast: list[bool]) -> list[Plan | str]:
    """For each call a plan, or why there is none; notes whether pyvene's `use_fast` is on by then."""
    plans: list[Plan | str] = []
    for made, call in asked:
        try:
            plans.append(plan(made, known, call))
        except (UnsupportedError, ValueError) as error:
            plans.append(reason(error))
        fast.append(made.use_fast)
    return plans


def _computed(tracer: Tracer, plans: Sequence[Plan | str]) -> list[Answer | str]:
    """For each plan its answer, or why there is none."""
    cells: dict[Pair, list[Cell]] = defaultdict(list)
    for planned in plans:
        if isinstance(planned, Plan):
            for pair, cell in zip(planned.pairs, planned.cells, strict=True):
                cells[pair].append(cell)
    patched: dict[Pair, Iterator[Tensor]] = {}  # in the order of the plans
    low: dict[Pair, Tensor] = {}
    refused: dict[Pair, str] = {}
    for pair, own in cells.items():
        try:
            logits, lows = patched_logits(tracer, pair.donor, pair.corruption, own)
            patched[pair], low[pair] = iter(logits[0]), lows[0]
        except ValueError as error:
            refused[pair] = reason(error)
    answers: list[Answer | str] = []
    for planned in plans:
        if isinstance(planned, str):
            answers.append(planned)
            continue
        pairs = planned.pairs
        reasons = [refused[pair] for pair in pairs if pair in refused]
        rows = [next(patched[pair]) for pair in pairs if pair in patched]
        if reasons:
            answers.append(reasons[0])
        else:
            answers.append(Answer(planned, torch.stack(rows), torch.stack([low[pair] for pair in pairs])))
    return answers


def _wrapper_result(made: IntervenableModel, call: Call, got: Answer, fast: bool, read: Read) -> Any:
    def counterfactual() -> Any:
        say(str(UnsupportedError("reading more of an output than decoder_logits", PYVENE)))
        alone = replace(call, output_original_output=False, return_dict=True)
        return made.by_pyvene(alone, fast).intervened_outputs

    def original() -> Any:
        with made.lent():
            return made.model(**call.base)

    base = WrapperOutput(got.low, original, read) if call.output_original_output else None
    return returned(call, got.plan, got.patched, base, WrapperOutput(got.patched, counterfactual, read))


def _raw_result(made: IntervenableModel, call: Call, got: Answer, embeds: dict[int, Tensor]) -> Any:
    if id(call.base) not in embeds:
        with made.lent(), torch.no_grad():
            pixels = call.base["pixel_values"]
            embeds[id(call.base)] = made.model.vision_model(pixel_values=pixels).last_hidden_state
    image, labels = embeds[id(call.base)], got.plan.labels
    base = raw_output(made.model, got.low, labels, image) if call.output_original_output else None
    return returned(call, got.plan, got.patched, base, raw_output(made.model, got.patched, labels, image))
