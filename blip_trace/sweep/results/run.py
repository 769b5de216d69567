"""The results of a run over a data set, read piece by piece: `load_run`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...sites import check_names
from ..parquet import BROKEN, open_file, read_groups
from ..schema import METADATA, STATUSES, Layout
from ..store import PLAN, SHARDS, SUCCESS, Store, Stored, open_store
from .profiles import indirect_effect

if TYPE_CHECKING:
    import pandas as pd

    from .aggregate import Aggregate


class SampleMap(NamedTuple):
    """A map of one sample: values float64 [tokens, layers], of kinds of heads [heads, tokens, layers], their
    standard errors over samples of the noise (None where there was one), and what the tokens are."""

    values: npt.NDArray[np.float64]
    standard_error: npt.NDArray[np.float64] | None
    tokens: tuple[str, ...]
    roles: tuple[str, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """What a run has written so far: see `load_run`. Rows have the columns of `Layout.schema`.

    Nothing but metadata is read before it is asked for, then a group of rows at a time, every page checked
    against its checksum. Whatever reads rows raises ValueError, naming the file, for a broken one and for one
    of another run.
    """

    store: Store
    layout: Layout
    plan: Mapping[str, Any]
    shards: tuple[Stored, ...]
    complete: bool

    @property
    def settings(self) -> Mapping[str, Any]:
        """How the run was made."""
        settings: Mapping[str, Any] = self.plan["settings"]
        return settings

    @property
    def planned(self) -> int:
        """How many samples the run has when it is complete."""
        return int(self.plan["samples"])

    @property
    def images(self) -> tuple[Path | None, bool]:
        """Where the run found its images, as `media.Media` takes it: their folder, and whether names may lead
        out of it; none where the plan does not say."""
        places = self.plan.get("places")
        if not isinstance(places, dict) or not isinstance(places.get("images"), str | None):
            return None, False
        root = places.get("images")
        return None if root is None else Path(root), bool(places.get("absolute"))

    @cached_property
    def columns(self) -> pa.Schema:
        """Names and types of the columns."""
        return self.layout.schema()

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Groups of rows, one after another. Raises ValueError for a column that there is not."""
        names = self._check_columns(columns)
        for file in self.shards:
            yield from self._groups_of(file, names)

    def rows(
        self, columns: Sequence[str] | None = None, status: str | Collection[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows as dictionaries, in the order of the plan; only those with this status, or one of these.

        Raises ValueError for a column or a status that there is not.
        """
        names = self._check_columns(columns)
        if status is not None:
            wanted = check_names("status", (status,) if isinstance(status, str) else tuple(status), STATUSES)
            names = tuple(dict.fromkeys((*names, "status")))
        for table in self.groups(names):
            if status is not None:
                table = table.filter(pc.is_in(table["status"], pa.array(wanted)))
                table = table.select(self._check_columns(columns))
            for batch in table.to_batches(max_chunksize=64):  # Python's numbers take ten times the room
                yield from batch.to_pylist()

    def row(self, sample_id: str, columns: Sequence[str] | None = None) -> dict[str, Any]:
        """One sample's row. Raises KeyError for an unknown sample, ValueError for an unknown column."""
        names = self._check_columns(columns)
        for file in self.shards:
            for number, ids in enumerate(self._groups_of(file, ["sample_id"])):
                place = pc.index(ids["sample_id"], sample_id).as_py()
                if place >= 0:
                    (table,) = islice(self._groups_of(file, names), number, number + 1)
                    (found,) = table.slice(place, 1).to_pylist()
                    return found  # type: ignore[no-any-return]
        raise KeyError(f"{self.store} has no sample {sample_id!r}")

    def counts(self) -> dict[str, int]:
        """How many rows have each status."""
        found: Counter[str] = Counter()
        for table in self.groups(["status"]):
            for count in pc.value_counts(table["status"].combine_chunks()).to_pylist():
                found[count["values"]] += count["counts"]
        return {status: found[status] for status in STATUSES}

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows in memory: choose the columns of a large run. Raises ValueError for an unknown column."""
        names = self._check_columns(columns)
        return pa.concat_tables(self.groups(names)) if self.shards else self.columns.empty_table()

    def to_pandas(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """As `table`; maps are arrays of arrays. Raises ModuleNotFoundError without pandas."""
        frame: pd.DataFrame = self.table(columns).to_pandas()
        return frame

    def map(self, sample_id: str, stack: str, kind: str, metric: str | None = None) -> SampleMap:
        """The metric (None: the first) of a sample with each state restored, mean over samples of the noise.

        Raises ValueError for a map that the run does not have, and KeyError for an unknown sample and one
        without maps.
        """
        name = self.layout.map_column(stack, kind, self.check_map(stack, kind, metric))
        return self._map(self.row(sample_id, self._map_columns(stack, name)), stack, name)

    def effects(
        self, sample_id: str, stack: str, kind: str, metric: str | None = None, normalized: bool = False
    ) -> SampleMap:
        """The indirect effect of each state: restored minus low score (noising: high score minus what is
        left), over the total effect if `normalized`, then NaN where that vanishes. Raises as `map`."""
        metric = self.check_map(stack, kind, metric)
        name = self.layout.map_column(stack, kind, metric)
        scores = ("total_effect_vanishes", f"{metric}_high", f"{metric}_low")
        row = self.row(sample_id, [*self._map_columns(stack, name), *scores])
        found = self._map(row, stack, name)
        vanishes, high, low = (np.nan if row[score] is None else row[score] for score in scores)
        values = indirect_effect(self.layout, found.values, high, low)
        if not normalized:
            return found._replace(values=values)
        total = np.nan if vanishes or high == low else high - low
        error = found.standard_error
        return found._replace(
            values=values / total, standard_error=None if error is None else error / abs(total)
        )

    def aggregate(
        self,
        stack: str,
        kind: str,
        metric: str | None = None,
        by: Literal["role", "position"] = "role",
        split: str | None = None,
        normalized: bool = False,
        level: float = 0.95,
        draws: int = 1000,
        seed: int = 0,
        unit: Literal["sample", "image"] = "sample",
    ) -> Aggregate:
        """The mean indirect effect over samples, by role and layer: see `aggregate.aggregate`."""
        from .aggregate import aggregate

        return aggregate(self, stack, kind, metric, by, split, normalized, level, draws, seed, unit)

    def check_map(self, stack: str, kind: str, metric: str | None) -> str:
        """The metric, or the first one. Raises ValueError for a map that the run does not have."""
        layout = self.layout
        check_names("stack", stack, [known.name for known in layout.stacks])
        check_names("kind", kind, layout.kinds)
        if metric is None:
            return layout.metrics[0]
        return check_names("metric", metric, layout.metrics)[0]

    def maps(self) -> list[tuple[str, str]]:
        """The (stack, kind) of all maps."""
        return [(stack.name, kind) for stack in self.layout.stacks for kind in self.layout.kinds]

    def _map_columns(self, stack: str, name: str) -> list[str]:
        columns = ["sample_id", "status", "reason", name]
        if self.layout.spread:
            columns.append(f"{name}_se")
        return [*columns, *(f"{stack}_{what}" for what in ("tokens", "roles", "positions"))]

    def _map(self, row: Mapping[str, Any], stack: str, name: str) -> SampleMap:
        if row[name] is None:
            reason = f": {row['reason']}" if row["reason"] else ""
            raise KeyError(f"sample {row['sample_id']!r} has no maps, it is {row['status']!r}{reason}")
        values, error = (
            None if row.get(column) is None else np.array(row[column], dtype=np.float64)
            for column in (name, f"{name}_se")
        )
        assert values is not None
        tokens, roles, positions = (
            tuple(row[f"{stack}_{what}"]) for what in ("tokens", "roles", "positions")
        )
        return SampleMap(values, error, tokens, roles, positions)

    def _groups_of(self, file: Stored, columns: Sequence[str]) -> Iterator[pa.Table]:
        for table in read_groups(file, columns):
            if (table.schema.metadata or {}).get(METADATA) != self.layout.to_json().encode():
                raise ValueError(f"{file} belongs to another run")
            if missing := set(columns) - set(table.column_names):
                raise ValueError(f"{file} is broken: it lacks the column {min(missing)}")
            yield table

    def _check_columns(self, columns: Sequence[str] | None) -> tuple[str, ...]:
        names = self.columns.names
        return tuple(names) if columns is None else check_names("column", columns, names)


def load_run(place: str | Path) -> Run:
    """The results of a run in a folder or at an address like s3://bucket/folder, those of a run that goes on
    as far as they are there.

    Raises FileNotFoundError where there is no run or no result yet, and ValueError where one of its files is
    broken or a complete run lacks one.
    """
    store = open_store(place)
    if not store.has(PLAN):
        raise FileNotFoundError(f"{store} is no run: it holds no {PLAN}")
    plan = _read_plan(store)
    names = [name for name in store.names(SHARDS) if re.fullmatch(r"[0-9]+\.parquet", name)]
    shards = tuple(store.file(f"{SHARDS}/{name}") for name in names)
    if not shards:
        raise FileNotFoundError(f"{store} holds no results yet")
    complete = store.has(SUCCESS)
    if complete and len(shards) != len(plan["shards"]):
        raise ValueError(
            f"{store} was complete with {len(plan['shards'])} files of results, but holds {len(shards)}"
        )
    try:
        with open_file(shards[0]) as file:
            metadata = file.schema_arrow.metadata or {}
        layout = Layout.from_json(metadata.get(METADATA, b"{}").decode())
    except BROKEN as error:
        raise ValueError(f"{shards[0]} is broken: {' '.join(str(error).split())}") from error
    return Run(store, layout, plan, shards, complete)


def _read_plan(store: Store) -> Mapping[str, Any]:
    try:
        plan = store.read_json(PLAN)
        if not isinstance(plan["settings"], dict) or not isinstance(plan["shards"], list):
            raise TypeError("its settings or shards have another type")
        int(plan["samples"])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{store.file(PLAN)} is no plan of a run: {error}") from error
    return plan  # type: ignore[no-any-return]
