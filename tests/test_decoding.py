"""What the model says by itself, against transformers' own `generate`."""

from __future__ import annotations

from random import Random

import pytest
import torch

from blip_trace import Tracer
from blip_trace.captions import caption, mismatch
from blip_trace.lowering.load import shipped_model
from blip_trace.prepare import Asked
from blip_trace.scenes import questions, random_scene

GREEDY = {"max_new_tokens": 20, "do_sample": False, "num_beams": 1}


def asked_of(tracer: Tracer, scenes: int) -> tuple[list[Asked], list[str]]:
    """Questions about drawn scenes, with their right answers."""
    rng = Random(11)
    asked, answers = [], []
    for _ in range(scenes):
        scene = random_scene(rng)
        picture = scene.render(64)
        for question in questions(scene, rng, count_shapes=True):
            asked.append(tracer.ask(picture, question.text))
            answers.append(question.answer)
    return asked, answers


@pytest.fixture(scope="module")
def vqa() -> Tracer:
    return Tracer.from_pretrained(shipped_model())


def test_answers_are_those_of_generate(vqa: Tracer) -> None:
    """Words and where they end, answers of one and of two words."""
    asked, right = asked_of(vqa, 12)
    said = vqa.answers(asked)
    with torch.inference_mode():
        ids = [
            vqa.model.generate(input_ids=own.text_ids[None], pixel_values=own.pixels, **GREEDY)[0]
            for own in asked
        ]
    assert said == [vqa.processor.tokenizer.decode(own, skip_special_tokens=True) for own in ids]
    assert {len(answer.split()) for answer in said} == {1, 2}
    agreeing = sum(mine == answer for mine, answer in zip(said, right, strict=True))
    assert len(said) * 0.8 < agreeing, "the questions are such as the model can answer"


def test_guesses_change_nothing(vqa: Tracer) -> None:
    """Right, wrong from the first or the second word on, too long, unknown to the model, or none."""
    asked, right = asked_of(vqa, 4)
    wrong = ["top top", "blue", "zebra", None, "red red red red", "top"]
    guesses = [*right[:8], *(wrong * 2)[: len(asked) - 8]]
    assert vqa.answers(asked, guesses=guesses) == vqa.answers(asked)
    assert vqa.answers(asked, guesses=right) == vqa.answers(asked)


def test_a_right_guess_saves_passes(vqa: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single pass confirms answers that were guessed."""
    asked, _ = asked_of(vqa, 2)
    said = vqa.answers(asked)
    passes = []
    score = type(vqa._measurer).score

    def counted(self: object, tasks: list[object], progress: object) -> object:
        if tasks:
            passes.append(len(tasks))
        return score(self, tasks, progress)  # type: ignore[arg-type]

    monkeypatch.setattr(type(vqa._measurer), "score", counted)
    assert vqa.answers(asked, guesses=said) == said
    assert passes == [len(asked)]


def test_it_stops_where_it_is_told(vqa: Tracer) -> None:
    asked, _ = asked_of(vqa, 4)
    firsts = [answer.split()[0] for answer in vqa.answers(asked)]
    assert vqa.answers(asked, max_tokens=1) == firsts
    assert vqa.answers([]) == []


def test_captions_are_those_of_generate() -> None:
    """What comes behind the beginning."""
    tracer = Tracer.from_pretrained(shipped_model("caption"))
    rng = Random(3)
    asked = [tracer.ask(random_scene(rng).render(64), "a") for _ in range(5)]
    said = tracer.answers(asked, max_tokens=40)
    for own, mine in zip(asked, said, strict=True):
        with torch.inference_mode():
            ids = tracer.model.generate(
                input_ids=torch.cat((own.text_ids, torch.tensor([tracer.inputs.end])))[None],
                pixel_values=own.pixels,
                **{**GREEDY, "max_new_tokens": 40},
            )[0]  # its generate drops the text's last token
        whole = tracer.processor.tokenizer.decode(ids, skip_special_tokens=True)
        assert whole == f"a {mine}"
    assert max(len(mine.split()) for mine in said) > 6


def test_a_text_may_fill_all_places(tiny_tracer: Tracer) -> None:
    """A model of 16 places answers no longer than that."""
    picture = torch.zeros(1, 3, 32, 32)
    long = torch.tensor([2, *[6] * 14, 3])
    (said,) = tiny_tracer.answers([tiny_tracer.ask(picture, long)], max_tokens=50)
    assert len(said.split()) <= 16


def test_matching_says_which() -> None:
    tracer = Tracer.from_pretrained(shipped_model("match"))
    rng = Random(5)
    scenes = [random_scene(rng) for _ in range(6)]
    texts = [caption(scene.objects) for scene in scenes]
    false = [mismatch(text, scene, rng)[0] for text, scene in zip(texts, scenes, strict=True)]
    asked = [
        tracer.ask(scene.render(64), text)
        for scene, text in zip([*scenes, *scenes], [*texts, *false], strict=True)
    ]
    said = tracer.answers(asked)
    sure = [tracer.trace(own.pixels, own.text_ids[None], answer="match").high_score for own in asked]
    assert said == ["match" if score > 0.5 else "no match" for score in sure]
    assert set(said) == {"match", "no match"}
