"""What is in a data set: counts, and what is missing or wrong, before anything is traced."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any

from .sources import DataSet

SHOWN = 5
"""Of names of missing images and of problems."""
COMMONEST = 10
SHOWN_TEXT = 80
"""Characters of an answer or a type."""


@dataclass(frozen=True)
class Description:
    """A data set in numbers.

    All but samples, problems and repeated ids are counted over the samples without a problem. images:
    distinct references, those of corrupted images among them; of the missing ones there is no file. answers:
    distinct ones that are to be expected. common_types, common_answers: the commonest, with their numbers.
    """

    format: str
    path: str
    samples: int
    problems: int
    first_problems: list[str]
    repeated_ids: int
    images: int
    missing_images: int
    first_missing: list[str]
    questions_per_image: float
    most_questions_per_image: int
    question_words: float
    most_question_words: int
    types: int
    common_types: dict[str, int]
    answers: int
    common_answers: dict[str, int]
    without_answer: int
    with_corrupt_image: int
    with_corrupt_question: int
    with_foil: int
    with_subject: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def describe(dataset: DataSet, limit: int | None = None) -> Description:
    """Read a data set, or its first `limit` samples, and count. Images are looked for, not opened; what is
    held in memory grows with the numbers of distinct images, ids and answers, by some bytes each."""
    types, answers = _Tally(), _Tally()
    ids: set[bytes] = set()
    seen: set[bytes] = set()
    asked: Counter[bytes] = Counter()
    first_problems: list[str] = []
    first_missing: list[str] = []
    counts: Counter[str] = Counter()
    longest = 0
    for sample in islice(dataset.samples(), limit):
        counts["samples"] += 1
        ids.add(_key(sample.id))
        if sample.problem is not None:
            counts["problems"] += 1
            if len(first_problems) < SHOWN:
                first_problems.append(sample.problem)
            continue
        asked[_key(sample.image)] += 1
        for image in filter(None, (sample.image, sample.corrupt_image)):
            if (key := _key(image)) not in seen:
                seen.add(key)
                if not dataset.media.exists(image):
                    counts["missing"] += 1
                    if len(first_missing) < SHOWN:
                        first_missing.append(image)
        if sample.type:
            types.add(sample.type)
        if sample.answers:
            answers.add(sample.answers[0])
        words = len(sample.question.split())
        longest = max(longest, words)
        counts.update(
            words=words,
            without_answer=not sample.answers,
            corrupt_image=sample.corrupt_image is not None,
            corrupt_question=sample.corrupt_question is not None,
            foil=sample.foil is not None,
            subject=sample.subject is not None,
        )
    sound = counts["samples"] - counts["problems"]
    return Description(
        format=dataset.name,
        path=dataset.path,
        samples=counts["samples"],
        problems=counts["problems"],
        first_problems=first_problems,
        repeated_ids=counts["samples"] - len(ids),
        images=len(seen),
        missing_images=counts["missing"],
        first_missing=first_missing,
        questions_per_image=sound / max(1, len(asked)),
        most_questions_per_image=max(asked.values(), default=0),
        question_words=counts["words"] / max(1, sound),
        most_question_words=longest,
        types=len(types),
        common_types=types.commonest(),
        answers=len(answers),
        common_answers=answers.commonest(),
        without_answer=counts["without_answer"],
        with_corrupt_image=counts["corrupt_image"],
        with_corrupt_question=counts["corrupt_question"],
        with_foil=counts["foil"],
        with_subject=counts["subject"],
    )


class _Tally:
    """How often each text occurred, by its hash; of long texts only the beginning is held."""

    def __init__(self) -> None:
        self._counts: Counter[bytes] = Counter()
        self._texts: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def add(self, text: str) -> None:
        key = _key(text)
        self._counts[key] += 1
        if key not in self._texts:
            self._texts[key] = text if len(text) <= SHOWN_TEXT else f"{text[:SHOWN_TEXT]}…"

    def commonest(self) -> dict[str, int]:
        return {self._texts[key]: count for key, count in self._counts.most_common(COMMONEST)}


def _key(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=12).digest()
