"""The attention kernels themselves, on the emulator with bare pointers: strides, heads of any size, prefixes,
groups on both sides of every choice of a kernel, and what is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from cuda_pointers import PLACES, AttendStates, Attention, Memory, Place, far_apart, launched, near, places
from test_gpu_ops import TYPES
from test_ops import starts
from torch import Tensor

INF, NAN = math.inf, math.nan


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=PLACES)
def memory(request: pytest.FixtureRequest) -> Memory:
    return Memory(request.param)


class Groups(NamedTuple):
    """What `attention` works on."""

    heads: int
    size: int  # of a head
    queries: list[int]  # of every group
    keys: list[int]
    prefixes: list[tuple[int, int]] | None = None
    causal: bool = False


LONG = [1, 16, 0, 17, 130]
"""Groups long enough on average for four warps to share a tile, and..."""
SHORT = [*LONG, 1, 1]
"""... for a tile to each warp."""
BEFORE = [(0, 0), (0, 1), (5, 12), (34, 20), (0, 17), (120, 33), (0, 0)]
"""Rows of keys that stand before those of each group."""

CASES = {
    "5-long-causal": Groups(3, 5, LONG, LONG, None, True),
    "24-short-causal": Groups(2, 24, SHORT, SHORT, None, True),
    "24-long": Groups(1, 24, LONG, [9, 1, 5, 77, 64], BEFORE[:5]),
    "64-long-prefix-causal": Groups(2, 64, LONG, LONG, BEFORE[:5], True),
    "64-short": Groups(1, 64, SHORT, [70, 2, 9, 16, 33, 65, 1]),
    "72-short-prefix": Groups(1, 72, SHORT, SHORT, BEFORE),
    "72-long": Groups(1, 72, LONG, LONG),
    "128-long-causal": Groups(1, 128, LONG, LONG, None, True),
    "128-short-prefix-causal": Groups(1, 128, SHORT, SHORT, BEFORE, True),
    "prefix-alone": Groups(3, 8, [17, 2, 30], [0, 65, 4], [(1, 64), (0, 0), (60, 9)]),
    "many-groups": Groups(1, 16, [0, 1, 2] * 400, [0, 1, 2] * 400, None, True),
}
EXTRA = {Place.ALIGNED: (8, 16, 24, 40), Place.LAST: (3, 1, 5, 2), Place.ODD: (8, 24, 16, 40)}


def attended(query: Tensor, key: Tensor, value: Tensor, groups: Groups, scale: float) -> Tensor:
    """query [rows, heads * size], key and value [all keys, heads * size]: [rows, heads * size]."""
    out = torch.zeros(query.shape, dtype=query.dtype)
    marks, key_marks = starts(groups.queries).tolist(), starts(groups.keys).tolist()
    for g in range(len(groups.queries)):
        first, count = (0, 0) if groups.prefixes is None else groups.prefixes[g]
        rows = [*range(first, first + count), *range(key_marks[g], key_marks[g + 1])]
        own = slice(marks[g], marks[g + 1])
        q, k, v = (
            x.unflatten(1, (groups.heads, groups.size)).transpose(0, 1)
            for x in (query[own], key[rows], value[rows])
        )
        scores = q @ k.transpose(1, 2) * scale  # [heads, rows, keys]
        if groups.causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1 + count), -INF)
        out[own] = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return out


def attend(
    memory: Memory,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    groups: Groups,
    scale: float,
    extra: Sequence[int] = (0, 0, 0, 0),
    floor: float = 3e-7,
) -> None:
    """Run the kernel and compare. `extra`: between two rows, of query, key, value and out."""
    q, k, v = (memory.put(x, e) for x, e in zip((query, key, value), extra, strict=False))
    out = memory.room(query.shape, query.dtype, extra[3])
    before = None if groups.prefixes is None else memory.put(torch.tensor(groups.prefixes, dtype=torch.int32))
    memory.launch(
        Attention(
            type=query.dtype, query=q, key=k, value=v, out=out, query_stride=q.stride(0),
            key_stride=k.stride(0), value_stride=v.stride(0), out_stride=out.stride(0),
            query_starts=memory.put(starts(groups.queries)), key_starts=memory.put(starts(groups.keys)),
            prefixes=before, rows=len(query), groups=len(groups.queries), heads=groups.heads,
            head_size=groups.size, scale=scale, causal=groups.causal,
        )
    )  # fmt: skip
    near(out, lambda t: attended(query.to(t), key.to(t), value.to(t), groups, scale), floor)


def drawn(groups: Groups, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    cols, keys = groups.heads * groups.size, sum(groups.keys)
    query, key, value = (torch.randn(rows, cols).to(dtype) for rows in (sum(groups.queries), keys, keys))
    return query, key, value


@pytest.mark.parametrize("name", CASES)
@TYPES
def test_attention(memory: Memory, name: str, dtype: torch.dtype) -> None:
    groups = CASES[name]
    extra = EXTRA.get(memory.place, (0, 0, 0, 0))
    attend(memory, *drawn(groups, dtype), groups, 1.5 / math.sqrt(groups.size), extra)


@pytest.mark.parametrize("odd", range(4))
@TYPES
def test_attention_of_one_odd_address_or_stride(odd: int, dtype: torch.dtype) -> None:
    groups = Groups(2, 24, [3, 17], [5, 20])
    extra = [16, 8, 24, 40]
    attend(Memory(Place.ALIGNED, odd), *drawn(groups, dtype), groups, 0.3, extra)
    extra[odd] += 2
    attend(Memory(Place.ALIGNED), *drawn(groups, dtype), groups, 0.3, extra)


@pytest.mark.parametrize("name", ["24-short-causal", "64-long-prefix-causal", "24-long", "64-short"])
@TYPES
@places(Place.ALIGNED, Place.ODD)
def test_attention_whose_scores_are_far_below_zero(memory: Memory, name: str, dtype: torch.dtype) -> None:
    """A key that is not there must count as -infinity: a score of zero would be all that is left."""
    groups = CASES[name]
    query, key, value = drawn(groups, dtype)
    query[:, :: groups.size], key[:, :: groups.size] = -200, 0.5
    # a float32 of 100 is off by up to 2^-18, its exponential as much
    attend(memory, query, key, value, groups, 1.0, floor=2**-15)


@pytest.mark.parametrize(
    ("place", "groups"),
    [
        (Place.ALIGNED, Groups(132, 8, [130, 129], [130, 129], None, True)),
        (Place.LAST, Groups(33, 8, [700, 359], [70, 9])),
    ],
    ids=["many-heads", "many-rows"],
)
def test_attention_on_tiles_of_128_rows(place: Place, groups: Groups) -> None:
    """bfloat16 alone: where they are full and fill a large GPU."""
    attend(Memory(place), *drawn(groups, torch.bfloat16), groups, 0.5, EXTRA[place])


@pytest.mark.parametrize("size", [8, 40])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(
    "lengths", [[9, 70, 40, 66, 5, 20, 17], [9, 30, 7, 20, 5, 20, 17]], ids=["long", "short"]
)
@TYPES
@places(Place.ALIGNED, Place.LAST)
def test_attention_that_is_not_finite(
    memory: Memory, lengths: list[int], causal: bool, size: int, dtype: torch.dtype
) -> None:
    """One trouble to a group, in the first head; it reaches neither the other head nor other groups."""
    groups = Groups(2, size, lengths, lengths, None, causal)
    query, key, value = drawn(groups, dtype)
    at = starts(lengths)
    key[at[1] + 4, 2] = NAN
    query[at[2] + 2, 0] = NAN
    query[at[3] : at[4], 0] = 1
    key[at[3] + 1 : at[4] - 2, 0] = -INF
    value[at[4], 1] = NAN
    query[at[5] : at[6], 0] = 1
    key[at[5] + 3, 0] = INF
    value[at[6], 3] = -INF
    attend(memory, query, key, value, groups, 0.3)


@places(Place.ALIGNED, Place.ODD)
@pytest.mark.parametrize("lengths", [[40], [5]], ids=["long", "short"])
@TYPES
def test_attention_to_nothing_but_minus_infinity(
    memory: Memory, lengths: list[int], dtype: torch.dtype
) -> None:
    groups = Groups(2, 8, lengths, lengths, None, True)
    query, key, value = drawn(groups, dtype)
    query[:, 0] = 1
    key[: lengths[0] - 2, 0] = -INF
    attend(memory, query, key, value, groups, 0.3)


@pytest.mark.parametrize("rows", [5, 40], ids=["short", "long"])
@TYPES
def test_attention_of_rows_far_apart(rows: int, dtype: torch.dtype) -> None:
    """Elements, and bytes, that 32 bits do not count."""
    groups = Groups(1, 8, [rows], [rows])
    stride = 2**33 // dtype.itemsize // rows
    q, k, v, out = (far_apart(rows, 8, stride, dtype) for _ in range(4))
    for x, values in zip((q, k, v), drawn(groups, dtype), strict=True):
        x.copy_(values)
    marks = starts([rows])
    assert launched(
        Attention(
            type=dtype, query=q, key=k, value=v, out=out, query_stride=stride, key_stride=stride,
            value_stride=stride, out_stride=stride, query_starts=marks, key_starts=marks, rows=rows,
            groups=1, heads=1, head_size=8, scale=0.5,
        )
    )  # fmt: skip
    near(out, lambda t: attended(q.to(t), k.to(t), v.to(t), groups, 0.5))


STATES = {  # heads, width, queries and states of every group
    "uneven": (3, 5, [1, 0, 4, 1], [9, 2, 1, 3]),
    "decoder": (12, 768, [1] * 5, [9] * 5),
    "13-heads": (13, 40, [2, 3], [17, 8]),
    "40-heads": (40, 8, [2, 3], [17, 8]),
    "image": (4, 768, [1], [577]),
    "wide": (2, 2056, [1, 2], [13, 1]),
    "one": (1, 1, [1], [4]),
    "1024-columns": (12, 1024, [1, 2], [40, 18]),
    "1032-columns": (3, 1032, [1], [17]),
    # one state more than there is room for
    "1025-states": (5, 24, [1, 1], [1024, 1025]),
    "641-states": (3, 16, [1, 1], [640, 641]),
    "129-states": (9, 16, [1] * 350, [3] * 347 + [129, 128, 5]),
}


def attended_states(
    query: Tensor, states: Tensor, queries: list[int], counts: list[int], scale: float
) -> Tensor:
    """query [heads, rows, width], states [all states, width]: [heads, rows, width]."""
    out = []
    for q, s in zip(query.split(queries, 1), states.split(counts), strict=True):
        out.append((q @ s.T * scale).softmax(-1) @ s)
    return torch.cat(out, 1)


def attend_states(
    memory: Memory,
    query: Tensor,
    states: Tensor,
    queries: list[int],
    counts: list[int],
    scale: float,
    floor: float = 3e-7,
) -> None:
    """Run the kernel and compare."""
    heads, rows, width = query.shape
    out = memory.room(query.shape, query.dtype)
    marks = {"query_starts": memory.put(starts(queries)), "state_starts": memory.put(starts(counts))}
    memory.launch(
        AttendStates(
            type=query.dtype, query=memory.put(query), states=memory.put(states), out=out, **marks,
            rows=rows, groups=len(queries), width=width, heads=heads, scale=scale,
        )
    )  # fmt: skip
    near(out, lambda t: attended_states(query.to(t), states.to(t), queries, counts, scale), floor)


@pytest.mark.parametrize("name", STATES)
@TYPES
def test_attend_states(memory: Memory, name: str, dtype: torch.dtype) -> None:
    heads, width, queries, counts = STATES[name]
    query = torch.randn(heads, sum(queries), width).to(dtype)
    states = torch.randn(sum(counts), width).to(dtype)
    # of more states than there is room for weights, sums are taken one after the other
    floor = 5e-6 if name == "1025-states" else 3e-7
    attend_states(memory, query, states, queries, counts, 1.5 / math.sqrt(width), floor)


@pytest.mark.parametrize("odd", range(5))
@TYPES
def test_attend_states_of_one_odd_address(odd: int, dtype: torch.dtype) -> None:
    query, states = torch.randn(5, 3, 24).to(dtype), torch.randn(12, 24).to(dtype)
    attend_states(Memory(Place.ALIGNED, odd), query, states, [1, 2], [5, 7], 0.3)


@pytest.mark.parametrize("name", ["uneven", "13-heads", "641-states"])
@TYPES
@places(Place.ALIGNED, Place.ODD)
def test_attend_states_whose_scores_are_far_below_zero(memory: Memory, name: str, dtype: torch.dtype) -> None:
    """As with `attention`."""
    heads, width, queries, counts = STATES[name]
    query, states = (
        torch.randn(heads, sum(queries), width).to(dtype),
        torch.randn(sum(counts), width).to(dtype),
    )
    query[..., 0], states[:, 0] = -200, 0.5
    attend_states(memory, query, states, queries, counts, 1.0, floor=2**-15)


@pytest.mark.parametrize(("heads", "width", "many"), [(3, 64, 9), (2, 16, 1100), (2, 7, 1100)])
@TYPES
def test_attend_states_that_are_not_finite(
    memory: Memory, heads: int, width: int, many: int, dtype: torch.dtype
) -> None:
    queries, counts = [2, 1, 3, 1], [4, many, 5, many]
    query, states = torch.randn(heads, 7, width).to(dtype), torch.randn(sum(counts), width).to(dtype)
    states[4 + 3, 1] = NAN  # group 1
    query[1, 4, 0] = NAN  # one head of a row of group 2
    states[-many:-2] = 0  # group 3: all its scores but two are -infinity
    states[-many:-2, 0] = -INF
    query[:, 6] = 1
    attend_states(memory, query, states, queries, counts, 0.2)


def test_attend_states_far_behind() -> None:
    """Elements that 32 bits do not count."""
    many = 2**28
    states = far_apart(many + 3, 8, 8, torch.float32)
    states[many:] = torch.randn(3, 8)
    query, out = torch.randn(4, 2, 8), far_apart(8, 8, 8, torch.float32).view(4, 2, 8)
    marks = {"query_starts": starts([0, 2]), "state_starts": starts([many, 3])}
    same = {"type": torch.float32, "rows": 2, "groups": 2, "width": 8, "heads": 4, "scale": 0.7}
    assert launched(AttendStates(query=query, states=states, out=out, **marks, **same))
    near(out, lambda t: attended_states(query.to(t), states[many:].to(t), [2], [3], 0.7))
