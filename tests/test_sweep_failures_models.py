"""Sweeps with broken models, and with numbers that are none.

Models are refused by the names of what is wrong; numbers are kept, flagged and left out of averages.
The numbers of faults are those of the table, as in test_sweep_stops.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweep_helpers import order, rows_of

from blip_trace import Tracer
from blip_trace.sweep.driver import sweep
from blip_trace.sweep.planning import Changed
from blip_trace.sweep.results import load_run

pytest_plugins = ("sweep_fixtures",)
pytestmark = pytest.mark.usefixtures("hang_guard")


@pytest.fixture
def model(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model to be changed."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def change(model: Path, name: str, work: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change one weight."""
    weights = load_file(model / "model.safetensors")
    (key,) = (key for key in weights if key.endswith(name))
    weights[key] = work(weights[key]).contiguous()
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value: float, model: Path, tmp_path: Path) -> None:
    """Fault 9: a model with NaN among its weights is refused by name before anything is planned."""
    change(model, "text_encoder.encoder.layer.1.output.dense.weight", lambda own: own.fill_(value))
    with pytest.raises(ValueError, match=r"weight .*layer.1.output.dense.weight holds NaN or infinity"):
        sweep(order(model), tmp_path / "run")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_numbers_that_are_not_finite(model: Path, tmp_path: Path) -> None:
    """Fault 9: what overflows on the way is kept, flagged, and left out of averages."""
    change(model, "text_decoder.bert.encoder.layer.1.output.dense.weight", lambda own: own * 1e38)
    outcome = sweep(order(model, "scenes:1"), tmp_path / "run")
    assert outcome.statuses == {"not_finite": 5}
    assert outcome.failed == 5
    for row in rows_of(tmp_path / "run").values():
        assert "NaN or infinity" in row["reason"]
        assert row["text_decoder_hidden_probability"] is not None
    assert load_run(tmp_path / "run").counts()["not_finite"] == 5


def test_numbers_too_large_for_half_precision(model: Path, tmp_path: Path) -> None:
    """Fault 9: a number that does not fit the type of the file is not passed off as a good one."""
    change(model, "cls.predictions.bias", lambda own: own + 1e5)
    for store, status in (("float32", "ok"), ("float16", "not_finite")):
        given = order(model, "scenes:1", metrics=("logit",), store=store)
        assert sweep(given, tmp_path / store).statuses == {status: 5}


def test_effects_that_vanish(tiny_folder: Path, tmp_path: Path) -> None:
    """Fault 9: samples that the corruption does nothing to say so."""
    given = order(tiny_folder, "scenes:1", corruption={"samples": 1, "std": 0.0})
    assert sweep(given, tmp_path / "none").statuses == {"ok": 5}
    assert all(row["total_effect_vanishes"] for row in rows_of(tmp_path / "none").values())
    sweep(order(tiny_folder, "scenes:4"), tmp_path / "some")
    assert not all(row["total_effect_vanishes"] for row in rows_of(tmp_path / "some").values())


def test_broken_models(model: Path, tmp_path: Path) -> None:
    """Fault 11: a checkpoint that lacks a weight, has others, or belongs to another head is refused by the
    names of what is wrong."""
    weights = load_file(model / "model.safetensors")
    lost = "text_encoder.encoder.layer.1.attention"
    lacking = {key: own for key, own in weights.items() if lost not in key}
    shorter = {key: own[:-1].clone() if own.dim() == 1 else own for key, own in weights.items()}
    wrong: dict[str, dict[str, torch.Tensor]] = {
        r"missing: text_encoder.encoder.layer.1.attention": lacking,
        r"1 unexpected: other": {**weights, "other": torch.zeros(2)},
        "of another shape": shorter,
    }
    for match, content in wrong.items():
        save_file(content, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=match):
            sweep(order(model), tmp_path / "run")
    (model / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{not json}      ")
    with pytest.raises(ValueError, match="cannot be loaded"):
        sweep(order(model), tmp_path / "run")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no model"):
        sweep(order(model), tmp_path / "run")


def test_another_tokenizer(cheap: Tracer, model: Path, tmp_path: Path) -> None:
    """Fault 11: another tokenizer in the same folder makes another run."""
    sweep(order(model), tmp_path / "run")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["red"], words["blue"] = words["blue"], words["red"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    for given in (None, order(model)):
        with pytest.raises(Changed, match=r"model.processor: planned .*, now "):
            sweep(given, tmp_path / "run")
