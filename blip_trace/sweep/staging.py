"""Any number of samples put in order on disk: ids made unique, a part drawn, those on one image together."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from .sample import Sample

LARGEST = 2**256 - 1


@dataclass(frozen=True)
class Selected:
    """How many samples there are, and a digest of all of them that does not depend on their order."""

    samples: int
    digest: int


class Staging:
    """Samples of a data set, on disk."""

    def __init__(self, database: sqlite3.Connection, seed: int) -> None:
        self._database = database
        self._seed = seed
        database.execute(
            "CREATE TABLE samples"
            " (position INTEGER PRIMARY KEY, id TEXT UNIQUE, pick BLOB, place BLOB, row TEXT)"
        )

    def fill(self, samples: Iterable[Sample]) -> None:
        """Take samples in. One whose id was there before is called id#2, id#3, … in its data set's order."""
        again: Counter[str] = Counter()
        for position, given in enumerate(samples):
            sample = _storable(given)
            wanted = sample.id
            while not self._insert(position, sample):
                again[wanted] += 1
                sample = replace(sample, id=f"{wanted}#{again[wanted] + 1}")

    def _insert(self, position: int, sample: Sample) -> bool:
        row = to_json(sample)
        values = (position, sample.id, self._hash(sample.id), self._hash(sample.image), row)
        return (
            self._database.execute("INSERT OR IGNORE INTO samples VALUES (?, ?, ?, ?, ?)", values).rowcount
            == 1
        )

    def draw(self, limit: int | None) -> Selected:
        """Keep `limit` samples, drawn at random by the seed, and forget the others; None: keep all."""
        if limit is not None:
            self._database.execute(
                "DELETE FROM samples WHERE id NOT IN (SELECT id FROM samples ORDER BY pick, id LIMIT ?)",
                (limit,),
            )
        count, digest = 0, 0
        for (row,) in self._database.execute("SELECT row FROM samples"):
            count += 1
            digest = add_digests(digest, row_digest(row))
        return Selected(count, digest)

    def forget(self, rows: Iterable[Sample]) -> list[str]:
        """Drop samples that are the same as these; returns the ids of those that are not there, or not the
        same."""
        changed = []
        for sample in rows:
            found = self._database.execute(
                "DELETE FROM samples WHERE id = ? AND row = ?", (sample.id, to_json(sample))
            )
            if not found.rowcount:
                changed.append(sample.id)
        return changed

    def counts(self) -> tuple[int, int]:
        """Distinct images, and samples that have a problem."""
        (images,) = self._database.execute("SELECT COUNT(DISTINCT place) FROM samples").fetchone()
        (problems,) = self._database.execute(
            "SELECT COUNT(*) FROM samples WHERE json_extract(row, '$.problem') IS NOT NULL"
        ).fetchone()
        return images, problems

    def first_problem(self) -> str | None:
        """Why the first sample that has a problem cannot be traced."""
        found = self._database.execute(
            "SELECT json_extract(row, '$.problem') AS problem FROM samples WHERE problem IS NOT NULL"
            " ORDER BY position LIMIT 1"
        ).fetchone()
        return None if found is None else str(found[0])

    def ordered(self) -> Iterator[Sample]:
        """All samples: images in an order that the seed shuffles, so that any first part of a run is a random
        part of the data set, and the samples of an image in that of the data set."""
        for (row,) in self._database.execute("SELECT row FROM samples ORDER BY place, position"):
            yield from_json(row)

    def _hash(self, text: str) -> bytes:
        key = self._seed.to_bytes(8, "little", signed=True)
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()


@contextmanager
def staging(folder: Path, seed: int) -> Iterator[Staging]:
    """A place for samples on disk, gone afterwards. Raises OSError where there is no room for them."""
    descriptor, name = tempfile.mkstemp(prefix=".staging.", suffix=".part", dir=folder)
    os.close(descriptor)
    database = sqlite3.connect(name, isolation_level=None)
    try:
        # nothing in it has to outlive this process
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; BEGIN")
        yield Staging(database, seed)
    except sqlite3.Error as error:
        raise OSError(f"samples cannot be put in order in {folder}: {error}") from error
    finally:
        database.close()
        Path(name).unlink(missing_ok=True)


def to_json(sample: Sample) -> str:
    """A sample as one line, the same for equal samples."""
    return json.dumps({**vars(sample), "extra": dict(sample.extra)}, sort_keys=True)


def from_json(text: str) -> Sample:
    """What `to_json` wrote."""
    given = json.loads(text)
    return Sample(**{**given, "answers": tuple(given["answers"])})


def _storable(sample: Sample) -> Sample:
    """Without halves of characters (lone surrogates), which no file can hold."""
    row = json.dumps({**vars(sample), "extra": dict(sample.extra)}, ensure_ascii=False)
    try:
        row.encode()
    except UnicodeEncodeError:
        return from_json(row.encode("utf-8", "replace").decode())
    return sample


def row_digest(row: str) -> int:
    """Of one sample."""
    return int.from_bytes(hashlib.sha256(row.encode()).digest(), "little")


def add_digests(one: int, other: int) -> int:
    """Of two sets of samples that have none in common."""
    return (one + other) & LARGEST
