"""What a run's samples are, counted in one pass: statuses, failures, types, right answers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ..schema import STATUSES
from .aggregate import MAX_GROUPS, NONE
from .run import Run

EXAMPLES = 3
MAX_REASONS = 1000
"""Different reasons that are told apart; samples that failed for others are counted together."""
OTHER_REASONS = "further reasons"


@dataclass
class Judged:
    """Samples of a type: how many there are and were traced, and of how many it is known whether the model
    answers them right, and does; of those traced, the sum of high and of low scores and how many total
    effects vanish."""

    samples: int = 0
    traced: int = 0
    known: int = 0
    right: int = 0
    high: float = 0.0
    low: float = 0.0
    vanishing: int = 0

    def add(self, other: Judged) -> None:
        """Count these samples too."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Failure:
    """How many samples failed for one reason, and some of them."""

    samples: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Overview:
    """All samples of a run. types: by their type, None where there are too many to tell apart."""

    counts: dict[str, int]
    total: Judged
    types: dict[str, Judged] | None
    failures: dict[str, Failure]


def overview(run: Run, metric: str) -> Overview:
    """Count a run's samples; scores are those of `metric`. Raises ValueError where a file is broken."""
    counts: Counter[str] = Counter()
    types: dict[str, Judged] | None = {}
    failures: dict[str, Failure] = {}
    total = Judged()
    scores = (f"{metric}_high", f"{metric}_low")
    columns = ["sample_id", "status", "reason", "type", "correct", "total_effect_vanishes", *scores]
    for table in run.groups(columns):
        for row in table.to_pylist():
            counts[row["status"]] += 1
            judged = _judged(row, *scores)
            total.add(judged)
            if types is not None:
                types.setdefault(row["type"] or NONE, Judged()).add(judged)
                types = types if len(types) <= MAX_GROUPS else None
            if row["status"] in ("error", "not_finite"):
                reason = row["reason"] or ("NaN or infinity" if row["status"] == "not_finite" else NONE)
                if reason not in failures and len(failures) >= MAX_REASONS:
                    reason = OTHER_REASONS
                failure = failures.setdefault(reason, Failure())
                failure.samples += 1
                if len(failure.examples) < EXAMPLES:
                    failure.examples.append(row["sample_id"])
    by_count = sorted(failures.items(), key=lambda item: (-item[1].samples, item[0]))
    return Overview({status: counts[status] for status in STATUSES}, total, types, dict(by_count))


def _judged(row: dict[str, object], high: str, low: str) -> Judged:
    traced = row["status"] == "ok"
    known = row["correct"] is not None
    return Judged(
        samples=1,
        traced=int(traced),
        known=int(known),
        right=int(known and bool(row["correct"])),
        high=float(row[high]) if traced else 0.0,  # type: ignore[arg-type]
        low=float(row[low]) if traced else 0.0,  # type: ignore[arg-type]
        vanishing=int(traced and bool(row["total_effect_vanishes"])),
    )
