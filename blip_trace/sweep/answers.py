"""Whether what a model says is one of the right answers."""

from __future__ import annotations

import re
from collections.abc import Iterable

ARTICLES = frozenset(("a", "an", "the"))
NUMBERS = {
    name: str(number)
    for number, name in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
MARKS = re.compile(r"[^\w\s]|_")


def normalized(answer: str) -> str:
    """An answer as the evaluation of VQA compares them (Antol et al. 2015): in lower case, without articles
    and punctuation, small numbers as digits; as it is where that leaves nothing."""
    words = MARKS.sub(" ", answer.casefold()).split()
    kept = " ".join(NUMBERS.get(word, word) for word in words if word not in ARTICLES)
    return kept or answer.strip().casefold()


def is_correct(said: str, answers: Iterable[str]) -> bool:
    """Whether an answer is the same as one of these but for how it is written."""
    return normalized(said) in map(normalized, answers)
