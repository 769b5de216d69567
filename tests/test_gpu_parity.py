"""Whole traces by a GPU's kernels, on it, emulated and interpreted, against the Hugging Face model."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from gpu_machines import GPUS, MACHINES, Machine, machine
from PIL.Image import Image
from test_other_heads import ASKED
from test_other_heads import IMAGE as SCENE
from test_parity import IMAGE, TOLERANCE, ask, largest_difference
from torch import Tensor

import blip_trace
from blip_trace import Tracer, TraceResult
from blip_trace.sites import Cell, Site

STATES = {"kinds": ("hidden", "cross_attn")}


class Case(NamedTuple):
    model: str
    arguments: dict[str, Any]
    image: Image = IMAGE


QUESTION = ask("color").text
NOISE = blip_trace.GaussianNoise(samples=2)
CASES = {
    "noise": Case("vqa", {"question": QUESTION, "corruption": NOISE, "kinds": ("hidden", "self_attn_head")}),
    "corrupted states": Case(
        "vqa", {"question": QUESTION, "corruption": NOISE, "direction": "noise", "window": 3, **STATES}
    ),
    "words": Case("vqa", {"question": QUESTION, "corruption": blip_trace.TokenNoise(samples=2)}),
    "image stack": Case(
        "vqa",
        {
            "question": QUESTION,
            "corruption": blip_trace.PixelNoise(std=1.5, samples=1),
            "stacks": ("vision", "text_decoder"),
            "kinds": ("hidden", "self_attn", "mlp"),
            "patch_group": 4,
        },
    ),
    "caption": Case("caption", {**ASKED["caption"], **STATES}, SCENE),
    "match": Case("match", {**ASKED["match"], **STATES}, SCENE),
}


@cache
def hooks(model: str, dtype: str) -> Tracer:
    folder = blip_trace.shipped_model(model)
    if dtype != "float64":
        return Tracer.from_pretrained(folder, dtype=dtype, backend="hooks")
    single = hooks(model, "float32")
    return Tracer(type(single.model).from_pretrained(folder, dtype=torch.float64), single.processor, "hooks")


@pytest.fixture(params=MACHINES)
def gpu(request: pytest.FixtureRequest) -> Machine:
    return machine(request.param)


def by(gpu: Machine, model: str, dtype: str) -> Tracer:
    if gpu.name in GPUS:
        return Tracer.from_pretrained(blip_trace.shipped_model(model), str(gpu.device), dtype, GPUS[gpu.name])
    made = Tracer.from_pretrained(blip_trace.shipped_model(model), dtype=dtype, backend="reference")
    made.__dict__["ops"] = gpu.ops
    return made


def traced(tracer: Tracer, case: Case) -> TraceResult:
    return tracer.trace(case.image, **case.arguments)


def spread(truth: TraceResult) -> float:
    return max(float(cells.max() - cells.min()) for cells in truth.restored.values())


@pytest.mark.parametrize("name", CASES)
def test_float32(gpu: Machine, name: str) -> None:
    case = CASES[name]
    truth, theirs = (traced(hooks(case.model, dtype), case) for dtype in ("float64", "float32"))
    allowed = max(TOLERANCE, 2 * largest_difference(theirs, truth))
    assert allowed <= 10 * TOLERANCE
    assert spread(truth) >= max(100 * allowed, 1e-3)
    assert largest_difference(traced(by(gpu, case.model, "float32"), case), truth) <= allowed


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_errs_no_more_than_twice_what_the_model_itself_does(gpu: Machine, name: str) -> None:
    case = CASES[name]
    truth, theirs = (traced(hooks(case.model, dtype), case) for dtype in ("float32", "bfloat16"))
    allowed = 2 * largest_difference(theirs, truth)
    assert allowed < spread(truth) / 2
    assert largest_difference(traced(by(gpu, case.model, "bfloat16"), case), truth) <= allowed


def test_cells_of_all_kinds(gpu: Machine) -> None:
    cells = [
        Cell.of([Site("text_encoder", 1, "hidden", 2), Site("text_decoder", 0, "self_attn", 0)]),
        Cell.knockout("text_encoder", "cross_attn", [3], range(1, 60), layers=range(4)),
        Cell.knockout("text_encoder", "self_attn", [3, 4], [0, 1], layers=range(4)),
        Cell.of([Site("text_encoder", layer, "cross_attn_head", 2, layer) for layer in range(4)]),
    ]

    def scores(tracer: Tracer) -> Tensor:
        return tracer.restore(IMAGE, QUESTION, cells, corruption=NOISE).scores

    truth, theirs = (scores(hooks("vqa", dtype)) for dtype in ("float64", "float32"))
    allowed = max(TOLERANCE, 2 * float((theirs - truth).abs().max()))
    assert (truth.amax() - truth.amin()) >= 100 * allowed
    assert (scores(by(gpu, "vqa", "float32")) - truth).abs().max() <= allowed


@pytest.mark.without_gpu  # there they are compiled, and tested above
def test_triton_s_kernels_interpreted(tmp_path: Path) -> None:
    """A few cells, for the interpreter is slow; in a process of its own, for it is chosen at the start."""
    case = {"corruption": blip_trace.GaussianNoise(samples=1), "tokens": {"text_encoder": [-1]}}
    program = f"""
import blip_trace
from test_gpu_parity import IMAGE, QUESTION
tracer = blip_trace.Tracer.from_pretrained(blip_trace.shipped_model(), backend="triton")
tracer.trace(IMAGE, QUESTION, **{case!r}).save({str(tmp_path / "trace")!r})
"""
    program = program.replace("GaussianNoise(", "blip_trace.GaussianNoise(")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = TraceResult.load(tmp_path / "trace")
    truth = hooks("vqa", "float64").trace(IMAGE, QUESTION, **case)
    assert found.settings["backend"] == "triton"
    assert spread(truth) >= max(100 * TOLERANCE, 1e-3)
    assert largest_difference(found, truth) <= TOLERANCE
