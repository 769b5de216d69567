"""The one normal form of a question in a data set, whatever it was published as."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Sample:
    """A question about an image.

    id: unique in its data set. image: a reference that `media.Media` resolves, never the picture itself.
    question: of a captioning model what the caption begins with, of a matching one the text. answers: all
    that count as right, the one to expect first. type: of answer or question, as the data set has it, ""
    where it has none. corrupt_image, corrupt_question, foil: the other half of a minimal pair (NOTICE).
    subject: the phrase of the question that names what it is about (ROME's subject). extra: further columns.
    problem: why this row of the data cannot be traced; it keeps its place and becomes a failed result.
    """

    id: str
    image: str
    question: str
    answers: tuple[str, ...] = ()
    type: str = ""
    corrupt_image: str | None = None
    corrupt_question: str | None = None
    foil: str | None = None
    subject: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
