"""Synthetic scenes of coloured shapes, and questions whose answers the picture alone decides.

A scene places one to four shapes on a 3 x 3 grid in front of a grey background. Sizes and offsets are
fractions of a grid cell, so one scene can be rendered at 64 x 64 pixels or as a photograph-sized picture.
Everything is drawn from a `random.Random`, so a seed names the same scene, questions and picture on every
machine.

    scene = random_scene(random.Random(7))
    image = scene.render(64)
    for question in questions(scene, random.Random(7)):
        print(question.type, question.text, question.answer)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from random import Random

from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

COLORS: dict[str, RGB] = {
    "red": (215, 30, 35),
    "green": (35, 160, 60),
    "blue": (35, 80, 220),
    "yellow": (245, 220, 40),
    "purple": (140, 45, 185),
    "orange": (245, 130, 25),
}
SHAPES: dict[str, str] = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
}
"""Singular to plural."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
QUESTION_TYPES = ("color", "shape", "position", "count", "presence")
MAX_OBJECTS = 4

# Bicubic enlargement of a few random cells gives structure that survives the model's shrinking to 64 pixels.
_TEXTURE_CELLS = (3, 6, 12, 24)


def _star() -> list[tuple[float, float]]:
    corners = []
    for corner in range(10):
        angle = math.pi * corner / 5
        radius = 1.08 if corner % 2 == 0 else 0.48
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


