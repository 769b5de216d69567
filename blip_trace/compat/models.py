"""A tracer for a model that another tool holds, and what adapters say when they cannot do something."""

from __future__ import annotations

from typing import Any

from ..sites import Cell, Site
from ..tracer import Tracer

NOWHERE = Cell.of([Site("text_encoder", 0, "hidden", 0)])
"""A pass has at least one cell: this one stands in where only the clean or the corrupted run is wanted."""


class UnsupportedError(NotImplementedError):
    """A call that the adapter cannot do: `part` of it that is not covered, and what to do `instead`."""

    def __init__(self, part: str, instead: str) -> None:
        super().__init__(f"{part} is not supported here: {instead}")
        self.part = part
        self.instead = instead


def check_answers(model: Any) -> None:
    """Raises UnsupportedError for a model that is no BLIP with a question encoder and an answer decoder."""
    if not (hasattr(model, "text_encoder") and hasattr(model, "text_decoder")):
        raise UnsupportedError(
            f"a {type(model).__name__}",
            "it takes a BlipForQuestionAnswering; captioning and matching ones are traced by Tracer.trace",
        )


class _Kept:
    """A model's tracer, kept by the model itself, with which it goes; copies of the model begin without."""

    def __init__(self) -> None:
        self.weights: object = None
        self.tracers: dict[int, Tracer] = {}
        """By processor, which a tracer keeps alive: its id stays its own."""

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def tracer_of(model: Any, processor: Any = None) -> Tracer:
    """The tracer of a Hugging Face BLIP and a processor, made when it is first asked for, and again when
    weights were changed or exchanged since then. The model is put into evaluation mode.

    Raises as `Tracer` does.
    """
    kept: _Kept = model.__dict__.setdefault("_blip_trace", _Kept())
    weights = tuple((weight.data_ptr(), weight._version) for weight in model.parameters())
    if kept.weights != weights:
        kept.weights = weights
        kept.tracers.clear()
    if id(processor) not in kept.tracers:
        kept.tracers[id(processor)] = Tracer(model, processor)
    return kept.tracers[id(processor)]
