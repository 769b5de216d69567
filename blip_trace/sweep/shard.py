"""Traces the samples of one shard: in passes of equal shape, each failure a row of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

from ..passes import budget
from ..prepare import Asked, Prepared
from ..request import Request
from ..tracer import Image, Tracer
from .answers import is_correct
from .media import Media
from .pictures import Picture, Pictures, in_order
from .rows import failed_row, left_out_row, traced_row
from .sample import Sample
from .schema import Layout
from .settings import OpenImage, Settings

WINDOW_BYTES = 2**27
"""Of pictures that are in memory together: so many samples are sorted by shape, so that passes are filled and
their plans used again."""
LEAST_MEMORY = 2**20
OUT_OF_MEMORY = ("not enough memory", "out of memory", "can't allocate memory")
"""What torch says of it in a RuntimeError."""

Item = TypeVar("Item")
Done = TypeVar("Done")


@dataclass(frozen=True)
class Failure:
    """Why something could not be done, in one sentence."""

    reason: str


class Stopped(Exception):
    """The run is to end now; what is not committed is lost and will be done again."""


@dataclass
class Case:
    """A sample on its way: its question as tensors (the picture still missing), what the model will probably
    answer, its picture, its row."""

    sample: Sample
    asked: Asked | None = None
    guess: str | None = None
    guess_tokens: int = 0
    picture: Picture | None = None
    problem: str | None = None
    said: str | None = None
    correct: bool | None = None
    row: dict[str, Any] | None = None

    @property
    def shape(self) -> tuple[int, int, bool, int]:
        """Cases of the same shape can share a plan."""
        assert self.asked is not None
        asked = self.asked
        return len(asked.text_ids), len(asked.answer_ids), asked.foil_ids is None, self.guess_tokens


@dataclass
class ShardTracer:
    """Traces shards of one run, one after another.

    told: called with the ids of samples before they are computed and with how many are done after them.
    stop: whether to end. `notes` collects what went other than planned.
    """

    tracer: Tracer
    settings: Settings
    layout: Layout
    media: Media
    pool: ThreadPoolExecutor
    told: Callable[[Sequence[str], int], None]
    stop: Callable[[], bool]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._request = request_of(self.tracer, self.settings)
        self._limit: int | None = None
        size = self.tracer.model.config.vision_config.image_size
        self._blank = torch.zeros(1, 3, size, size)

    def rows(
        self, samples: Sequence[Sample], alone: Collection[str] = (), lost: Collection[str] = ()
    ) -> list[dict[str, Any]]:
        """A row for each sample, in their order.

        alone: ids of samples to compute one by one. lost: those whose computation ended the process before:
        they are not tried again. Raises Stopped.
        """
        if self._limit is not None:
            self.notes.append(f"at most {self._limit} questions at once, for memory ran out before")
        cases = [Case(sample) for sample in samples]
        window = max(1, WINDOW_BYTES // (4 * self._blank.numel()))
        for first in range(0, len(cases), window):
            self._window(cases[first : first + window], alone, lost)
        return [case.row for case in cases if case.row is not None]

    def _window(self, cases: Sequence[Case], alone: Collection[str], lost: Collection[str]) -> None:
        for case in cases:
            if case.sample.id in lost:
                case.problem = "the process ended while this sample was computed"
            else:
                self._ask(case)
        batches = list(self._batches([case for case in cases if case.problem is None], alone))
        order = in_order(case.sample.image for batch in batches for case in batch)
        pictures = Pictures(self.media, self.tracer.inputs, self.pool, order, self.settings.batch)
        for batch in batches:
            if self.stop():
                raise Stopped
            self.told([case.sample.id for case in batch], 0)
            self._do(batch, pictures)
            self.told([], len(batch))
        for case in cases:
            if case.row is None:
                case.row = failed_row(case)
        self.told([], sum(case.asked is None for case in cases))

    def _ask(self, case: Case) -> None:
        """Everything about a question that can be known without its picture."""
        asked = self._each([case.sample], self._asked)[0]
        if isinstance(asked, Failure):
            case.problem = asked.reason
        else:
            case.asked = asked
            case.guess = next(iter(case.sample.answers), None)
            case.guess_tokens = 0 if case.guess is None else len(self.tracer.inputs.known_ids(case.guess))

    def _asked(self, samples: Sequence[Sample]) -> list[Asked]:
        return [ask_sample(self.tracer, self.settings, sample, self._blank) for sample in samples]

    def _batches(self, cases: Sequence[Case], alone: Collection[str]) -> Iterator[list[Case]]:
        """Cases of equal shape, as many as go into a pass. What is in a batch depends on the questions alone,
        so that a picture that fails changes nobody else's numbers."""
        by_shape: defaultdict[tuple[int, int, bool, int], list[Case]] = defaultdict(list)
        for case in cases:
            if case.sample.id in alone:
                yield [case]
            else:
                by_shape[case.shape].append(case)
        for own in by_shape.values():
            for first in range(0, len(own), self.settings.batch):
                yield own[first : first + self.settings.batch]

    def _do(self, batch: Sequence[Case], pictures: Pictures) -> None:
        for case in batch:
            assert case.asked is not None
            try:
                case.picture = pictures.take(case.sample.image)
                case.asked = replace(case.asked, pixels=case.picture.pixels)
            except Exception as error:  # not `_each`: smaller passes make no picture smaller
                case.problem = "out of memory" if is_out_of_memory(error) else sentence(error)
        traced = self._answered([case for case in batch if case.problem is None])
        prepared = self._each(traced, partial(self._prepared, open_image=pictures.open))
        ready = self._succeeded(traced, prepared)
        if not ready:
            return
        # The places of those that failed are filled, for the shape of a pass decides how sums are rounded.
        failed = sum(case.problem is not None for case in batch)
        filled = [own for _, own in ready] + [ready[0][1]] * failed
        results = self._each(filled, partial(self.tracer.measure, self._request))
        for case, result in self._succeeded([case for case, _ in ready], results[: len(ready)]):
            case.row = traced_row(self.layout, self.settings, self.tracer, case, result)

    def _prepared(self, cases: Sequence[Case], open_image: OpenImage) -> list[Prepared]:
        asked = [case.asked for case in cases if case.asked is not None]
        corruptions = [self.settings.corruption_of(case.sample, open_image) for case in cases]
        return self.tracer.prepare_all(self._request, asked, corruptions)

    def _answered(self, cases: Sequence[Case]) -> list[Case]:
        """Ask the model itself; returns the cases that are to be traced."""
        kept = []
        for case, said in self._succeeded(cases, self._each(cases, self._said)):
            case.said = said
            if case.sample.answers:
                case.correct = is_correct(said, case.sample.answers)
            if self.settings.only_correct and not case.correct:
                case.row = left_out_row(case)
            else:
                kept.append(case)
        return kept

    def _said(self, cases: Sequence[Case]) -> list[str]:
        asked = [case.asked for case in cases if case.asked is not None]
        return self.tracer.answers(asked, guesses=[case.guess for case in cases])

    def _succeeded(self, cases: Sequence[Case], done: Sequence[Done | Failure]) -> list[tuple[Case, Done]]:
        """What was done, with its case; the other cases get their problem."""
        good = []
        for case, own in zip(cases, done, strict=True):
            if isinstance(own, Failure):
                case.problem = own.reason
            else:
                good.append((case, own))
        return good

    def _each(
        self, items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Done]]
    ) -> list[Done | Failure]:
        """What `work` makes of items, all at once if that can be done.

        Where memory does not suffice, half of them at once from then on, and at last in smaller passes; where
        something is wrong, one by one, so that it is known with which.
        """
        limit = self._limit or len(items)
        if len(items) > limit:
            return [
                own
                for first in range(0, len(items), limit)
                for own in self._each(items[first : first + limit], work)
            ]
        try:
            return list(work(items)) if items else []
        except Exception as error:  # whatever is wrong with one sample must not end the run
            if is_out_of_memory(error):
                return self._each(items, work) if self._spare(len(items)) else [Failure("out of memory")]
            if len(items) == 1:
                return [Failure(sentence(error))]
        return [own for item in items for own in self._each([item], work)]

    def _spare(self, items: int) -> bool:
        """Take less memory from now on; whether that is possible."""
        memory = budget(self.tracer.device, self.tracer.memory, patches=False)
        if items > 1:
            self._limit = items // 2
            self.notes.append(f"out of memory: at most {self._limit} questions at once from here on")
        elif memory > LEAST_MEMORY:
            self.tracer.memory = max(LEAST_MEMORY, memory // 2)
            self.notes.append(f"out of memory: passes of {self.tracer.memory // 2**20} MiB from here on")
        else:
            return False
        return True


def request_of(tracer: Tracer, settings: Settings) -> Request:
    """What is traced of each sample. Raises ValueError for settings that do not fit the model."""
    foil = "logit_difference" in settings.metrics or None
    return tracer.request(settings.stacks, settings.kinds, settings.window, foil, **settings.options())


def ask_sample(tracer: Tracer, settings: Settings, sample: Sample, image: Image) -> Asked:
    """A sample's question, with an image in the place of its own. Raises ValueError, in one sentence, where
    it cannot be traced."""
    if sample.problem is not None:
        raise ValueError(sample.problem)
    answer = foil = None
    if settings.answer == "expected":
        if not sample.answers:
            raise ValueError("this sample has no answer to expect")
        answer = sample.answers[0]
    if "logit_difference" in settings.metrics:
        if sample.foil is None:
            raise ValueError("this sample has no foil answer, which a logit difference takes")
        foil = sample.foil
    asked = tracer.ask(image, sample.question, answer, foil)
    if sample.subject is not None:
        tracer.inputs.find(sample.subject, asked.text_ids)  # raises where it is not there
    return asked


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory did not suffice."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in OUT_OF_MEMORY)


def sentence(error: BaseException) -> str:
    """What an error says, on one line; what is no mistake in the data is named by its class too."""
    said = " ".join(str(error).encode("utf-8", "replace").decode().split())  # file names may be no UTF-8
    expected = isinstance(error, ValueError | TypeError | OSError) and said
    return said if expected else f"{type(error).__name__}: {said}"
