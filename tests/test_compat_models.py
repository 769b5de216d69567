"""The tracer that adapters share."""

from __future__ import annotations

import gc
import re
import runpy
import weakref
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import BlipForQuestionAnswering, BlipProcessor

from blip_trace.compat.models import UnsupportedError, tracer_of


def test_a_tracer_is_made_once_for_the_weights_it_read(tiny_folder: Path) -> None:
    model = BlipForQuestionAnswering.from_pretrained(tiny_folder)
    processor = BlipProcessor.from_pretrained(tiny_folder, backend="pil")
    first = tracer_of(model)
    assert tracer_of(model) is first
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] += 1
    second = tracer_of(model)
    assert second is not first
    assert second.program.head.decoder.bias[3] == model.text_decoder.cls.predictions.bias[3]
    with_words = tracer_of(model, processor)
    assert with_words.processor is processor
    assert tracer_of(model, processor) is with_words
    assert tracer_of(model) is second
    model.text_encoder.encoder.layer[0].attention.self.query = torch.nn.Linear(32, 32)
    assert tracer_of(model, processor) is not with_words


def test_tracers_keep_no_model_alive(tiny_folder: Path) -> None:
    model = BlipForQuestionAnswering.from_pretrained(tiny_folder)
    tracer_of(model)
    gone = weakref.ref(model)
    copy = deepcopy(model)
    assert tracer_of(copy) is not tracer_of(model)
    assert tracer_of(copy).model is copy
    del model
    gc.collect()
    assert gone() is None


def test_a_model_that_holds_no_numbers(tiny_folder: Path) -> None:
    model = BlipForQuestionAnswering.from_pretrained(tiny_folder).to("meta")
    with pytest.raises(ValueError, match="the model is on meta: it must be on the CPU or on a GPU"):
        tracer_of(model)


def test_the_worked_example(capsys: pytest.CaptureFixture[str]) -> None:
    """A foreign loop gets the same numbers from the engine as from hooks, on a map that is not flat."""
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "plug_in.py"), run_name="__main__")
    low, high, difference = (float(x) for x in re.findall(r"\d\.\d+(?:e-\d+)?", capsys.readouterr().out)[:3])
    assert high - low > 0.5
    assert difference <= 1e-5


def test_what_is_said() -> None:
    error = UnsupportedError("the component 'x'", "run it with the tool itself")
    assert str(error) == "the component 'x' is not supported here: run it with the tool itself"
