"""Runs of a batch with states of another one in them, all patches of it in one pass of the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import hooks
from ...corrupting import Corrupted, Original
from ...result import Logits
from ...sites import Cell, Site
from ...tracer import Tracer
from ..models import UnsupportedError
from .hooks import Patch, Words
from .rows import Row, stacked

BY_HAND = "transformer_lens.patching computes it on the same model objects, a forward pass for each index"


@dataclass(frozen=True)
class Inputs:
    """A corruption to inputs that are there already: images [S, N, D] and words [S, T, C], or None."""

    images: Tensor | None = field(repr=False)
    words: Tensor | None = field(repr=False)

    def corrupt(self, original: Original) -> Corrupted:
        """Where both are clean, words say so: a corruption must return something."""
        if self.images is None and self.words is None:
            return Corrupted(words=original.words[None])
        return Corrupted(self.images, self.words)


class Spoken(NamedTuple):
    """What the engine is asked: the text [1, T], and the answer behind it, as `Tracer.logits` takes them."""

    text: Tensor
    answer: str | int | None


class Found(NamedTuple):
    """Logits [B, A, V] with each patch, and of the batch as it is."""

    patched: dict[Patch, Tensor]
    low: Tensor


class Passes:
    """Patches of `donors`' states into runs of `bases`, row by row: a donor for each base, or one for all.

    Rows of one clean input (usually the donor's) go through the engine as its samples.

    Raises UnsupportedError where clean and corrupted rows differ in length, where both are corrupted by more
    than another picture or question, and where they differ in what a decoder has said.
    """

    def __init__(
        self,
        tracer: Tracer,
        stack: str,
        donors: Sequence[Row],
        bases: Sequence[Row],
        answer: str | int | None,
    ) -> None:
        if len(donors) not in (1, len(bases)):
            raise ValueError(f"the cache holds {len(donors)} rows, the corrupted tokens are {len(bases)}")
        self._tracer, self._stack, self._answer = tracer, stack, answer
        self._table = hooks.word_table(tracer.model)
        donors = [donors[0]] * len(bases) if len(donors) == 1 else donors
        self._direction = "denoise"
        if any(row.corrupted for row in donors):
            self._direction = "noise"
            if any(row.corrupted for row in bases):
                raise UnsupportedError(
                    "patching between two runs that a corruption changed",
                    f"leave one of the model objects without; {BY_HAND}",
                )
        pairs = list(zip(donors, bases, strict=True))
        self._pairs = pairs if self._direction == "denoise" else [(base, donor) for donor, base in pairs]
        self._groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (clean, other) in enumerate(self._pairs):
            self._check(clean, other)
            decoded = () if clean.decoded is None else tuple(clean.decoded.tolist())
            key = (id(clean.pixels), tuple(clean.ids.tolist()), decoded)
            self._groups.setdefault(key, []).append(number)

    @property
    def bytes_each(self) -> int:
        """What the logits of a patch take: float32 [B, A, V]."""
        row, program = self._pairs[0][0], self._tracer.program
        if program.task == "continue":
            positions = len(row.ids)
        elif row.decoded is not None:
            positions = len(row.decoded)
        else:
            positions = len(self._tracer.inputs.answer_ids(self._answer))
        return 4 * len(self._pairs) * positions * len(program.head.decoder.weight)

    def run(self, patches: Sequence[Patch]) -> Found:
        """These patches, each alone."""
        found: dict[Patch, list[Tensor]] = {patch: [] for patch in patches}
        low: list[Tensor] = []
        places = [number for group in self._groups.values() for number in group]
        for group in self._groups.values():
            own = self._run(patches, group)
            low.append(own.low)
            for patch, logits in own.patched.items():
                found[patch].append(logits)
        order = torch.tensor(places, device=self._tracer.device).argsort()
        return Found({patch: torch.cat(own)[order] for patch, own in found.items()}, torch.cat(low)[order])

    def _run(self, patches: Sequence[Patch], group: Sequence[int]) -> Found:
        """Of rows that share their clean input."""
        clean = self._pairs[group[0]][0]
        others = [self._pairs[number][1] for number in group]
        images, words = stacked(others, self._table)
        same_image = not any(row.other_image or not row.pixels.equal(clean.pixels) for row in others)
        clean_words = clean.embedded(self._table)
        same_words = words.equal(clean_words.expand_as(words))
        inputs = Inputs(None if same_image else images, None if same_words else words)
        spoken = self._spoken(clean, inputs)
        cells = {patch: Cell.of(patch) for patch in patches if not isinstance(patch, Words)}
        logits = self._logits(clean, spoken, list(cells.values()), inputs, self._direction)
        low = logits.low if self._direction == "denoise" else logits.high.expand_as(logits.low)
        found = dict.fromkeys(patches, low)
        found.update((patch, logits.cells[:, number]) for number, patch in enumerate(cells))
        embedded = [patch for patch in patches if isinstance(patch, Words)]
        if embedded and self._stack == "text_encoder" and not same_words:
            into = (words, clean_words.expand_as(words))
            base, donor = into if self._direction == "denoise" else into[::-1]
            made = base.repeat(len(embedded), 1, 1, 1)  # [patches, S, T, C]
            for number, patch in enumerate(embedded):
                tokens = sorted(patch.tokens)
                made[number, :, tokens] = donor[:, tokens]
            seen = None
            if self._direction == "denoise" and not same_image:
                seen = images.repeat(len(embedded), 1, 1)
            changed = self._logits(clean, spoken, [], Inputs(seen, made.flatten(0, 1)), "denoise").low
            found.update(zip(embedded, changed.unflatten(0, (len(embedded), -1)), strict=True))
        return Found(found, low)

    def _logits(
        self, clean: Row, spoken: Spoken, cells: Sequence[Cell], inputs: Inputs, direction: str
    ) -> Logits:
        some = cells or [Cell.of([Site(self._stack, 0, "hidden", 0)])]  # the engine wants one
        text, answer = spoken
        found = self._tracer.logits(clean.pixels, text, some, answer, inputs, direction)
        parts = {name: getattr(found, name).to(self._tracer.device) for name in ("cells", "low", "high")}
        return replace(found, **parts)

    def _spoken(self, clean: Row, inputs: Inputs) -> Spoken:
        """An answer in words, of the tokens in a decoder: the engine takes no others."""
        if self._tracer.program.task == "continue":
            if inputs.words is not None:
                raise UnsupportedError("patching between captions of other words", BY_HAND)
            return Spoken(clean.ids[None, :1], self._text(clean.ids[1:]))
        if clean.decoded is None:
            return Spoken(clean.ids[None], self._answer)
        return Spoken(clean.ids[None], self._text(clean.decoded[1:]))

    def _text(self, ids: Tensor) -> str | None:
        """What stands for these tokens and one more, which nothing depends on."""
        if not len(ids):
            return None
        inputs = self._tracer.inputs
        wanted = [*ids.tolist(), inputs.end]
        tokenizer = getattr(self._tracer.processor, "tokenizer", None)
        text = "" if tokenizer is None else tokenizer.decode(wanted)
        if not text or inputs.known_ids(text) != wanted:
            raise UnsupportedError(f"the tokens {ids.tolist()}, which are those of no text,", BY_HAND)
        return text

    def _check(self, clean: Row, other: Row) -> None:
        if len(clean.ids) != len(other.ids):
            raise UnsupportedError(
                f"patching between texts of {len(clean.ids)} and {len(other.ids)} tokens",
                "reword one of them to as many tokens",
            )
        if clean.decoded is not None and other.decoded is not None and not clean.decoded.equal(other.decoded):
            raise UnsupportedError("patching between answers of other words", BY_HAND)
