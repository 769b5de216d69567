"""Captions of scenes, statements about them, and false texts that differ from true ones in one word.

scene = random_scene(random.Random(7))
caption(scene.objects)                  # every object: the only caption of the scene
text = statement(scene, random.Random(7))  # a true text about some of it
mismatch(text, scene, random.Random(7))    # the same with one word wrong, and what kind of word that is
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from random import Random

from .scenes import COLORS, COLUMNS, ROWS, SHAPES, Scene, SceneObject

CAPTION_WORDS = ("and", "above", "below")
"""What these texts need beyond `scenes.vocabulary()`."""
MISMATCH_TYPES = ("color", "shape", "relation", "position")
_OPPOSITES = {"above": "below", "below": "above", "left": "right", "right": "left"}


def caption(objects: Iterable[SceneObject], *, upwards: bool = False) -> str:
    """Name objects row by row from the top, each row from the left.

    Such as "a red circle and a blue square above an orange star": "and" joins those of one row, "above" the
    rows. With `upwards` the rows come from the bottom and "below" joins them.
    """
    ordered = sorted(objects, key=lambda item: (-item.row if upwards else item.row, item.column))
    rows = groupby(ordered, key=lambda item: item.row)
    join = " below " if upwards else " above "
    return join.join(
        " and ".join(f"{_article(item.color)} {item.color} {item.shape}" for item in row) for _, row in rows
    )


def statement(scene: Scene, rng: Random) -> str:
    """Draw a true text about a scene: a caption of some of its objects, or where one of them stands.

    The latter by its cell, "the red circle is at the top left", or relative to another object, "the red
    circle is left of the blue square".
    """
    kind = rng.choice(("caption", "position", "relation", "relation"))
    if kind == "relation" and len(scene.objects) > 1:
        first, second = rng.sample(scene.objects, 2)
        return f"{_the(first)} is {rng.choice(_relations(first, second))} {_the(second)}"
    if kind == "position":
        item = rng.choice(scene.objects)
        return f"{_the(item)} is at the {item.position}"
    some = rng.sample(scene.objects, rng.randint(1, len(scene.objects)))
    return caption(some, upwards=rng.random() < 0.5)


def mismatch(text: str, scene: Scene, rng: Random) -> tuple[str, str]:
    """Change one word of a text that is true of a scene, so that it is false: the new text and the kind of
    word, one of `MISMATCH_TYPES`.

    A new colour or shape makes an object that is not in the scene; a relation is turned round; a position
    gets another row or column. Articles stay as they are, so "orange" comes and goes after "the" alone.

    Raises ValueError where the text holds no such word.
    """
    words = text.split()
    looks = {(item.color, item.shape) for item in scene.objects}
    choices: dict[str, list[tuple[int, str]]] = {kind: [] for kind in MISMATCH_TYPES}
    for place, word in enumerate(words):
        before = words[place - 1] if place > 0 else ""
        after = words[place + 1] if place + 1 < len(words) else ""
        if word in COLORS:
            fitting = [new for new in COLORS if before == "the" or _article(new) == _article(word)]
            choices["color"] += [(place, new) for new in fitting if (new, after) not in looks]
        elif word in SHAPES:
            choices["shape"] += [(place, new) for new in SHAPES if (before, new) not in looks]
        elif word in ("above", "below") or after == "of":
            choices["relation"].append((place, _OPPOSITES[word]))
        else:
            for names in (ROWS, COLUMNS):
                choices["position"] += [(place, new) for new in names if word in names and new != word]
    kinds = [kind for kind, changes in choices.items() if changes]
    if not kinds:
        raise ValueError(f"no word of {text!r} makes it false when changed")
    kind = rng.choice(kinds)
    place, words[place] = rng.choice(choices[kind])
    return " ".join(words), kind


def _article(word: str) -> str:
    return "an" if word.startswith("o") else "a"


def _the(item: SceneObject) -> str:
    return f"the {item.color} {item.shape}"


def _relations(first: SceneObject, second: SceneObject) -> Sequence[str]:
    relations = []
    if first.row != second.row:
        relations.append("above" if first.row < second.row else "below")
    if first.column != second.column:
        relations.append("left of" if first.column < second.column else "right of")
    return relations
