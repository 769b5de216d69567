"""What is kept of what was made before."""

from __future__ import annotations

import pytest

from blip_trace.cache import Cache


def test_what_was_asked_for_longest_ago_goes() -> None:
    made: list[str] = []

    def value(key: str, cache: Cache[str]) -> str:
        return cache.get(key[0], lambda: made.append(key) or key)  # type: ignore[func-returns-value]

    cache = Cache[str](limit=6, size=len)
    for key in ("aaa", "bbb", "aaa", "ccc", "aaa", "bbb"):
        assert value(key, cache) == key
    assert made == ["aaa", "bbb", "ccc", "bbb"]
    assert value("x" * 100, cache) == value("x" * 100, cache)  # too large, but the last one
    assert value("aaa", cache) == "aaa"
    assert made[4:] == ["x" * 100, "aaa"]
    cache.clear()
    value("aaa", cache)
    assert made[6:] == ["aaa"]


def test_what_could_not_be_made_is_made_again() -> None:
    cache = Cache[int](limit=8, size=lambda _: 1)
    with pytest.raises(ZeroDivisionError):
        cache.get("a", lambda: 1 // 0)
    assert cache.get("a", lambda: 3) == 3
