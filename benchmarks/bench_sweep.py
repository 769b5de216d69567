"""Whole data sets: what a sweep adds to the engine's own work, and what it saves against a loop over hooks.

The model is loaded before; reading, decoding, planning, asking the model itself and writing are counted.
Images are encoded anew in every round.
"""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import pytest
import torch
from bench_trace import interleave
from conftest import ROWS, Gate
from subject import blip_base
from transformers import BlipImageProcessorPil, BlipProcessor

from blip_trace import GaussianNoise, Tracer
from blip_trace.images import decode_image
from blip_trace.lowering.load import shipped_model
from blip_trace.scenes import photograph, random_scene
from blip_trace.sweep.driver import Silent, sweep
from blip_trace.sweep.executors import Executor, make_executor
from blip_trace.sweep.planning import Order
from blip_trace.sweep.processes import Processes
from blip_trace.sweep.receipts import Receipt
from blip_trace.sweep.settings import Settings
from blip_trace.sweep.sources import DataSet, open_data

HOOKED = {1: 4, 10: 1}
"""Samples by which the loop over hooks is timed, by draws of the noise."""


@dataclass(frozen=True)
class Loaded(Order):
    """An order whose model is loaded already."""

    loaded: list[Tracer] = field(default_factory=list)

    def tracer(self, memory: int | None = None, threads: int | None = None) -> Tracer:
        return self.loaded[0]


class Clock(Silent):
    """Samples a second, from the first that were computed to the last: starting processes is not counted."""

    def __init__(self) -> None:
        self._times: list[float] = []
        self._samples: list[int] = []
        self._commits: list[float] = []
        self._work: list[float] = []

    def computed(self, samples: int) -> None:
        if samples:
            self._times.append(time.perf_counter())
            self._samples.append(samples)

    def finished(self, receipt: Receipt) -> None:
        self._commits.append(time.perf_counter())
        self._work.append(receipt.seconds)

    @property
    def beyond(self) -> float:
        """Seconds between two shards that were no work on them, the mean over all but the first."""
        shards = len(self._commits) - 1
        return (self._commits[-1] - self._commits[0] - sum(self._work[1:])) / shards

    @property
    def rate(self) -> float:
        return sum(self._samples[1:]) / (self._times[-1] - self._times[0])


@dataclass
class Case:
    """A data set, a model, and how many samples of the noise."""

    data: DataSet
    tracer: Tracer
    samples: int
    folder: Path
    shard_size: int | None = None
    runs: int = 0

    def sweep(self, executor: Executor | None = None, threads: int | None = None) -> Clock:
        """All of it into a new folder."""
        self.tracer.forget_images()
        self.runs += 1
        settings = Settings(corruption={"samples": self.samples})
        order = Loaded(self.data, settings=settings, shard_size=self.shard_size, loaded=[self.tracer])
        clock = Clock()
        out = self.folder / f"{self.runs}-{self.samples}"
        done = sweep(order, out, executor, threads=threads, reporter=clock)
        assert done.complete
        assert done.failed == 0
        return clock

    def engine(self) -> Callable[[], None]:
        """The same cells by `trace_batch`, from pixels, in batches of the same shapes."""
        by_shape: defaultdict[int, list[tuple[torch.Tensor, str]]] = defaultdict(list)
        for sample in self.data.samples():
            picture = decode_image(self.data.media.read(sample.image), sample.image)
            pixels = self.tracer.inputs.pixels(picture)
            by_shape[len(self.tracer.inputs.question_ids(sample.question))].append((pixels, sample.question))
        size = Settings().batch
        batches = [
            own[first : first + size] for own in by_shape.values() for first in range(0, len(own), size)
        ]
        corruption = GaussianNoise(samples=self.samples)

        def run() -> None:
            self.tracer.forget_images()
            for batch in batches:
                self.tracer.trace_batch(batch, corruption=corruption)

        return run


