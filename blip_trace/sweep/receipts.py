"""Finished shards: committed with a receipt, and checked against it whenever they are relied upon."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from .parquet import BROKEN, encode, open_file, read_groups
from .plan import Plan, Shard, ids_digest
from .schema import METADATA, STATUSES, Layout, table_of
from .store import Store, receipt_name, shard_name


@dataclass(frozen=True)
class Receipt:
    """What a committed shard is: its file's bytes and SHA-256, its rows by status, and how it was made (host,
    seconds, and notes of what went other than planned)."""

    number: int
    run_id: str
    sha256: str
    bytes: int
    ids: str
    statuses: Mapping[str, int]
    seconds: float = 0.0
    made: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def samples(self) -> int:
        """All rows."""
        return sum(self.statuses.values())

    @property
    def failed(self) -> int:
        """Rows without a usable map, for another reason than that they were to be left out."""
        return self.statuses.get("error", 0) + self.statuses.get("not_finite", 0)


def commit(
    store: Store,
    shard: Shard,
    layout: Layout,
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    made: Mapping[str, Any],
    notes: Sequence[str],
) -> Receipt:
    """Write a shard's rows, and then its receipt, for good.

    The rows' file says of itself what it is, so that a receipt that was lost can be written again.
    """
    with np.errstate(over="ignore"):  # rows with numbers too large for float16 say so
        data = encode(table_of(layout, rows))
    receipt = Receipt(
        number=shard.number,
        run_id=layout.run_id,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        ids=shard.ids,
        statuses=dict(Counter(row["status"] for row in rows)),
        seconds=round(seconds, 3),
        made=made,
        notes=tuple(notes),
    )
    # the old receipt must not stand beside new rows
    store.remove(receipt_name(shard.number))
    store.write(shard_name(shard.number), data)
    store.write_json(receipt_name(shard.number), asdict(receipt))
    return receipt


def read_receipt(store: Store, number: int) -> Receipt | None:
    """A shard's receipt, or None where there is none that can be read."""
    if not store.has(receipt_name(number)):
        return None
    try:
        receipt = Receipt(**store.read_json(receipt_name(number)))
        counted = receipt.samples >= 0 and receipt.statuses.keys() <= set(STATUSES)
        return receipt if counted else None
    except (ValueError, TypeError, AttributeError):
        return None


def check_shard(store: Store, plan: Plan, shard: Shard, repair: bool = True) -> tuple[Receipt | None, str]:
    """A committed shard's receipt, or None and why the shard has to be done (again).

    Rows whose receipt is missing or torn are read and compared with the plan; if they are what was planned,
    and every byte of their file is as it was written, they get a new receipt, written only to `repair`.
    """
    name = shard_name(shard.number)
    found = store.sha256(name)
    if found is None:
        return None, "not done yet"
    receipt = read_receipt(store, shard.number)
    if receipt is not None and receipt.samples == shard.samples:
        if (receipt.number, receipt.run_id, receipt.ids) != (shard.number, plan.run_id, shard.ids):
            return None, f"the receipt of {name} is that of other samples"
        if receipt.sha256 != found:
            return None, f"{name} is not what its receipt says: it was changed or damaged"
        return receipt, ""
    try:
        statuses = _statuses(store, plan.layout, shard)
    except ValueError as error:
        return None, str(error)
    size = len(store.read(name))
    note = "the receipt was lost and written again"
    receipt = Receipt(shard.number, plan.run_id, found, size, shard.ids, statuses, notes=(note,))
    if repair:
        store.write_json(receipt_name(shard.number), asdict(receipt))
    return receipt, ""


def _statuses(store: Store, layout: Layout, shard: Shard) -> dict[str, int]:
    """Rows by status of a shard without a receipt. Raises ValueError where they are not what was planned."""
    path = store.file(shard_name(shard.number))
    try:
        with open_file(path) as file:
            schema = file.schema_arrow
    except BROKEN as error:
        raise ValueError(f"{path} is broken: {' '.join(str(error).split())}") from error
    expected = layout.schema()
    if not schema.equals(expected) or (schema.metadata or {}).get(METADATA) != expected.metadata[METADATA]:
        raise ValueError(f"{path} is of another run")
    table = pa.concat_tables([expected.empty_table(), *read_groups(path)]).combine_chunks()
    ids = table.column("sample_id").to_pylist()
    statuses = Counter(table.column("status").to_pylist())
    if ids_digest(map(str, ids)) != shard.ids or not statuses.keys() <= set(STATUSES):
        raise ValueError(f"{path} holds other samples than were planned")
    # Checksums cover what is in the pages, not what describes them: all of it, written again, must be equal.
    if encode(pa.Table.from_arrays(table.columns, schema=expected)) != store.read(shard_name(shard.number)):
        raise ValueError(f"{path} was damaged, or written by another version of pyarrow")
    return dict(statuses)
