"""From what somebody asks for to a run: a new one, one that goes on, or a sentence that says what changed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image
import torch

from ..lowering.load import SHIPPED
from ..prepare import Asked, Prepared
from ..sites import check_count, check_names
from ..tracer import Tracer
from .identity import differences, model_folder, model_identity, run_id
from .plan import Plan, extend, freeze, samples_of
from .sample import Sample
from .schema import FORMAT, Layout, StackLayout
from .settings import Settings
from .shard import ask_sample, request_of
from .sources import DataSet
from .staging import Selected, Staging, staging
from .store import PLAN, SUCCESS, Store, file_sha256

SHARD_OPERATIONS = 20e12
"""About a minute of work of two processor cores: what is lost at most when a process ends."""
LEAST_SHARD, LARGEST_SHARD, UNKNOWN_SHARD = 8, 512, 64
FEWEST_SHARDS = 16
"""Of a large run, that several processes have something to do."""
PROBED = 4
"""Samples by which a forecast is made."""
ON_ERROR = ("skip", "stop")
BYTES_PER_VALUE = {"float32": 3.5, "float16": 1.9}
"""Roughly, of a map's number, compressed."""
ROW_BYTES = 400
"""Of everything else in a row."""


class Changed(ValueError):
    """A run cannot go on, for it would not be the same run any more."""


@dataclass(frozen=True)
class Order:
    """What is to be swept: a data set (`limit`: so many samples of it, drawn at random), with a model, by
    settings. shard_size: samples in a shard, chosen by their cost unless given. on_error: "skip", rows of the
    data that cannot be traced become failed results; "stop": they are refused before anything is planned."""

    data: DataSet
    model: str = "vqa"
    settings: Settings = field(default_factory=Settings)
    dtype: str = "float32"
    backend: str = "auto"
    device: str = "cpu"
    limit: int | None = None
    shard_size: int | None = None
    on_error: str = "skip"

    def __post_init__(self) -> None:
        check_names("way with bad rows", [self.on_error], ON_ERROR)
        for name, count in (("limit", self.limit), ("shard size", self.shard_size)):
            if count is not None:
                check_count(name, count, "samples")

    def tracer(self, memory: int | None = None, threads: int | None = None) -> Tracer:
        """Raises as `Tracer.from_pretrained` does."""
        if threads is not None:
            torch.set_num_threads(threads)
        folder = model_folder(self.model)
        return Tracer.from_pretrained(folder, self.device, self.dtype, self.backend, memory)  # type: ignore[arg-type]

    def identity(self, tracer: Tracer) -> dict[str, Any]:
        """Everything that the numbers depend on; what is in the data is added when they have been read."""
        return {
            "format": FORMAT,
            "model": model_identity(model_folder(self.model)),
            "data": {"format": self.data.name, "limit": self.limit},
            "settings": self.settings.to_json(),
            "files": [file_sha256(Path(name)) for name in self.settings.files],
            "dtype": self.dtype,
            "backend": tracer.backend,
            "device": tracer.device.type,
        }

    def places(self) -> dict[str, Any]:
        """Where things are on this machine."""
        media = self.data.media
        folder = self.model not in SHIPPED and Path(self.model).is_dir()
        return {
            "data": str(self.data.path),
            "model": str(Path(self.model).absolute()) if folder else self.model,
            "images": None if media.root is None else str(media.root),
            "absolute": media.absolute,
        }


@dataclass(frozen=True)
class Estimate:
    """What a run will take, judged by a few of its samples."""

    samples: int
    problems: int
    images: int
    shards: int
    cells: int
    seconds: float
    bytes: int


def begin(store: Store, order: Order, tracer: Tracer, grow: bool = False) -> Plan:
    """The plan of a folder: made and frozen if it is new, and otherwise the one that is there.

    grow: samples that the data set has got since are planned behind the others.
    Raises Changed, naming what differs, where the folder holds a run of something else.
    """
    with staging(store.scratch(), order.settings.seed) as staged:
        selected = _filled(staged, order)
        identity = order.identity(tracer)
        if not store.has(PLAN):
            identity["data"] |= {"samples": selected.samples, "digest": f"{selected.digest:x}"}
            size = order.shard_size or choose_shard_size(
                tracer, order.settings, staged.ordered(), selected.samples
            )
            layout = layout_of(tracer, order.settings, identity)
            return freeze(store, staged, selected, identity, order.places(), layout, size)
        plan = Plan.load(store)
        check_same(store, plan, identity)
        if order.shard_size not in (None, plan.shard_size):
            raise Changed(
                f"{store} was planned in shards of {plan.shard_size} samples, not of {order.shard_size}"
            )
        if selected == plan.data:
            return plan
        if not grow:
            raise Changed(
                f"the data set has changed since {store} was planned: it had {plan.samples} samples and "
                f"now has {selected.samples}, not all of them the same; --extend adds new ones to the run"
            )
        return _grown(store, plan, order, staged)


