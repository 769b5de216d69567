"""Captions and statements are true and mismatches false; the shipped models that know them are right."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipProcessor

from blip_trace.captions import CAPTION_WORDS, MISMATCH_TYPES, caption, mismatch, statement
from blip_trace.lowering.load import SHIPPED, load_model, shipped_model
from blip_trace.scenes import COLORS, COLUMNS, ROWS, SHAPES, Scene, SceneObject, random_scene, vocabulary

MODELS = {"caption": BlipForConditionalGeneration, "match": BlipForImageTextRetrieval}
KINDS = {
    "color": set(COLORS),
    "shape": set(SHAPES),
    "relation": {"above", "below", "left", "right"},
    "position": {*ROWS, *COLUMNS},
}


def drawn(count: int) -> Iterable[tuple[Scene, Random]]:
    """Scenes from a stream that neither training nor the model cards' evaluation used."""
    for number in range(count):
        rng = Random(f"tests/{number}")
        yield random_scene(rng), rng


def find(name: str, scene: Scene) -> SceneObject | None:
    """The object that "red circle" or "a red circle" names."""
    return next((item for item in scene.objects if name.split()[-2:] == [item.color, item.shape]), None)


def is_true(text: str, scene: Scene) -> bool:
    """Decide a statement or a caption by its words alone."""
    parts = re.fullmatch("the (.+) is (.+) the (.+)", text)
    if parts:
        item, other = find(parts[1], scene), find(parts[3], scene)
        if parts[2] == "at":
            return item is not None and item.position == parts[3]
        if item is None or other is None:
            return False
        return {
            "above": item.row < other.row,
            "below": item.row > other.row,
            "left of": item.column < other.column,
            "right of": item.column > other.column,
        }[parts[2]]
    joined = re.split(" (above|below) ", text)
    named = [[find(name, scene) for name in row.split(" and ")] for row in joined[::2]]
    rows = [{item.row if item else None for item in row} for row in named]
    if any(len(row) > 1 or None in row for row in rows):
        return False
    numbers = [row.pop() for row in rows]
    return all(
        first < second if word == "above" else first > second
        for word, first, second in zip(joined[1::2], numbers, numbers[1:], strict=False)
    )


def names(scene: Scene) -> list[str]:
    return [f"{item.color} {item.shape}" for item in scene.objects]


def test_a_caption_by_hand() -> None:
    objects = (
        SceneObject("star", "orange", 2, 0),
        SceneObject("square", "blue", 0, 2),
        SceneObject("circle", "red", 0, 1),
    )
    assert caption(objects) == "a red circle and a blue square above an orange star"
    assert caption(objects, upwards=True) == "an orange star below a red circle and a blue square"
    assert caption(objects[:1]) == "an orange star"


def test_captions_are_true_and_complete() -> None:
    for scene, rng in drawn(300):
        text = caption(scene.objects)
        assert text == caption(rng.sample(scene.objects, len(scene.objects)))
        assert is_true(text, scene), text
        assert is_true(caption(scene.objects, upwards=True), scene), text
        found = re.findall(r"\ban? (\w+ \w+)", text)
        assert sorted(found) == sorted(names(scene))
        items = [find(name, scene) for name in found]
        places = [(item.row, item.column) for item in items if item]
        assert places == sorted(places)
        assert "below" not in text


def test_mismatches_are_false_in_one_word() -> None:
    counts: Counter[str] = Counter()
    for scene, rng in drawn(1000):
        text = statement(scene, rng)
        assert is_true(text, scene), text
        false, kind = mismatch(text, scene, rng)
        assert not is_true(false, scene), (text, false)
        changed = [pair for pair in zip(text.split(), false.split(), strict=True) if len(set(pair)) > 1]
        assert len(changed) == 1, (text, false)
        assert set(changed[0]) <= KINDS[kind], (text, false, kind)
        assert not re.search(r"\ba o|\ban [^o]", text + ", " + false)
        # naming one thing twice would show without the picture
        looks = re.findall(r"(?:\ban?|\bthe) (\w+ (?!left|center|right)\w+)", false)
        assert len(set(looks)) == len(looks), false
        counts[kind] += 1
    assert set(counts) == set(MISMATCH_TYPES)
    assert min(counts.values()) >= 50, counts