@pytest.fixture
def shipped(tmp_path: Path, quick: bool) -> Callable[[int], Case]:
    """Questions about scenes, in files as a data set has them: what drawing takes is no part of a sweep."""
    scenes = open_data(f"scenes:{10 if quick else 40}")
    lines = []
    for sample in scenes.samples():
        picture = f"{sample.image.removeprefix('scene:')}.png"
        if not (tmp_path / picture).exists():
            (tmp_path / picture).write_bytes(scenes.media.read(sample.image))
        lines.append(json.dumps({"id": sample.id, "image": picture, "question": sample.question}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    tracer = Tracer.from_pretrained(shipped_model())
    return lambda samples: Case(open_data(tmp_path / "questions.jsonl"), tracer, samples, tmp_path / "runs")


@pytest.mark.parametrize("samples", [1, 10])
def test_shipped_model(benchmark: Any, shipped: Callable[[int], Case], samples: int, gate: Gate) -> None:
    case = shipped(samples)
    count = sum(1 for _ in case.data.samples())
    hooks = Tracer(case.tracer.model, case.tracer.processor, backend="hooks")
    some = list(case.data.samples())[: HOOKED[samples]]
    pictures = [decode_image(case.data.media.read(sample.image), sample.image) for sample in some]

    def loop() -> None:
        for sample, picture in zip(some, pictures, strict=True):
            hooks.trace(picture, sample.question, corruption=GaussianNoise(samples=samples))

    ours, times = interleave(benchmark, 3, case.sweep, {"engine": case.engine(), "hooks": loop})
    named = f"sweep, shipped model, {samples} sample{'s' if samples > 1 else ''}"
    gate(
        {
            f"{named}: share of the engine's rate": times["engine"] / ours,
            f"{named}: loop over hooks": times["hooks"] / HOOKED[samples] * count / ours,
        }
    )


def test_base_size(benchmark: Any, tmp_path: Path, quick: bool, gate: Gate) -> None:
    """On photographs of 640 x 480, a question on each; all of one length, as large data sets have many."""
    model = blip_base("float32")
    tokenizer = BlipProcessor.from_pretrained(shipped_model(), backend="pil").tokenizer
    model.config.text_config.sep_token_id = tokenizer.sep_token_id
    with torch.no_grad():  # random weights would go on talking: this model ends at once
        model.text_decoder.cls.predictions.bias[tokenizer.sep_token_id] = 1e4
    side = model.config.vision_config.image_size
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), tokenizer)
    rng = Random(0)
    with open(tmp_path / "questions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "image", "question"))
        for number in range(4 if quick else 8):
            scene = random_scene(rng)
            photograph(scene, (640, 480)).save(tmp_path / f"{number}.jpg")
            item = scene.objects[0]
            writer.writerow((number, f"{number}.jpg", f"what color is the {item.shape}"))
    case = Case(open_data(tmp_path / "questions.csv"), Tracer(model, processor), 1, tmp_path / "runs")
    ours, times = interleave(benchmark, 2, case.sweep, {"engine": case.engine()})
    gate({"sweep, base float32, 1 sample: share of the engine's rate": times["engine"] / ours})


def test_two_processes(benchmark: Any, shipped: Callable[[int], Case], gate: Gate) -> None:
    """Two processes of one thread each against one of two."""
    case = shipped(10)
    case.shard_size = 10
    one: list[float] = []
    two: list[float] = []
    benchmark.pedantic(
        lambda: two.append(case.sweep(Processes(2), threads=1).rate),
        setup=lambda: one.append(case.sweep(threads=2).rate),
        rounds=3,
    )
    gate({"sweep, two processes of one thread: rate over one of two": median(two) / median(one)})


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_overhead_of_a_shard(benchmark: Any, shipped: Callable[[int], Case], executor: str) -> None:
    """What a shard takes beyond its work, of one worker: told, not gated, for the disk is part of it."""
    case = shipped(1)
    case.shard_size = 10
    clocks: list[Clock] = []
    benchmark.pedantic(lambda: clocks.append(case.sweep(make_executor(executor, 1), threads=1)), rounds=1)
    (clock,) = clocks
    torch.set_num_threads(2)
    ROWS.append((f"sweep, {executor}: ms of a shard beyond its work", clock.beyond * 1e3, None))
