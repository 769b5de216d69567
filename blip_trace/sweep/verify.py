"""Whether a run is what it should be: every planned sample once, every byte as it was written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from .parquet import read_groups
from .plan import Plan, manifest_name
from .receipts import Receipt, check_shard, read_receipt
from .store import RECEIPTS, SHARDS, SUCCESS, Store, receipt_name, shard_name


@dataclass(frozen=True)
class Findings:
    """What a run's folder holds: receipts by shard, and for each other shard why it counts as not done; what
    is wrong beyond that; rows by status."""

    done: dict[int, Receipt]
    open: dict[int, str]
    wrong: list[str]

    @property
    def statuses(self) -> Counter[str]:
        """Rows by status, of the shards that are done."""
        total: Counter[str] = Counter()
        for receipt in self.done.values():
            total.update(receipt.statuses)
        return total

    @property
    def complete(self) -> bool:
        """Whether everything is there and as it should be."""
        return not self.open and not self.wrong


def examine(store: Store, plan: Plan, deep: bool = False, repair: bool = True) -> Findings:
    """Look at all of a run: manifests and shards against their digests. deep: read every page of every shard
    too, against its own checksum. repair: write receipts again that were lost."""
    wrong = []
    for number, part in enumerate(plan.parts):
        name = manifest_name(number)
        if store.sha256(name) != part.sha256:
            wrong.append(f"{store.file(name)} is missing or is not the one that was planned")
    done, left = {}, {}
    for shard in plan.shards:
        receipt, reason = check_shard(store, plan, shard, repair)
        if receipt is not None and deep:
            try:
                for _ in read_groups(store.file(shard_name(shard.number))):
                    pass
            except ValueError as error:
                receipt, reason = None, str(error)
        if receipt is None:
            left[shard.number] = reason
        else:
            done[shard.number] = receipt
    return Findings(done, left, wrong + _strangers(store, plan))


def overview(store: Store, plan: Plan) -> list[Receipt]:
    """The receipts of a run, as they are: a quick look that checks nothing."""
    receipts = (read_receipt(store, shard.number) for shard in plan.shards)
    return [receipt for receipt in receipts if receipt is not None]


def finish(store: Store, plan: Plan, found: Findings) -> dict[str, Any]:
    """Say for good that a run is complete; returns what is written."""
    about = {
        "run_id": plan.run_id,
        "samples": plan.samples,
        "statuses": dict(found.statuses),
        "shards": {shard_name(number): receipt.sha256 for number, receipt in sorted(found.done.items())},
    }
    if _written(store) != about:
        store.write_json(SUCCESS, about)
    return about


def _written(store: Store) -> Any:
    """What was said of the run before; None where that is missing or broken."""
    try:
        return store.read_json(SUCCESS) if store.has(SUCCESS) else None
    except ValueError:
        return None


def _strangers(store: Store, plan: Plan) -> list[str]:
    """Files among the results that were not planned; what somebody began and left does no harm."""
    known = {shard_name(shard.number) for shard in plan.shards}
    known |= {receipt_name(shard.number) for shard in plan.shards}
    found = [
        f"{folder}/{name}"
        for folder in (SHARDS, RECEIPTS)
        for name in store.names(folder)
        if not name.startswith(".")
    ]
    return [f"{store.file(name)} does not belong to this run" for name in found if name not in known]
