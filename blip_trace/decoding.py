"""What a model says by itself: greedy decoding, many questions at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .inputs import Inputs
from .metrics import OWN
from .prepare import Asked
from .task import Scores

Score = Callable[[Sequence[Asked]], list[Scores]]
"""Reads the clean runs of questions, with all their logits."""


def decode(
    inputs: Inputs, score: Score, asked: Sequence[Asked], guesses: Sequence[str | None], max_tokens: int
) -> list[str]:
    """See `Tracer.answers`."""
    said = _confirmed(inputs, score, asked, guesses)
    room = [min(max_tokens, inputs.answer_room(own.text_ids)) for own in asked]
    # Those that have ended go on with the others, unheard: a pass of the same shape needs no new plan.
    while any(len(own) < most and inputs.end not in own for own, most in zip(said, room, strict=True)):
        questions = []
        for own, known in zip(asked, said, strict=True):
            begun = known[: inputs.answer_room(own.text_ids) - 1]
            questions.append(replace(own, answer_ids=torch.tensor([*begun, OWN]), foil_ids=None))
        for known, scores in zip(said, score(questions), strict=True):
            known.append(int(scores.clean["logits"][-1].argmax()))
    ends = [own.index(inputs.end) if inputs.end in own else len(own) for own in said]
    return [
        inputs.answer_text(own[: min(end, most)]) for own, end, most in zip(said, ends, room, strict=True)
    ]


def _confirmed(
    inputs: Inputs, score: Score, asked: Sequence[Asked], guesses: Sequence[str | None]
) -> list[list[int]]:
    """As much of each guess, and of the end behind it, as the model would say itself: up to the first token
    that is not the most probable one behind those before it."""
    said: list[list[int]] = [[] for _ in asked]
    questions, places = [], []
    for place, (own, guess) in enumerate(zip(asked, guesses, strict=True)):
        ids = () if guess is None else inputs.known_ids(guess)
        if ids and len(ids) < inputs.answer_room(own.text_ids):
            questions.append(replace(own, answer_ids=torch.tensor([*ids, inputs.end]), foil_ids=None))
            places.append(place)
    for place, scores in zip(places, score(questions), strict=True):
        best = scores.clean["logits"].argmax(-1)
        right = int((best == scores.answer_ids).long().cumprod(0).sum())
        said[place] = scores.answer_ids[:right].tolist()
    return said
