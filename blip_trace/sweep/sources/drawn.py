"""Scenes that are drawn when they are asked for: a set of any size that takes no space."""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from ...scenes import questions, random_scene
from ..media import Media
from ..sample import Sample
from .dataset import DataSet, make_sample

NAME = "scenes"
LOOKS = "scenes:COUNT or scenes:COUNT:SEED"
MAX_SCENES = 10**6
"""Of one seed; scene i of seed s is drawn from the seed s * MAX_SCENES + i."""

_SCENES = re.compile(r"scenes:(\d{1,12})(?::(\d{1,9}))?")


def open_scenes(path: str) -> DataSet:
    """The data set that `scenes:COUNT` or `scenes:COUNT:SEED` names: five questions about each scene."""
    named = _SCENES.fullmatch(path)
    if named is None or not 1 <= int(named[1]) <= MAX_SCENES:
        raise ValueError(f"{path!r} names no scenes: write {LOOKS}, with COUNT from 1 to {MAX_SCENES:,}")
    count, seed = int(named[1]), int(named[2] or 0)
    return DataSet(NAME, path, Media(None), lambda: _samples(count, seed))


def _samples(count: int, seed: int) -> Iterator[Sample]:
    for number in range(seed * MAX_SCENES, seed * MAX_SCENES + count):
        for question in questions(random_scene(Random(number)), Random(number)):
            id = f"{number}-{question.type}"
            yield make_sample(
                id, id, f"scene:{number}", question.text, answers=[question.answer], type=question.type
            )
