"""What cannot be traced is refused in one sentence, before anything is computed from it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from conftest import tiny_config
from transformers import BlipForQuestionAnswering, BlipModel, BlipProcessor

from blip_trace import BackendUnavailableError, GaussianNoise, Tracer

QUESTION = "what color is the shape ?"
NOISE = GaussianNoise(samples=2)


@pytest.fixture
def pixels(tiny_tracer: Tracer, picture: PIL.Image.Image) -> torch.Tensor:
    values: torch.Tensor = tiny_tracer.processor.image_processor(picture, return_tensors="pt").pixel_values
    return values


def refused(tracer: Tracer, match: str, error: type[Exception] = ValueError, **inputs: Any) -> None:
    inputs = {"question": QUESTION, "corruption": NOISE, **inputs}
    with pytest.raises(error, match=match) as caught:
        tracer.trace(**inputs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"question": ""}, "the question is empty"),
        ({"question": " \n"}, "the question is empty"),
        ({"question": "what " * 15}, "the question has 17 tokens, the model takes 16"),
        ({"question": torch.tensor([[]], dtype=torch.long)}, "the question is empty"),
        ({"question": torch.zeros(1, 4, dtype=torch.long)}, "the question is empty"),
        ({"question": torch.tensor([[2, 6, 0, 7, 3]])}, "padding before their last token"),
        ({"question": torch.tensor([[0, 2, 6, 3]])}, "padding before their last token"),
        ({"question": torch.tensor([[2, 6, 3], [2, 7, 3]])}, r"one question \[1, T\], not \[2, 3\]"),
        ({"question": torch.tensor([[[2, 6, 3]]])}, r"one question \[1, T\]"),
        ({"question": torch.tensor(3)}, r"one question \[1, T\]"),
        ({"question": torch.tensor([[2, 14, 3]])}, "14 is outside the model's vocabulary of 14"),
        ({"question": torch.tensor([[2, -1, 3]])}, "-1 is outside"),
        ({"answer": ""}, "the answer is empty"),
        ({"answer": "giraffe"}, "outside the model's vocabulary"),
        ({"answer": "red giraffe"}, "outside the model's vocabulary"),
        ({"answer": 14}, "14 is outside"),
        ({"answer": -1}, "-1 is outside"),
        ({"answer": "red " * 17}, "the answer has 17 tokens"),
        ({"stacks": ["encoder"]}, "unknown stack 'encoder': choose among"),
        ({"stacks": []}, "no stack given"),
        ({"stacks": ["vision"]}, "lies before the image embeddings"),
        ({"kinds": ["attention"]}, "unknown kind 'attention': choose among"),
        ({"kinds": ()}, "no kind given"),
        ({"window": 0}, "window must be"),
        ({"window": 1.5}, "window must be"),
        ({"window": True}, "window must be"),
    ],
)
def test_bad_values(
    tiny_tracer: Tracer, picture: PIL.Image.Image, inputs: dict[str, Any], match: str
) -> None:
    refused(tiny_tracer, match, **{"image": picture, **inputs})


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"question": torch.tensor([[2.0, 6.0, 3.0]])}, "input_ids must be whole numbers, not torch.float32"),
        ({"question": torch.tensor([[True, True]])}, "input_ids must be whole numbers"),
        ({"question": None}, "a question must be a string or input_ids, not NoneType"),
        ({"question": ["what"]}, "a question must be a string or input_ids, not list"),
        ({"answer": 1.0}, "an answer must be"),
        ({"answer": True}, "an answer must be"),
        ({"answer": ["red"]}, "an answer must be"),
        ({"image": None}, "an image must be"),
        ({"corruption": 3}, "a corruption must be callable"),
        ({"corruption": lambda states: states.tolist()}, "a corruption must return a tensor"),
    ],
)
def test_bad_types(tiny_tracer: Tracer, picture: PIL.Image.Image, inputs: dict[str, Any], match: str) -> None:
    refused(tiny_tracer, match, TypeError, **{"image": picture, **inputs})


@pytest.mark.parametrize(
    ("corruption", "match"),
    [
        (lambda states: states, "must return"),
        (lambda states: states[None, :-1], "must return"),
        (lambda states: states[None, :, :-1], "must return"),
        (lambda states: states.new_empty(0, *states.shape), "must return"),
        (lambda states: states[None] * float("nan"), "NaN or infinite"),
        (lambda states: states[None] / 0.0, "NaN or infinite"),
    ],
)
def test_bad_corruptions(tiny_tracer: Tracer, picture: PIL.Image.Image, corruption: Any, match: str) -> None:
    refused(tiny_tracer, match, image=picture, corruption=corruption)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "divide"}, "unknown noise mode"),
        ({"samples": 0}, "samples must be"),
        ({"samples": 2.0}, "samples must be"),
        ({"samples": True}, "samples must be"),
        ({"mean": float("nan")}, "mean must be"),
        ({"std": float("inf")}, "std must be"),
        ({"std": -1.0}, "std must be"),
    ],
)
def test_bad_noise(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        GaussianNoise(**settings)


def test_bad_pixel_values(tiny_tracer: Tracer, pixels: torch.Tensor) -> None:
    for image in (pixels[:, :, :-1], pixels[:, :1], pixels.repeat(2, 1, 1, 1), pixels[0, 0], pixels.int()):
        refused(tiny_tracer, "pixel_values must be", image=image)
    for value in (float("nan"), float("inf")):
        broken = pixels.clone()
        broken[0, 1, 2, 3] = value
        refused(tiny_tracer, "NaN or infinity", image=broken)
    refused(tiny_tracer, "NaN or infinite embeddings", image=torch.full_like(pixels, 3e38))


def test_an_image_that_is_none(tiny_tracer: Tracer, tmp_path: Path) -> None:
    (tmp_path / "image.png").write_text("no image")
    refused(tiny_tracer, "is no image", image=tmp_path / "image.png")
    refused(tiny_tracer, "there is no image file", FileNotFoundError, image=tmp_path / "missing.png")


def test_ways_to_say_the_same(tiny_tracer: Tracer, picture: PIL.Image.Image, pixels: torch.Tensor) -> None:
    ids = tiny_tracer.processor.tokenizer(QUESTION, return_tensors="pt").input_ids
    padded = torch.cat((ids, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    traces = [
        tiny_tracer.trace(image, question, answer, NOISE)
        for image, question, answer in [
            (picture, QUESTION, "red"),
            (pixels, ids, 11),
            (pixels[0].double(), padded.int(), 11),
            (picture, ids[0], "red"),
        ]
    ]
    for trace in traces[1:]:
        assert trace.answer_ids == (11,)
        assert trace.tokens("text_encoder") == traces[0].tokens("text_encoder")
        for name, maps in trace.restored.items():
            assert torch.equal(maps, traces[0].restored[name])


def test_pictures_that_come_again_are_read_once(tiny_tracer: Tracer, tmp_path: Path) -> None:
    """Read side by side, each stays with its question."""
    pictures = [PIL.Image.new("RGB", (40, 40), (20 * n, 0, 90)) for n in range(7)]
    pictures[3].save(tmp_path / "three.png")
    given: list[Any] = [*pictures, *pictures[::-1], tmp_path / "three.png", str(tmp_path / "three.png")]
    order = [0, 1, 2, 3, 4, 5, 6, 6, 5, 4, 3, 2, 1, 0, 3, 3]
    read = tiny_tracer.inputs.all_pixels(given)
    alone = [tiny_tracer.inputs.pixels(picture) for picture in pictures]
    assert all(torch.equal(own, alone[n]) for own, n in zip(read, order, strict=True))
    assert not torch.equal(alone[0], alone[1])
    assert len({id(own) for own in read}) == len(pictures) + 1
    assert read[14] is read[15]


def test_of_several_bad_pictures_the_first_is_named(
    tiny_tracer: Tracer, picture: PIL.Image.Image, tmp_path: Path
) -> None:
    missing = [tmp_path / f"{n}.png" for n in range(5)]
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing[0]))):
        tiny_tracer.trace_batch([(image, QUESTION) for image in (picture, *missing)], None, NOISE)


def test_without_a_processor(tiny_tracer: Tracer, picture: PIL.Image.Image, pixels: torch.Tensor) -> None:
    bare = Tracer(tiny_tracer.model, backend="reference")
    ids = torch.tensor([[2, 6, 7, 3]])
    refused(bare, "an image must be given as pixel_values", image=picture, question=ids)
    refused(bare, "a question must be given as token ids", image=pixels)
    refused(bare, "an answer must be given as token ids", image=pixels, question=ids, answer="red")
    result = bare.trace(pixels, ids, 11, NOISE)
    assert result.tokens("text_encoder") == ("2", "6", "7", "3")
    assert result.answer == "11"


def test_a_token_without_a_word(tiny_folder: Path, picture: PIL.Image.Image) -> None:
    """A model may have more words than its tokenizer: such an answer is told by its number."""
    wide = tiny_config(vocab_size=20)
    processor = BlipProcessor.from_pretrained(tiny_folder, backend="pil")
    traced = Tracer(BlipForQuestionAnswering(wide), processor).trace(picture, QUESTION, 17, NOISE)
    assert traced.answer == "17"


def test_bad_tracers(tiny_tracer: Tracer, tiny_folder: Path) -> None:
    with pytest.raises(TypeError, match=r"only BlipForQuestionAnswering and .* can be traced, not BlipModel"):
        Tracer(BlipModel(tiny_config()))
    with pytest.raises(ValueError, match="unknown backend 'fast': choose among"):
        Tracer(tiny_tracer.model, backend="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory must be"):
        Tracer(tiny_tracer.model, backend="reference", memory=10)
    with pytest.raises(ValueError, match="the model is on meta"):
        Tracer(BlipForQuestionAnswering(tiny_config()).to("meta"), backend="reference")
    for options, match in (
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
    ):
        with pytest.raises(ValueError, match=match):
            Tracer.from_pretrained(tiny_folder, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(tiny_tracer: Tracer, value: float) -> None:
    model = copy.deepcopy(tiny_tracer.model)
    with torch.no_grad():
        model.text_encoder.encoder.layer[1].output.dense.weight[3, 4] = value
    with pytest.raises(
        ValueError, match=r"text_encoder.encoder.layer.1.output.dense.weight holds NaN or infin"
    ):
        Tracer(model, backend="reference")


def test_native_where_it_is_not_built(tiny_tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error where it was asked for, a warning where it was not."""
    monkeypatch.setattr(
        "blip_trace.ops.native_unavailable_reason", lambda device: "It is not built: make it."
    )
    with pytest.raises(BackendUnavailableError, match="It is not built: make it"):
        Tracer(tiny_tracer.model, backend="native")
    with pytest.warns(UserWarning, match="slower reference backend: It is not built"):
        assert Tracer(tiny_tracer.model, backend="auto").backend == "reference"


def test_a_batch_needs_an_answer_for_each_question(tiny_tracer: Tracer, picture: PIL.Image.Image) -> None:
    with pytest.raises(ValueError, match="1 questions but 2 answers"):
        tiny_tracer.trace_batch([(picture, QUESTION)], ["red", "blue"])
    assert tiny_tracer.trace_batch([]) == []


def test_progress_runs_from_nothing_to_all(tiny_tracer: Tracer, picture: PIL.Image.Image) -> None:
    shares: list[float] = []
    tiny_tracer.trace(picture, QUESTION, corruption=NOISE, progress=shares.append)
    assert shares == sorted(shares)
    assert len(shares) > 3
    assert shares[0] > 0
    assert shares[-1] == pytest.approx(1.0)
