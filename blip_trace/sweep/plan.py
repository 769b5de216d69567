"""The frozen plan of a run: which samples there are, in which shards, and what they are traced with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from . import identity as identities
from .parquet import read_group, writer
from .sample import Sample
from .schema import Layout
from .settings import Settings
from .staging import Selected, Staging, add_digests
from .store import MANIFESTS, PLAN, Store

FORMAT = "blip_trace.plan/1"
OVERFULL = 2
"""An image whose samples would make a shard so many times its size is cut."""

_TEXT = pa.string()
SAMPLES = pa.schema(
    {
        "id": _TEXT,
        "image": _TEXT,
        "question": _TEXT,
        "answers": pa.list_(_TEXT),
        "type": _TEXT,
        "corrupt_image": _TEXT,
        "corrupt_question": _TEXT,
        "foil": _TEXT,
        "subject": _TEXT,
        "extra": pa.map_(_TEXT, _TEXT),
        "problem": _TEXT,
    }
)
"""A manifest's columns: the fields of `Sample`. Its row groups are the shards."""


@dataclass(frozen=True)
class Shard:
    """A part of a run that is traced and committed as a whole: row group `group` of the manifest of `part`;
    `ids`: the digest of its samples' ids, in order."""

    number: int
    samples: int
    part: int
    group: int
    ids: str


@dataclass(frozen=True)
class Part:
    """Samples that were planned together: first those of the data set, later those that it grew by."""

    samples: int
    digest: str
    sha256: str


@dataclass(frozen=True)
class Plan:
    """A run, frozen before its first sample is traced.

    identity: everything that the numbers depend on; run_id: its name. places: where data, images and model
    are on this machine, which may change. layout: what the rows hold.
    """

    run_id: str
    identity: Mapping[str, Any]
    places: Mapping[str, Any]
    layout: Layout
    shard_size: int
    parts: tuple[Part, ...]
    shards: tuple[Shard, ...]

    @property
    def settings(self) -> Settings:
        """What is traced of every sample."""
        return Settings.from_json(self.identity["settings"])

    @property
    def samples(self) -> int:
        """How many there are."""
        return sum(part.samples for part in self.parts)

    @property
    def data(self) -> Selected:
        """All samples together, as `Staging.draw` describes them."""
        digest = 0
        for part in self.parts:
            digest = add_digests(digest, int(part.digest, 16))
        return Selected(self.samples, digest)

    def save(self, store: Store) -> None:
        """Write it for good."""
        content = {
            "format": FORMAT,
            "samples": self.samples,
            "settings": self.identity["settings"],
            **asdict(self),
            "layout": self.layout.to_json(),
        }
        store.write_json(PLAN, {**content, "sha256": _digest(content)})

    @classmethod
    def load(cls, store: Store) -> Plan:
        """Raises ValueError where the folder's plan is broken, FileNotFoundError where it holds none."""
        if not store.has(PLAN):
            raise FileNotFoundError(f"{store} holds no run: there is no {PLAN} in it")
        given = store.read_json(PLAN)
        try:
            if given["format"] != FORMAT:
                raise ValueError(f"its format is {given['format']!r}, not {FORMAT}")
            plan = cls(
                run_id=given["run_id"],
                identity=given["identity"],
                places=given["places"],
                layout=Layout.from_json(given["layout"]),
                shard_size=given["shard_size"],
                parts=tuple(Part(**part) for part in given["parts"]),
                shards=tuple(Shard(**shard) for shard in given["shards"]),
            )
            if identities.run_id(plan.identity) != plan.run_id:
                raise ValueError("what it describes is not what it is named after")
            if given.pop("sha256") != _digest(given):
                raise ValueError("it was changed or damaged")
            return plan
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{store.file(PLAN)} is broken: {error}") from error


def _digest(content: Mapping[str, Any]) -> str:
    """Of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_name(part: int) -> str:
    """The file of the samples of one part."""
    return f"{MANIFESTS}/samples-{part:03d}.parquet"


def freeze(
    store: Store,
    staging: Staging,
    selected: Selected,
    identity: Mapping[str, Any],
    places: Mapping[str, Any],
    layout: Layout,
    shard_size: int,
) -> Plan:
    """Plan a new run of the samples that were staged, and write the plan for good."""
    empty = Plan(identities.run_id(identity), identity, places, layout, shard_size, (), ())
    return extend(store, empty, staging, selected)


def extend(store: Store, plan: Plan, staging: Staging, selected: Selected) -> Plan:
    """Plan what is staged behind what is planned already, and write the plan for good."""
    number = len(plan.parts)
    shards: list[Shard] = []
    name = manifest_name(number)
    with (
        store.writing(name) as out,
        writer(out, SAMPLES) as file,
    ):
        for group, samples in enumerate(_shards(staging.ordered(), plan.shard_size)):
            file.write_table(pa.Table.from_pylist([asdict(s) for s in samples], schema=SAMPLES))
            place = len(plan.shards) + group
            shards.append(Shard(place, len(samples), number, group, ids_digest(s.id for s in samples)))
    sha256 = store.sha256(name)
    if sha256 is None:
        raise OSError(f"{store.file(name)} was written and is not there")
    part = Part(selected.samples, f"{selected.digest:x}", sha256)
    extended = replace(plan, parts=(*plan.parts, part), shards=(*plan.shards, *shards))
    extended.save(store)
    return extended


def samples_of(store: Store, shard: Shard) -> list[Sample]:
    """The samples of a shard. Raises ValueError where the manifest is broken or not the one that was
    planned."""
    file = store.file(manifest_name(shard.part))
    rows = read_group(file, shard.group).to_pylist()
    samples = [
        Sample(**{**row, "answers": tuple(row["answers"]), "extra": dict(row["extra"])}) for row in rows
    ]
    if ids_digest(sample.id for sample in samples) != shard.ids:
        raise ValueError(f"{file} is not the one that was planned")
    return samples


def ids_digest(ids: Iterable[str]) -> str:
    """Of ids in their order."""
    whole = hashlib.sha256()
    for own in ids:
        whole.update(own.encode() + b"\0")
    return whole.hexdigest()


def _shards(samples: Iterable[Sample], size: int) -> Iterator[Sequence[Sample]]:
    """Samples in shards of about `size`, cut where the image changes."""
    shard: list[Sample] = []
    for sample in samples:
        changed = bool(shard) and sample.image != shard[-1].image
        if (changed and len(shard) >= size) or len(shard) >= OVERFULL * size:
            yield shard
            shard = []
        shard.append(sample)
    if shard:
        yield shard
