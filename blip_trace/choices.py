"""Corruptions and methods by name, as the command line and saved settings give them, and which further
options belong to which name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .attribution import METHODS, Attribution, Method, Screen
from .corrupting import Corruption
from .corruption import (
    GaussianNoise,
    ImageAblation,
    ImageRegion,
    ImageSwap,
    PatchNoise,
    PixelNoise,
    Together,
    TokenNoise,
    TokenSwap,
)
from .sites import check_names

NUMBERED_SPAN = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Choice:
    """What makes it, the options that belong to it and, of those that are called otherwise there, the
    parameters; `needs` is an option that it cannot do without."""

    make: Callable[..., Any]
    options: Sequence[str]
    parameters: Mapping[str, str] = field(default_factory=dict)
    needs: str | None = None


IMAGE_NOISE = ("mean", "std", "mode", "samples", "seed")
WORD_NOISE = ("span", "std", "absolute", "distribution", "samples", "seed")
CORRUPTIONS = {
    "embeddings": Choice(GaussianNoise, IMAGE_NOISE),
    "pixels": Choice(PixelNoise, IMAGE_NOISE),
    "patches": Choice(PatchNoise, IMAGE_NOISE),
    "words": Choice(TokenNoise, WORD_NOISE, {"absolute": "relative"}),
    "swap-image": Choice(ImageSwap, ("swap",), {"swap": "image"}, "swap"),
    "swap-question": Choice(TokenSwap, ("swap-question",), {"swap-question": "question"}, "swap-question"),
    "ablate": Choice(
        ImageAblation, ("ablation", "reference"), {"ablation": "mode", "reference": "references"}
    ),
    "hide": Choice(ImageRegion, ("box", "blur"), needs="box"),
}
NUMBERED_METHODS = {
    "attribution": Choice(Attribution, ("steps",)),
    "screen": Choice(Screen, ("top", "steps", "check")),
}


def make_corruption(names: Sequence[str], given: Mapping[str, Any]) -> Corruption:
    """The corruption of these names, several of them put together. `given`: options as they were typed, None
    where they were not; an option goes to every corruption that it belongs to.

    Raises ValueError, in one sentence, for an unknown name, for an option that belongs to none of them, for
    one that is missing, and for values that a corruption does not take.
    """
    names = check_names("corruption", names, CORRUPTIONS)
    typed = _checked("corrupt", names, CORRUPTIONS, given)
    values = {option: READ[option](value) if option in READ else value for option, value in typed.items()}
    made: list[Corruption] = [_made(CORRUPTIONS[name], values) for name in names]
    return made[0] if len(made) == 1 else Together(*made)


def make_method(name: str, given: Mapping[str, Any]) -> str | Method:
    """The method of this name, with other numbers where they are given. Raises ValueError as above."""
    check_names("method", [name], METHODS)
    values = _checked("method", [name], NUMBERED_METHODS, given)
    method: str | Method = _made(NUMBERED_METHODS[name], values) if values else name
    return method


def count_samples(corruption: Corruption) -> int:
    """How many samples a corruption that was made here draws."""
    if isinstance(corruption, Together):
        return count_samples(corruption.corruptions[0])
    if isinstance(corruption, ImageAblation) and corruption.mode == "resample":
        return len(corruption.references)
    samples: int = getattr(corruption, "samples", 1)
    return samples


def _checked(
    what: str, names: Sequence[str], choices: Mapping[str, Choice], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The options that were typed; each belongs to one of these choices at least, and none is missing."""
    typed = {option: value for option, value in given.items() if value is not None}
    chosen = {name: choices[name] for name in names if name in choices}
    for option in typed:
        if not any(option in choice.options for choice in chosen.values()):
            owners = [name for name, choice in choices.items() if option in choice.options]
            raise ValueError(f"--{option} belongs to --{what} {_either(owners)}, not to {_either(names)}")
    for name, choice in chosen.items():
        if choice.needs is not None and choice.needs not in typed:
            raise ValueError(f"--{what} {name} needs --{choice.needs}")
    return typed


def _made(choice: Choice, values: Mapping[str, Any]) -> Any:
    own = {option: values[option] for option in choice.options if option in values}
    return choice.make(**{choice.parameters.get(option, option): value for option, value in own.items()})


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _span(text: str) -> str | tuple[int, int]:
    numbers = NUMBERED_SPAN.fullmatch(text)
    return (int(numbers[1]), int(numbers[2])) if numbers else text


def _box(text: str) -> tuple[float, ...]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"--box takes four numbers, LEFT,TOP,RIGHT,BOTTOM, not {text!r}") from None
    return left, top, right, bottom


READ: dict[str, Callable[[Any], Any]] = {
    "span": _span,
    "box": _box,
    "absolute": lambda absolute: not absolute,
    "swap": str,
    "reference": lambda files: tuple(map(str, files)),
}
"""What becomes of typed values before the corruptions take them."""
