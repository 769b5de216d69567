"""One of NOTICE's questions: a clean and a corrupt input, two answers, and the states patched between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ...corrupting import Corruption
from ...corruption import ImageSwap, Together, TokenSwap
from ...sites import Cell
from ...tracer import Tracer
from ..layers import STACKS, layer_name, site
from ..models import NOWHERE, UnsupportedError, check_answers, tracer_of

MODULES = {
    "attention_block": "attention.self",
    "crossattention_block": "crossattention.self",
    "crossattention_layernorm": "crossattention.output.LayerNorm",
}
"""Kinds that have names of their own; others are a layer's modules, "output" among them, which is the same as
the layer itself (None)."""
MODES = ("image", "text", "both")
VANISHING = 0.01
"""In logits: a difference between LD_clean and LD_corrupt below this is none, and not divided by."""


def layername(model: Any, num: int, block_name: str, kind: str | None = None) -> str:
    """The module whose output a kind of state is. Raises ValueError for an unknown block and UnsupportedError
    for the image encoder."""
    if block_name == "vision_model":
        raise UnsupportedError(
            "the block 'vision_model'",
            "NOTICE names modules there that do not exist; Tracer.trace(..., stacks=('vision',)) maps it",
        )
    if block_name not in STACKS:
        raise ValueError(f"unknown block_name {block_name!r}: choose {' or '.join(STACKS)}")
    return layer_name(block_name, num, MODULES.get(kind or "", kind or ""))


@dataclass(frozen=True)
class Patched:
    """The four metrics of cells, float32 [cells, 4], and of the corrupt run [4]; and whether LD_clean and
    LD_corrupt are as good as the same."""

    scores: Tensor
    low: Tensor
    vanishes: bool


@dataclass(frozen=True)
class Asked:
    """A pair of inputs, checked; `tokens`: how many the question has."""

    tracer: Tracer
    image: Any
    question: str
    tokens: int
    corruption: Corruption
    correct: int
    incorrect: int

    def patch(self, cells: Sequence[Cell]) -> Patched:
        """All of these cells in one pass."""
        # equal first pieces have no logits to compare: their differences are 0, as the tool has them
        parted = self.correct != self.incorrect
        restored = self.tracer.restore(
            self.image,
            self.question,
            cells or [NOWHERE],
            self.correct,
            self.corruption,
            metrics=("probability", "logit_difference") if parted else ("probability",),
            foil=self.incorrect if parted else None,
        )
        rows = torch.cat((restored.low_scores, restored.scores[0]))  # the corrupt run, then the cells
        total, gained = 0.0, torch.zeros_like(rows)
        if parted:
            compared = restored.by("logit_difference")
            total = compared.high_score - float(compared.low_scores)
            gained = torch.cat((compared.low_scores, compared.scores[0])) - compared.low_scores
        vanishes = abs(total) < VANISHING
        effect = torch.full_like(rows, torch.nan) if vanishes else gained / total
        scores = torch.stack((rows, rows - rows[0], gained, effect), dim=1)
        return Patched(scores[1:], scores[0], vanishes)

    def maps(
        self,
        layers: Sequence[int],
        block_name: str,
        kind: str | None,
        heads: Sequence[int | None],
        num: int | None = None,
    ) -> tuple[Tensor, Patched]:
        """The maps of these heads [heads, tokens, layers, 4], in one pass. Raises ValueError where there is
        no token or no layer."""
        names = [layername(self.tracer.model, layer, block_name, kind) for layer in layers]
        if num is None:
            num = self.tokens if block_name == "text_encoder" else 1
        if num < 1 or not names:
            raise ValueError(f"a map of {num} tokens and {len(names)} layers has no states")
        found = self.patch(
            [Cell.of([site(name, token, head)]) for head, token, name in product(heads, range(num), names)]
        )
        return found.scores.view(len(heads), num, len(layers), -1), found

    def flows(
        self, layers: Sequence[int], block_name: str, kind: str | None, heads: Sequence[int | None]
    ) -> tuple[list[dict[str, Any]], bool]:
        """The results of these heads, and whether their patching effect is NaN."""
        scores, found = self.maps(layers, block_name, kind, heads)
        flows = [
            {
                "scores": own,
                "low_score": found.low,
                "question": self.question,
                "correct_token": self.correct,
                "incorrect_token": self.incorrect,
                "block_name": block_name,
                "kind": kind,
                "attn_head": head,
            }
            for own, head in zip(scores, heads, strict=True)
        ]
        return flows, found.vanishes


def ask(
    model: Any,
    processor: Any,
    constant_input: Any,
    clean_input: Any,
    corrupt_input: Any,
    answer_tokens: Sequence[int],
    mode: str,
) -> Asked:
    """A pair of inputs, checked as far as that takes no image."""
    check_answers(model)
    if len(answer_tokens) != 2:
        raise ValueError(f"answer_tokens are a correct and an incorrect one, not {len(answer_tokens)}")
    clean, corrupt = (
        _image_and_question(constant_input, varying, mode) for varying in (clean_input, corrupt_input)
    )
    tracer = tracer_of(model, processor)
    lengths = [len(tracer.inputs.question_ids(question)) for _, question in (clean, corrupt)]
    if lengths[0] != lengths[1]:
        raise UnsupportedError(
            f"a prompt of {lengths[0]} tokens against one of {lengths[1]}",
            "NOTICE pads the shorter one and attends to the padding; replace words by ones of as many pieces",
        )
    swaps: list[Corruption] = []
    if mode != "text":
        swaps.append(ImageSwap(corrupt[0]))
    if mode != "image":
        swaps.append(TokenSwap(corrupt[1]))
    correct, incorrect = (int(token) for token in answer_tokens)
    corruption = swaps[0] if len(swaps) == 1 else Together(*swaps)
    return Asked(tracer, *clean, lengths[0], corruption, correct, incorrect)


def _image_and_question(constant: Any, varying: Any, mode: str) -> tuple[Any, str]:
    if mode == "image":
        return varying, constant
    if mode == "text":
        return constant, varying
    if mode == "both":
        if constant is not None or not isinstance(varying, tuple | list) or len(varying) != 2:
            raise ValueError("mode 'both' takes None as constant_input, and pairs (image, question)")
        image, question = varying
        return image, question
    if mode == "knockout":
        raise UnsupportedError(
            "the mode 'knockout'",
            "NOTICE names it and has none; Cell.knockout with Tracer.restore cuts edges of attention",
        )
    raise ValueError(f"unknown mode {mode!r}: choose {', '.join(MODES)}")