# Corners in units of the object's radius, y downwards.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -1.0), (1.05, 0.9), (-1.05, 0.9)],
    "star": _star(),
    "cross": [
        (-0.34, -1.0), (0.34, -1.0), (0.34, -0.34), (1.0, -0.34), (1.0, 0.34), (0.34, 0.34),
        (0.34, 1.0), (-0.34, 1.0), (-0.34, 0.34), (-1.0, 0.34), (-1.0, -0.34), (-0.34, -0.34),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class SceneObject:
    """One shape: what it is, which grid cell it stands in, and how it is drawn there."""

    shape: str
    color: str
    row: int
    """0 (top) to 2 (bottom)."""
    column: int
    """0 (left) to 2 (right)."""
    radius: float = 0.4
    """In units of the grid cell's shorter side; up to 0.42 an unshifted shape stays well inside."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Right and down from the cell's centre, in units of the cell's width and height."""
    tint: RGB = (0, 0, 0)
    """Added to the colour's red, green and blue levels."""

    @property
    def position(self) -> str:
        """The cell's name in two words, such as "top left"."""
        return f"{ROWS[self.row]} {COLUMNS[self.column]}"

    @property
    def rgb(self) -> RGB:
        """The colour that is painted: the named colour plus the tint."""
        levels = zip(COLORS[self.color], self.tint, strict=True)
        r, g, b = (min(255, max(0, level + extra)) for level, extra in levels)
        return r, g, b


@dataclass(frozen=True)
class Background:
    """Two greyish colours mixed by a gradient and a cloudy texture, and the grain over the whole picture."""

    colors: tuple[RGB, RGB] = ((120, 120, 120), (120, 120, 120))
    turns: int = 0
    """The gradient's direction in quarter turns."""
    texture: float = 0.0
    """0: the gradient alone; 1: the clouds alone."""
    grain: float = 0.0
    """How much of the picture is replaced by per-pixel noise, 0 to 1."""
    seed: int = 0
    """Of the clouds and the grain."""


@dataclass(frozen=True)
class Scene:
    """One to four objects, no two alike and no two in one cell of the 3 x 3 grid, and what is behind them.

    No two alike: every object can be named by its colour and shape, so each type of question has an answer.
    """

    objects: tuple[SceneObject, ...]
    background: Background = Background()

    def __post_init__(self) -> None:
        count = len(self.objects)
        if not 1 <= count <= MAX_OBJECTS:
            raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, not {count}")
        if len({(item.row, item.column) for item in self.objects}) < count:
            raise ValueError("two objects stand in one cell")
        if len({(item.color, item.shape) for item in self.objects}) < count:
            raise ValueError("two objects have the same colour and shape")

    def render(self, size: int | tuple[int, int] = 64) -> Image.Image:
        """Draw the scene as an antialiased RGB picture.

        `size` is the side of a square picture or (width, height), in pixels. The grid fills the picture;
        shapes keep their proportions, whatever those of the picture are.
        """
        width, height = (size, size) if isinstance(size, int) else size
        rng = Random(self.background.seed)
        image = _render_background(self.background, (width, height), rng)
        cell = (width / 3, height / 3)
        for item in self.objects:
            center = (
                cell[0] * (item.column + 0.5 + item.shift[0]),
                cell[1] * (item.row + 0.5 + item.shift[1]),
            )
            _paint(image, item, center, item.radius * min(cell))
        if self.background.grain > 0:
            grain = Image.frombytes("RGB", (width, height), rng.randbytes(3 * width * height))
            image = Image.blend(image, grain, self.background.grain)
        return image


@dataclass(frozen=True)
class Question:
    """A question in lower-case words, its only right answer, and one of `QUESTION_TYPES`."""

    text: str
    answer: str
    type: str


def _render_background(background: Background, size: tuple[int, int], rng: Random) -> Image.Image:
    mask = Image.linear_gradient("L").rotate(90 * background.turns).resize(size, Image.Resampling.BILINEAR)
    if background.texture > 0:
        clouds = Image.new("L", size, 128)
        for octave, cells in enumerate(_TEXTURE_CELLS):
            patch = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
            patch = patch.resize(size, Image.Resampling.BICUBIC)
            clouds = patch if octave == 0 else Image.blend(clouds, patch, 0.35)
        mask = Image.blend(mask, clouds, background.texture)
    near, far = (Image.new("RGB", size, color) for color in background.colors)
    return Image.composite(far, near, mask)


def _paint(image: Image.Image, item: SceneObject, center: tuple[float, float], radius: float) -> None:
    """Paint one object through an oversampled mask; Pillow's own drawing has no antialiasing."""
    # Large objects have few edge pixels for their area: less oversampling looks the same and saves memory.
    fine = 4 if radius < 100 else 2
    left, top = (math.floor(coordinate - 1.15 * radius) for coordinate in center)
    side = math.ceil(2.3 * radius) + 1
    mask = Image.new("L", (side * fine, side * fine), 0)
    draw = ImageDraw.Draw(mask)
    x, y, r = (center[0] - left) * fine, (center[1] - top) * fine, radius * fine
    if item.shape == "circle":
        draw.ellipse((x - 0.96 * r, y - 0.96 * r, x + 0.96 * r, y + 0.96 * r), fill=255)
    else:
        draw.polygon([(x + r * u, y + r * v) for u, v in _POLYGONS[item.shape]], fill=255)
    image.paste(item.rgb, (left, top), mask.reduce(fine))


def _random_background(rng: Random) -> Background:
    def greyish() -> RGB:
        grey = rng.randint(45, 205)
        r, g, b = (grey + rng.randint(-14, 14) for _ in range(3))
        return r, g, b

    first = greyish()
    return Background(
        colors=(first, first if rng.random() < 0.25 else greyish()),
        turns=rng.randrange(4),
        texture=rng.choice((0.0, 0.4, 0.8)),
        grain=rng.choice((0.0, 0.05, 0.1)),
        seed=rng.getrandbits(32),
    )


def random_scene(rng: Random) -> Scene:
    """Draw a scene of one to four objects.

    Shapes and colours repeat within a scene more often than chance would have it: otherwise counts above one
    would be rare, and "is there a red circle" could be answered from "is there a circle".
    """
    count = rng.choices(range(1, MAX_OBJECTS + 1), weights=(1, 3, 3, 4))[0]
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        color = rng.choice(looks)[0] if looks and rng.random() < 0.4 else rng.choice(list(COLORS))
        shape = rng.choice(looks)[1] if looks and rng.random() < 0.4 else rng.choice(list(SHAPES))
        if (color, shape) not in looks:
            looks.append((color, shape))
    objects = []
    for (color, shape), cell in zip(looks, rng.sample(range(9), count), strict=True):
        r, g, b = (rng.randint(-12, 12) for _ in range(3))
        objects.append(
            SceneObject(
                shape,
                color,
                row=cell // 3,
                column=cell % 3,
                radius=rng.uniform(0.34, 0.42),
                shift=(rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)),
                tint=(r, g, b),
            )
        )
    return Scene(tuple(objects), _random_background(rng))


def photograph(scene: Scene, size: tuple[int, int] = (1600, 1200)) -> Image.Image:
    """Render a scene as a large picture with cloudy light and sensor grain, as a camera might have seen it.

    `size` is (width, height) in pixels. The model's processor shrinks it to 64 x 64 and so squeezes the
    shapes; the model was trained for that, up to a ratio of 5:3 either way.
    """
    brown, beige = (96, 84, 74), (178, 168, 152)
    background = replace(scene.background, colors=(brown, beige), texture=0.65, grain=0.1)
    return replace(scene, background=background).render(size)


