"""What must hold of numbers that a GPU may still be computing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .devices import fetch

Check = Callable[[], None]
"""Waits for what a device was given before, and raises ValueError for the first condition that does not
hold."""


class Checks:
    """Conditions, each with the sentence that says what is wrong where it does not hold.

    On the CPU they are looked at as they are named. On a GPU that would wait for all its work, once for each:
    there they are looked at together, when what `begin` returned is called.
    """

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, str]] = []

    def that(self, holds: Tensor, sentence: str) -> None:
        """Name a condition, bool []. Raises ValueError where it is known not to hold."""
        if holds.device.type != "cpu":
            self._open.append((holds, sentence))
        elif not bool(holds):
            raise ValueError(sentence)

    def begin(self) -> Check:
        """Begin to look at what is open."""
        opened, self._open = self._open, []
        if not opened:
            return lambda: None
        held = fetch(torch.stack([holds for holds, _ in opened]))

        def wait() -> None:
            for holds, (_, sentence) in zip(held().tolist(), opened, strict=True):
                if not holds:
                    raise ValueError(sentence)

        return wait
