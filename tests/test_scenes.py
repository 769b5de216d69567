"""Scenes are reproducible, their answers are true of the picture, and the shipped model knows them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, BlipForQuestionAnswering, BlipProcessor

import blip_trace
from blip_trace.scenes import (
    COLORS,
    QUESTION_TYPES,
    SHAPES,
    Background,
    Question,
    Scene,
    SceneObject,
    photograph,
    questions,
    random_scene,
)

MODEL = Path(blip_trace.__file__).parent / "assets" / "blip-shapes"
FIRST_OBJECTS = [
    ("purple", "star", "top right"),
    ("red", "star", "bottom right"),
    ("green", "star", "middle left"),
]
FIRST_QUESTIONS = [
    ("what color is the shape at the middle left", "green"),
    ("which shape is red in the picture", "star"),
    ("where is the green shape", "middle left"),
    ("how many yellow shapes are there?", "0"),
    ("is there a green cross", "no"),
]


def drawn(count: int, count_shapes: bool = False) -> list[tuple[Scene, list[Question]]]:
    """Scenes from a stream that neither training nor the model card's evaluation used."""
    pairs = []
    for number in range(count):
        rng = Random(f"tests/{number}")
        scene = random_scene(rng)
        pairs.append((scene, questions(scene, rng, count_shapes=count_shapes)))
    return pairs


@pytest.fixture(scope="module")
def processor() -> Any:
    return BlipProcessor.from_pretrained(MODEL, backend="pil")


@pytest.fixture(scope="module")
def model() -> BlipForQuestionAnswering:
    model, info = BlipForQuestionAnswering.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def generate(model: Any, processor: Any, image: Any, text: str) -> str:
    """Answer as any user of plain transformers would."""
    inputs = processor(images=image, text=text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    return str(processor.decode(ids[0], skip_special_tokens=True))


@pytest.mark.parametrize("size", [64, (150, 100)])
def test_seed_names_scene_questions_and_picture(size: int | tuple[int, int]) -> None:
    (scene, asked), (again, asked_again) = drawn(1)[0], drawn(1)[0]
    assert scene == again
    assert asked == asked_again
    assert scene.render(size).tobytes() == again.render(size).tobytes()
    assert scene.render(size).size == ((64, 64) if size == 64 else size)


def test_streams_do_not_depend_on_the_machine() -> None:
    """Strings seed `Random` by SHA-512, not by the process's own hash: this is the first scene anywhere."""
    scene, asked = drawn(1)[0]
    assert [(item.color, item.shape, item.position) for item in scene.objects] == FIRST_OBJECTS
    assert [(question.text, question.answer) for question in asked] == FIRST_QUESTIONS


@pytest.mark.parametrize("size", [(96, 96), (240, 160), (160, 240)])
def test_objects_are_painted_in_their_cells(size: tuple[int, int]) -> None:
    for scene, _ in drawn(20):
        image = scene.render(size)
        for item in scene.objects:
            center = tuple(
                int(side / 3 * (cell + 0.5 + shift))
                for side, cell, shift in zip(size, (item.column, item.row), item.shift, strict=True)
            )
            pixel = image.getpixel(center)
            # Grain replaces a tenth of a level at most: 26 of 256.
            assert max(abs(a - b) for a, b in zip(pixel, item.rgb, strict=True)) <= 26


def test_edges_are_antialiased() -> None:
    scene = Scene((SceneObject("circle", "red", 1, 1),), Background())
    colors = scene.render(64).getcolors()
    assert colors is not None
    assert len(colors) > 8


def test_answers_are_true_of_the_scene() -> None:
    nouns = {*SHAPES, *SHAPES.values()}
    types: dict[str, set[str]] = defaultdict(set)
    for scene, asked in drawn(400, count_shapes=True):
        assert [question.type for question in asked] == list(QUESTION_TYPES)
        for question in asked:
            words = question.text.rstrip("?").split()
            types[question.type].add(question.answer)
            # The objects that fit every describing word of the question.
            fitting = [
                item
                for item in scene.objects
                if all(word in (item.shape, SHAPES[item.shape]) for word in words if word in nouns)
                and all(word == item.color for word in words if word in COLORS)
                and (" at the " not in question.text or " ".join(words).endswith(item.position))
            ]
            if question.type == "count":
                assert question.answer == str(len(fitting)), question
            elif question.type == "presence":
                assert question.answer == ("yes" if fitting else "no"), question
            else:
                (item,) = fitting
                assert question.answer == getattr(item, question.type), question
    assert types == {
        "color": set(COLORS),
        "shape": set(SHAPES),
        "position": {
            f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right")
        },
        "count": set("01234"),
        "presence": {"yes", "no"},
    }


def test_presence_is_not_decided_by_the_question() -> None:
    answers = [asked[-1].answer for _, asked in drawn(1000)]
    assert 0.45 < answers.count("yes") / len(answers) < 0.55


def test_impossible_scenes_are_refused() -> None:
    red = SceneObject("circle", "red", 0, 0)
    with pytest.raises(ValueError, match="1 to 4 objects"):
        Scene(())
    with pytest.raises(ValueError, match="one cell"):
        Scene((red, SceneObject("square", "red", 0, 0)))
    with pytest.raises(ValueError, match="same colour and shape"):
        Scene((red, SceneObject("circle", "red", 0, 1)))


def test_tokenizer_knows_every_word(processor: Any) -> None:
    tokenizer = processor.tokenizer
    lengths = set()
    for _, asked in drawn(500, count_shapes=True):
        for question in asked:
            ids = tokenizer(question.text).input_ids
            lengths.add(len(ids))
            answer = tokenizer(question.answer, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids + answer, question
            assert len(answer) == (2 if question.type == "position" else 1)
            assert tokenizer.decode(answer) == question.answer
    assert len(lengths) >= 7


def test_model_answers_held_out_questions(model: BlipForQuestionAnswering, processor: Any) -> None:
    scenes = drawn(40)
    images = [scene.render(64) for scene, _ in scenes]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values  # [scenes, 3, 64, 64]
    by_length: dict[int, list[tuple[int, list[int], Question]]] = defaultdict(list)
    for number, (_, asked) in enumerate(scenes):
        for question in asked:
            ids = processor.tokenizer(question.text).input_ids
            by_length[len(ids)].append((number, ids, question))
    wrong = []
    # A batch of one length has no padding, which transformers' BLIP would attend to.
    for members in by_length.values():
        ids = model.generate(
            input_ids=torch.tensor([ids for _, ids, _ in members]),
            pixel_values=pixels[[number for number, _, _ in members]],
            max_new_tokens=4,
            do_sample=False,
        )
        answers = processor.batch_decode(ids, skip_special_tokens=True)
        wrong += [
            (question, answer)
            for (_, _, question), answer in zip(members, answers, strict=True)
            if answer != question.answer
        ]
    assert len(wrong) <= 0.02 * 200, wrong


def test_model_answers_about_a_photograph(model: BlipForQuestionAnswering) -> None:
    processor = AutoProcessor.from_pretrained(MODEL, backend="pil")
    scene = Scene(
        (
            SceneObject("circle", "red", 0, 0),
            SceneObject("star", "blue", 1, 2),
            SceneObject("cross", "red", 2, 1),
        )
    )
    image = photograph(scene)
    assert image.size == (1600, 1200)
    expected = {
        "what color is the star": "blue",
        "what shape is at the bottom center": "cross",
        "where is the red circle": "top left",
        "how many red shapes are there": "2",
        "is there a blue circle": "no",
    }
    assert {text: generate(model, processor, image, text) for text in expected} == expected