def questions(scene: Scene, rng: Random, *, count_shapes: bool = False) -> list[Question]:
    """Ask one question of each of `QUESTION_TYPES`, in that order; some end in a question mark.

    With `count_shapes`, half of the counts by colour become counts of one shape ("how many circles are
    there"). The shipped model was trained on these too, but is right less often than on all the others.
    """
    writers: tuple[Callable[[Scene, Random], tuple[str, str]], ...] = (
        _ask_color,
        _ask_shape,
        _ask_position,
        partial(_ask_count, count_shapes=count_shapes),
        _ask_presence,
    )
    asked = []
    for kind, write in zip(QUESTION_TYPES, writers, strict=True):
        text, answer = write(scene, rng)
        asked.append(Question(text + ("?" if rng.random() < 0.25 else ""), answer, kind))
    return asked


def _unique_names(scene: Scene, item: SceneObject) -> list[str]:
    """Phrases that mean this object and no other, by its shape, its colour or both."""
    names = [f"{item.color} {item.shape}"]
    if [other.shape for other in scene.objects].count(item.shape) == 1:
        names.append(item.shape)
    if [other.color for other in scene.objects].count(item.color) == 1:
        names.append(f"{item.color} shape")
    return names


def _ask_color(scene: Scene, rng: Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    names = [f"shape at the {item.position}"]
    # A name with the colour in it would give the answer away.
    if item.shape in _unique_names(scene, item):
        names += [item.shape] * 2
    what = rng.choice(("what color is the", "what is the color of the"))
    return f"{what} {rng.choice(names)}", item.color


def _ask_shape(scene: Scene, rng: Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    texts = [f"what shape is at the {item.position}"]
    if f"{item.color} shape" in _unique_names(scene, item):
        texts += [f"what shape is {item.color}", f"which shape is {item.color} in the picture"]
    return rng.choice(texts), item.shape


def _ask_position(scene: Scene, rng: Random) -> tuple[str, str]:
    item = rng.choice(scene.objects)
    where = rng.choice(("where is the", "where in the picture is the"))
    return f"{where} {rng.choice(_unique_names(scene, item))}", item.position


def _ask_count(scene: Scene, rng: Random, *, count_shapes: bool) -> tuple[str, str]:
    there = rng.choice(("are there", "are there in the picture"))
    if rng.random() < 0.25:
        return f"how many shapes {there}", str(len(scene.objects))
    if count_shapes and rng.random() < 0.5:
        found = Counter(item.shape for item in scene.objects)
        phrases = {plural: found[shape] for shape, plural in SHAPES.items()}
    else:
        found = Counter(item.color for item in scene.objects)
        phrases = {f"{color} shapes": found[color] for color in COLORS}
    # Choosing the number first, large ones preferred, keeps "0" and "1" from being nearly always right.
    numbers = sorted(set(phrases.values()))
    number = rng.choices(numbers, weights=[n + 1 for n in numbers])[0]
    phrase = rng.choice([phrase for phrase, n in phrases.items() if n == number])
    return f"how many {phrase} {there}", str(number)


def _ask_presence(scene: Scene, rng: Random) -> tuple[str, str]:
    """Decide yes or no first, so that the question's words say nothing about the answer."""
    present = rng.random() < 0.5
    answer = "yes" if present else "no"
    shapes = {item.shape for item in scene.objects}
    colors = {item.color for item in scene.objects}
    pairs = {(item.color, item.shape) for item in scene.objects}
    where = rng.choice(("", " in the picture"))
    kind = rng.choice(("shape", "color", "pair", "pair", "position"))
    if kind == "position":
        filled = {item.position for item in scene.objects}
        places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
        place = rng.choice([place for place in places if (place in filled) == present])
        return f"is there a shape at the {place}", answer
    if kind == "shape":
        noun = rng.choice([shape for shape in SHAPES if (shape in shapes) == present])
    elif kind == "color":
        noun = f"{rng.choice([color for color in COLORS if (color in colors) == present])} shape"
    else:
        # A "no" about a colour or a shape that is there, on another object, is not seen at a glance.
        near = {(c, s) for c in COLORS for s in SHAPES if c in colors or s in shapes} - pairs
        noun = " ".join(rng.choice(sorted(pairs if present else near)))
    article = "an" if noun.startswith("orange") else "a"
    return f"is there {article} {noun}{where}", answer


def vocabulary() -> list[str]:
    """Every word piece that questions and answers need, sorted; plurals are a word and "##s" or "##es"."""
    asking = {"what", "which", "where", "how", "many", "is", "are", "there", "color", "shape", "picture"}
    small = {"a", "an", "the", "of", "at", "in", "yes", "no"}
    digits = [str(number) for number in range(MAX_OBJECTS + 1)]
    return sorted({*asking, *small, *digits, *COLORS, *SHAPES, *ROWS, *COLUMNS, "##s", "##es", "?"})
