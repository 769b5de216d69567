"""A tracer for a model that another tool holds, and what adapters say when they cannot do something."""

from __future__ import annotations

from typing import Any

from ..tracer import Tracer


class UnsupportedError(NotImplementedError):
    """A call that the adapter cannot do: `part` of it that is not covered, and what to do `instead`."""

    def __init__(self, part: str, instead: str) -> None:
        super().__init__(f"{part} is not supported here: {instead}")
        self.part = part
        self.instead = instead


class _Kept:
    """A model's tracer, kept by the model itself, with which it goes; copies of the model begin without."""

    state: object = None
    tracer: Tracer | None = None

    def __reduce__(self) -> tuple[type[_Kept], tuple[()]]:
        return _Kept, ()


def tracer_of(model: Any, processor: Any = None) -> Tracer:
    """The tracer of a Hugging Face BLIP, made when it is first asked for, and again when weights were changed
    or exchanged since then, or another processor is given. The model is put into evaluation mode.

    Raises as `Tracer` does.
    """
    kept: _Kept = model.__dict__.setdefault("_blip_trace", _Kept())
    weights = tuple((weight.data_ptr(), weight._version) for weight in model.parameters())
    state = (weights, None if processor is None else id(processor))
    if kept.tracer is None or kept.state != state:
        kept.tracer, kept.state = Tracer(model, processor), state
    return kept.tracer