def check_same(store: Store, plan: Plan, identity: Mapping[str, Any]) -> None:
    """Raises Changed where a run would not be the same any more."""
    planned = dict(plan.identity)
    data = planned["data"]
    planned["data"] = {name: value for name, value in data.items() if name in identity["data"]}
    found = differences(planned, identity)
    if found:
        listed = "; ".join(found)
        raise Changed(f"{store} holds another run, so go on with that or name another folder: {listed}")


def estimate(order: Order, tracer: Tracer) -> Estimate:
    """What a run will take; writes nothing."""
    with staging(Path(tempfile.gettempdir()), order.settings.seed) as staged:
        selected = _filled(staged, order)
        size = order.shard_size or choose_shard_size(
            tracer, order.settings, staged.ordered(), selected.samples
        )
        begun = time.perf_counter()
        probed = _probe(tracer, order.settings, staged.ordered())
        seconds = time.perf_counter() - begun
        images, problems = staged.counts()
        share = (selected.samples - problems) / max(1, len(probed))  # of all samples to those probed
        forecast = tracer.forecast(probed)
        noise = order.settings.noise_samples
        columns = (2 if noise > 1 else 1) * len(order.settings.metrics)
        numbers = forecast.cells // noise * columns * share
        return Estimate(
            samples=selected.samples,
            problems=problems,
            images=images,
            shards=-(-selected.samples // size),
            cells=round(forecast.cells * share),
            seconds=(seconds + forecast.seconds) * share,
            bytes=round(numbers * BYTES_PER_VALUE[order.settings.store] + selected.samples * ROW_BYTES),
        )


def layout_of(tracer: Tracer, settings: Settings, identity: Mapping[str, Any]) -> Layout:
    """What the rows of a run hold. Raises ValueError for settings that do not fit the model."""
    request = request_of(tracer, settings)
    stacks = tracer.program.stacks
    return Layout(
        run_id=run_id(identity),
        stacks=tuple(StackLayout(name, len(stacks[name].layers)) for name in request.stacks),
        kinds=request.kinds,
        metrics=request.metrics,
        spread=settings.noise_samples > 1,
        store="float16" if settings.store == "float16" else "float32",
        direction=request.direction,
    )


def choose_shard_size(tracer: Tracer, settings: Settings, samples: Iterator[Sample], count: int) -> int:
    """Samples of a shard: as many as make about a minute of work, and few enough that several processes have
    something to do."""
    request = request_of(tracer, settings)
    known = (
        tracer.operations(request, own, settings.noise_samples)
        for _, own in _asked(tracer, settings, samples)
    )
    operations = next(known, None)
    minute = int(SHARD_OPERATIONS / operations) if operations else UNKNOWN_SHARD
    return max(LEAST_SHARD, min(LARGEST_SHARD, minute, max(UNKNOWN_SHARD, count // FEWEST_SHARDS)))


def _asked(tracer: Tracer, settings: Settings, samples: Iterator[Sample]) -> Iterator[tuple[Sample, Asked]]:
    """Those that can be asked of the first few, with a blank picture in the place of theirs: the others will
    be failed rows, and are no measure."""
    side = tracer.model.config.vision_config.image_size
    blank = PIL.Image.new("RGB", (side, side))
    for sample in islice(samples, 16 * PROBED):
        with suppress(ValueError, TypeError):
            yield sample, ask_sample(tracer, settings, sample, blank)


def _probe(tracer: Tracer, settings: Settings, samples: Iterator[Sample]) -> list[Prepared]:
    """The first few samples, prepared but for their pictures."""
    request = request_of(tracer, settings)
    prepared: list[Prepared] = []
    for sample, asked in _asked(tracer, settings, samples):
        with suppress(ValueError, TypeError):
            corruption = settings.corruption_of(sample, lambda _: PIL.Image.new("RGB", (1, 1)))
            prepared.append(tracer.prepare(request, asked, corruption))
        if len(prepared) == PROBED:
            break
    return prepared


def _filled(staged: Staging, order: Order) -> Selected:
    staged.fill(order.data.samples())
    selected = staged.draw(order.limit)
    if not selected.samples:
        raise ValueError(f"{order.data.path} holds no samples")
    problem = staged.first_problem() if order.on_error == "stop" else None
    if problem is not None:
        raise ValueError(f"{order.data.path} holds rows that cannot be traced, the first of them: {problem}")
    return selected


def _grown(store: Store, plan: Plan, order: Order, staged: Staging) -> Plan:
    if order.limit is not None:
        raise ValueError("a part that was drawn at random cannot grow: leave --limit or --extend out")
    known = (sample for shard in plan.shards for sample in samples_of(store, shard))
    changed = staged.forget(known)
    if changed:
        raise Changed(
            f"{len(changed)} of the samples planned in {store} are gone or changed, so it cannot grow: "
            f"{', '.join(changed[:3])}{', …' if len(changed) > 3 else ''}"
        )
    store.remove(SUCCESS)
    return extend(store, plan, staged, staged.draw(None))
