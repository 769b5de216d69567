"""Work on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


def side_by_side(work: Callable[[Item], Made], items: Sequence[Item]) -> list[Made]:
    """What `work` makes of each item: for work that leaves Python to others meanwhile, as numpy, Pillow and
    hashlib do. Raises what the first one raises that fails."""
    count = min(len(items), os.cpu_count() or 1)
    if count < 2:
        return [work(item) for item in items]
    parts = [items[n * len(items) // count : (n + 1) * len(items) // count] for n in range(count)]

    def some(part: Sequence[Item]) -> list[Made]:
        return [work(item) for item in part]

    with ThreadPoolExecutor(count) as threads:
        return [made for part in threads.map(some, parts) for made in part]