def test_a_text_that_names_nothing_has_no_mismatch() -> None:
    scene = Scene((SceneObject("circle", "red", 0, 0),))
    with pytest.raises(ValueError, match="makes it false"):
        mismatch("is there a picture", scene, Random(0))


@cache
def loaded(name: str) -> tuple[Any, Any]:
    """A shipped model and its processor, as users of plain transformers load them."""
    folder = shipped_model(name)
    model, info = MODELS[name].from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval(), BlipProcessor.from_pretrained(folder, backend="pil")


def test_unknown_names_are_refused() -> None:
    assert shipped_model() == shipped_model("vqa")
    with pytest.raises(ValueError, match="choose among vqa, caption, match"):
        shipped_model("captions")


@pytest.mark.parametrize("name", MODELS)
def test_shipped_models_load(name: str) -> None:
    model, processor = load_model(shipped_model(name), torch.float32)
    assert type(model) is MODELS[name]
    plain, _ = loaded(name)
    state = plain.state_dict()
    assert all(torch.equal(weight, state[key]) for key, weight in model.state_dict().items())
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.text_config.vocab_size
    _, vqa = load_model(shipped_model(), torch.float32)
    known = vqa.tokenizer.get_vocab()
    assert {word: tokenizer.get_vocab()[word] for word in known} == known
    for word in (*vocabulary(), *CAPTION_WORDS):
        assert tokenizer.convert_tokens_to_ids(word) != tokenizer.unk_token_id
    assert processor.image_processor.size == vqa.image_processor.size


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_small_and_safe(name: str) -> None:
    files = [path for path in shipped_model(name).rglob("*") if path.is_file()]
    assert "README.md" in {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    assert {path.suffix for path in files} <= {".json", ".md", ".safetensors"}
    for path in files:
        if path.suffix == ".json":
            text = path.read_text()
            json.loads(text)
            assert "name_or_path" not in text, path
            assert not re.search("/(work|tmp|home|root)/", text), path


def test_captions_of_held_out_scenes() -> None:
    model, processor = loaded("caption")
    scenes = [scene for scene, _ in drawn(50)]
    pixels = processor(images=[scene.render(64) for scene in scenes], return_tensors="pt").pixel_values
    ids = model.generate(pixel_values=pixels, max_new_tokens=20, do_sample=False)
    assert ids[:, 0].unique().tolist() == [model.config.text_config.bos_token_id]
    written = processor.batch_decode(ids, skip_special_tokens=True)
    wrong = [
        (text, caption(scene.objects))
        for text, scene in zip(written, scenes, strict=True)
        if text != caption(scene.objects)
    ]
    assert len(wrong) <= 0.05 * 50, wrong


def test_a_prompt_is_continued() -> None:
    model, processor = loaded("caption")
    scene = next(scene for scene, _ in drawn(50) if len(scene.objects) == 4)
    text = caption(scene.objects)
    prompt = " ".join(text.split()[:2])
    inputs = processor(images=scene.render(64), text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert processor.decode(ids[0], skip_special_tokens=True) == text


def test_matches_of_held_out_pairs() -> None:
    model, processor = loaded("match")
    wrong = []
    for scene, rng in drawn(50):
        true = statement(scene, rng)
        false, kind = mismatch(true, scene, rng)
        image = scene.render(64)
        for text, match in ((true, 1), (false, 0)):
            inputs = processor(images=image, text=text, return_tensors="pt")
            with torch.no_grad():
                score = model(**inputs, use_itm_head=True).itm_score  # [1, 2]
            if score.argmax(-1).item() != match:
                wrong.append((true, text, kind))
    assert len(wrong) <= 0.05 * 100, wrong


def test_a_padded_text_matches_as_an_unpadded_one() -> None:
    """Unlike questions: their padding reaches the answer decoder, which ignores its mask."""
    model, processor = loaded("match")
    texts = ["a red circle", "the red circle is at the top left"]
    image = Scene((SceneObject("circle", "red", 0, 0),)).render(64)
    with torch.no_grad():
        inputs = processor(images=[image] * 2, text=texts, padding=True, return_tensors="pt")
        padded = model(**inputs).itm_score
        single = model(**processor(images=image, text=texts[0], return_tensors="pt")).itm_score
    torch.testing.assert_close(padded[:1], single, atol=1e-4, rtol=1e-4)
