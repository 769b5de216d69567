"""Result rows: the columns of a run's Parquet files, and one row per sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..sites import HEAD_KINDS

FORMAT = "blip_trace.sweep/1"
METADATA = b"blip_trace"
"""The key of a file's metadata under which `Layout.to_json` stands."""

STATUSES = ("ok", "filtered", "error", "not_finite")
"""Traced; left out, for the model answers wrongly; not traced, for a reason; traced, with NaN or infinity."""


@dataclass(frozen=True)
class StackLayout:
    """A stack that is mapped: its layers, and whether its rows are groups of patches."""

    name: str
    layers: int


@dataclass(frozen=True)
class Layout:
    """What a run's rows hold. `store`: the type of maps. `spread`: whether standard errors over the noise's
    samples are kept (there are several samples)."""

    run_id: str
    stacks: tuple[StackLayout, ...]
    kinds: tuple[str, ...]
    metrics: tuple[str, ...]
    spread: bool
    store: Literal["float32", "float16"]
    direction: str

    def map_column(self, stack: str, kind: str, metric: str) -> str:
        """The name of a map's column; its standard errors stand in the same with "_se" behind."""
        return f"{stack}_{kind}_{metric}"

    def schema(self) -> pa.Schema:
        """The columns, with this layout in the metadata."""
        text, texts = pa.string(), pa.list_(pa.string())
        columns: dict[str, pa.DataType] = {
            "sample_id": text,
            "status": text,
            "reason": text,
            "image": text,
            "image_sha256": text,
            "question": text,
            "type": text,
            "answers": texts,
            "extra": text,  # JSON: not every reader of Parquet knows maps
            "model_answer": text,
            "correct": pa.bool_(),
            "answer": text,
            "answer_ids": pa.list_(pa.int32()),
            "foil": text,
            "corrupted": text,
            "seed": pa.int64(),
            "samples": pa.int32(),
            "total_effect_vanishes": pa.bool_(),
        }
        for metric in self.metrics:
            columns[f"{metric}_high"] = pa.float32()
            columns[f"{metric}_low"] = pa.float32()
            if self.spread:
                columns[f"{metric}_low_se"] = pa.float32()
        for stack in self.stacks:
            columns[f"{stack.name}_tokens"] = texts
            columns[f"{stack.name}_roles"] = texts
            columns[f"{stack.name}_positions"] = pa.list_(pa.int32())
            for kind in self.kinds:
                for metric in self.metrics:
                    name = self.map_column(stack.name, kind, metric)
                    for column in (name, f"{name}_se") if self.spread else (name,):
                        columns[column] = self._map_type(kind, stack.layers)
        return pa.schema(list(columns.items()), metadata={METADATA: self.to_json().encode()})

    def _map_type(self, kind: str, layers: int) -> pa.DataType:
        """Maps are [tokens, layers], of kinds of heads [heads, tokens, layers]."""
        value = pa.float32() if self.store == "float32" else pa.float16()
        tokens = pa.list_(pa.list_(value, layers))
        return pa.list_(tokens) if kind in HEAD_KINDS else tokens

    def to_json(self) -> str:
        """The layout as it stands in every file."""
        return json.dumps(
            {
                "format": FORMAT,
                "run_id": self.run_id,
                "stacks": [[stack.name, stack.layers] for stack in self.stacks],
                "kinds": list(self.kinds),
                "metrics": list(self.metrics),
                "spread": self.spread,
                "store": self.store,
                "direction": self.direction,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Layout:
        """Raises ValueError for anything else."""
        try:
            given = json.loads(text)
            if given["format"] != FORMAT:
                raise ValueError(f"its format is {given['format']!r}, not {FORMAT}")
            return cls(
                run_id=str(given["run_id"]),
                stacks=tuple(StackLayout(str(name), int(layers)) for name, layers in given["stacks"]),
                kinds=tuple(map(str, given["kinds"])),
                metrics=tuple(map(str, given["metrics"])),
                spread=bool(given["spread"]),
                store="float16" if given["store"] == "float16" else "float32",
                direction=str(given["direction"]),
            )
        except (LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"no layout of a sweep: {error}") from error


def table_of(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows as a table; what a row lacks is null. Maps are arrays [tokens, layers], or [heads, tokens,
    layers]."""
    schema = layout.schema()
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        maps = any(isinstance(value, np.ndarray) for value in values)
        columns.append(_nested(values, field.type) if maps else pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _nested(arrays: Sequence[npt.NDArray[Any] | None], kind: pa.ListType) -> pa.Array:
    """Arrays of several dimensions as nested lists, without a Python object for every number."""
    counts = [0 if array is None else len(array) for array in arrays]
    offsets = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    known = [array for array in arrays if array is not None]
    inner = kind.value_type
    if pa.types.is_fixed_size_list(inner):
        numbers = np.concatenate([array.reshape(-1) for array in known])
        values = numbers.astype(np.float32 if inner.value_type == pa.float32() else np.float16)
        below = pa.FixedSizeListArray.from_arrays(pa.array(values), type=inner)
    else:
        below = _nested([part for array in known for part in array], inner)
    missing = pa.array([array is None for array in arrays])
    return pa.ListArray.from_arrays(pa.array(offsets), below, type=kind, mask=missing)
