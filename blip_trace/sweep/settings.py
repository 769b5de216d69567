"""What is traced of every sample of a run: plain values, so that they can be frozen, compared and sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import PIL.Image

from ..attribution import METHODS
from ..choices import CORRUPTIONS, count_samples, make_corruption, make_method
from ..corrupting import Corruption
from ..corruption import ImageSwap, Together, TokenSwap
from ..sites import check_count, check_names
from .sample import Sample

PAIR = "pair"
"""The corruption that puts the other half of each sample's minimal pair in its place."""
SUBJECT = "@subject"
"""As the span of noise on words: each sample's own subject."""
ANSWERS = ("own", "expected")
STORES = ("float32", "float16")

OpenImage = Callable[[str], PIL.Image.Image]
"""Opens what a sample refers to."""


@dataclass(frozen=True)
class Settings:
    """What is traced of every sample.

    corrupt, corruption: names and options as on the command line (see `blip_trace.choices`), or ("pair",):
    each sample's corrupt_image, corrupt_question or both. Noise is drawn anew for every sample, from `seed`
    and the sample's id. A span "@subject" is each sample's own subject.
    answer: "own", the first token of the model's own answer, or "expected", the data set's first answer, all
    its tokens jointly. only_correct: leave out what the model answers wrongly.
    stacks, kinds, window, tokens, direction, metrics, sever, patch_group: as in `Tracer.trace`; the foil of a
    logit difference is the sample's. method, method_options: as on the command line.
    store: the type in which maps are kept. batch: how many questions of equal shape share a pass.

    Raises ValueError, in one sentence, for what cannot be.
    """

    stacks: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = ("hidden",)
    window: int = 1
    tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)
    direction: str = "denoise"
    metrics: tuple[str, ...] = ("probability",)
    sever: tuple[str, ...] = ()
    patch_group: int = 1
    method: str = "exact"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    corrupt: tuple[str, ...] = ("embeddings",)
    corruption: Mapping[str, Any] = field(default_factory=dict)
    answer: str = "own"
    only_correct: bool = False
    seed: int = 0
    store: str = "float32"
    batch: int = 8

    def __post_init__(self) -> None:
        check_names("answer", [self.answer], ANSWERS)
        check_names("type of maps", [self.store], STORES)
        check_names("method", [self.method], METHODS)
        check_names("corruption", self.corrupt, [*CORRUPTIONS, PAIR])
        check_count("batch", self.batch, "questions")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or abs(self.seed) >= 2**63:
            raise ValueError(f"a seed must be a whole number of at most 63 bits, not {self.seed!r}")
        if PAIR in self.corrupt and (len(self.corrupt) > 1 or self.corruption):
            raise ValueError("the corruption pair takes everything from the data: nothing goes with it")
        if "seed" in self.corruption:
            raise ValueError("a run has one seed, from which the noise of every sample is drawn")
        make_method(self.method, self.method_options)
        if PAIR not in self.corrupt:
            self._made({})

    @property
    def noise_samples(self) -> int:
        """How many samples of the noise are drawn."""
        return 1 if PAIR in self.corrupt else count_samples(self._made({}))

    @property
    def files(self) -> tuple[str, ...]:
        """Pictures that the corruption of every sample takes."""
        swap = self.corruption.get("swap")
        return (*(() if swap is None else (str(swap),)), *map(str, self.corruption.get("reference", ())))

    def options(self) -> dict[str, Any]:
        """What `Tracer.request` is given, beside stacks, kinds and window."""
        return {
            "tokens": {stack: list(places) for stack, places in self.tokens.items()},
            "direction": self.direction,
            "metrics": self.metrics,
            "sever": self.sever,
            "patch_group": self.patch_group,
            "method": make_method(self.method, self.method_options),
        }

    def noise_seed(self, sample: Sample) -> int:
        """Of one sample; it depends on nothing but the run's seed and the sample's id."""
        text = f"{self.seed}:{sample.id}".encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")

    def corruption_of(self, sample: Sample, open_image: OpenImage) -> Corruption:
        """How a sample is corrupted. Raises ValueError where it lacks what that takes."""
        if PAIR in self.corrupt:
            return _pair(sample, open_image)
        options: dict[str, Any] = {"seed": self.noise_seed(sample)}
        if self.corruption.get("span") == SUBJECT:
            if sample.subject is None:
                raise ValueError("this sample names no subject, on which the noise is to be")
            options["span"] = sample.subject
        return self._made(options)

    def to_json(self) -> dict[str, Any]:
        """As plain values, those that come back from a file."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @classmethod
    def from_json(cls, given: Mapping[str, Any]) -> Settings:
        """What `to_json` gave, perhaps through a file. Raises ValueError for anything else."""
        listed = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        try:
            return cls(**{**given, **listed})
        except TypeError as error:
            raise ValueError(f"these are no settings of a sweep: {error}") from error

    def _made(self, own: Mapping[str, Any]) -> Corruption:
        drawn = [name for name in self.corrupt if "seed" in CORRUPTIONS[name].options]
        given = {name: value for name, value in own.items() if name != "seed" or drawn}
        return make_corruption(self.corrupt, {**self.corruption, **given})


def _pair(sample: Sample, open_image: OpenImage) -> Corruption:
    parts: list[Corruption] = []
    if sample.corrupt_image is not None:
        parts.append(ImageSwap(open_image(sample.corrupt_image)))
    if sample.corrupt_question is not None:
        parts.append(TokenSwap(sample.corrupt_question))
    if not parts:
        raise ValueError("this sample has no other half: neither a corrupt image nor a corrupt question")
    return parts[0] if len(parts) == 1 else Together(*parts)
