"""Which models `compat.pyvene` covers, and that it leaves them as they were."""

from __future__ import annotations

import pickle
import warnings
from copy import deepcopy
from typing import Any

import pytest
import pyvene
import torch
from nnsight import NNsight
from pyvene.models.blip.modelings_blip import BlipWrapper
from test_compat_nnsight import CLEAN as TRACED
from test_compat_nnsight import LAYERS, OTHERS, TOKENS, assert_same, logits, run
from test_compat_pyvene import BASES, CLEAN, ENCODER, Wrapper, config, load, original, ours, passes, stacked
from torch import Tensor
from transformers import BlipForImageTextRetrieval, BlipForQuestionAnswering

from blip_trace import shipped_model
from blip_trace.compat import pyvene as pv
from blip_trace.compat.nnsight import activation_patching

__all__ = ["passes"]  # a fixture

HIDDEN = f"{ENCODER % 3}.output"
AT = {"sources->base": 7}
MOVED = {"sources->base": (6, 7)}
"""A call that is not covered."""


def fresh() -> Any:
    return BlipForQuestionAnswering.from_pretrained(shipped_model())


def call(made: Any, location: Any = AT) -> Tensor:
    found: Tensor = made(BASES["picture"], [CLEAN], location)[1]["decoder_logits"]
    return found


def flags(model: Any) -> list[bool]:
    return [m.training for m in model.modules()] + [weight.requires_grad for weight in model.parameters()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("location", [AT, MOVED])
def test_modes_and_gradients_are_put_back(location: Any, training: bool) -> None:
    model = fresh().train(training)
    model.text_decoder.cls.requires_grad_(False)
    before = flags(model)
    made = ours(config(HIDDEN), Wrapper(model))
    assert flags(model) == before
    found = call(made, location)
    assert flags(model) == before
    assert not found.requires_grad
    expected = call(original(config(HIDDEN)), location)
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("location", [AT, MOVED])
def test_hooks_of_others(location: Any, passes: list[int]) -> None:
    """They stay and do not fire; those of transformers work on, and none is left by us."""
    model, fired = fresh(), []
    wrapper = Wrapper(model)
    wrapper(**CLEAN)  # transformers installs its own
    handle = model.text_encoder.encoder.layer[3].register_forward_hook(lambda *_: fired.append(1))
    wrapper.register_forward_pre_hook(lambda *_: fired.append(2))
    before = [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in wrapper.modules()]
    output = ours(config(HIDDEN), wrapper)(BASES["picture"], [CLEAN], location)[1]
    assert len(output["encoder_hidden_states"]) == len(output["decoder_hidden_states"]) == LAYERS + 1
    assert [(*m._forward_hooks.values(), *m._forward_pre_hooks.values()) for m in wrapper.modules()] == before
    assert fired == []
    assert len(passes) == (location is AT)
    assert len(wrapper(**CLEAN)["encoder_hidden_states"]) == LAYERS + 1
    assert fired == [2, 1]
    handle.remove()
    wrapper(**CLEAN)
    assert fired == [2, 1, 2]


def test_hooks_that_change_the_model() -> None:
    """As with pyvene a call knows nothing of them: both ways give what the model by itself gives."""
    model = fresh()
    model.text_encoder.encoder.layer[3].register_forward_hook(lambda _, __, output: output * 0)
    assert torch.equal(
        call(ours(config(HIDDEN), Wrapper(model)), MOVED), call(original(config(HIDDEN)), MOVED)
    )
    assert (call(ours(config(HIDDEN), Wrapper(model))) - call(original(config(HIDDEN)))).abs().max() <= 1e-4


def test_training_freezes_the_model_as_pyvene_does() -> None:
    model = fresh()
    made = ours(config("block_output", 3, intervention_type=pyvene.RotatedSpaceIntervention), Wrapper(model))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model.training
    trained = made.get_trainable_parameters()
    assert len(trained) == len(list(made.interventions.parameters())) > 0
    call(made).sum().backward()
    assert all(weight.grad is not None for weight in trained)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_gradients_that_are_asked_for() -> None:
    model = fresh()
    made = ours(config(HIDDEN), Wrapper(model))
    made.enable_model_gradients()
    found = call(made)
    assert found.requires_grad
    found.sum().backward()
    assert model.text_encoder.encoder.layer[2].output.dense.weight.grad.abs().max() > 0
    with torch.no_grad():
        assert (call(made) - found).abs().max() <= 1e-4
    made.disable_model_gradients()
    assert not call(made).requires_grad


def test_the_wrapper_without_a_device(passes: list[int]) -> None:
    """pyvene 0.1.8 raises AttributeError in every call with its own wrapper."""
    plain = BlipWrapper(load("ours"))
    for location, expected in ((AT, 1), (MOVED, 1)):
        found = call(ours(config("block_output", 3), plain), location)
        assert (found - call(original(config("block_output", 3)), location)).abs().max() <= 1e-4
        assert len(passes) == expected
    with pytest.raises(AttributeError, match="no attribute 'device'"):
        call(original(config("block_output", 3), BlipWrapper(load("pyvene"))))


class Doubled(Wrapper):
    """A wrapper whose output is its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        return {**found, "decoder_logits": found["decoder_logits"] * 2}


class Renamed(Wrapper):
    """A wrapper that is another type."""


for table in (pyvene.type_to_module_mapping, pyvene.type_to_dimension_mapping):
    table |= {kind: table[Wrapper] for kind in (Doubled, Renamed)}


def broken() -> Any:
    model = fresh()
    with torch.no_grad():
        model.text_decoder.cls.predictions.bias[3] = float("nan")
    return Wrapper(model)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubled(fresh()), "Doubled with a forward of its own"),
        (lambda: Wrapper(fresh().double()), "a model in torch.float64"),
        (lambda: Wrapper(fresh().bfloat16()), "a model in torch.bfloat16"),
        (broken, "the model's weight text_decoder.cls.predictions.bias holds NaN or infinity"),
        (lambda: Renamed(fresh()), None),
    ],
)
def test_models(make: Any, reason: str | None, caplog: pytest.LogCaptureFixture) -> None:
    wrapper = make()
    dtype = wrapper.model_text_enc.dtype
    base, source = (
        {**own, "pixel_values": own["pixel_values"].to(dtype)} for own in (BASES["picture"], CLEAN)
    )
    mine = ours(config(HIDDEN), wrapper)(base, [source], AT)[1]["decoder_logits"]
    theirs = original(config(HIDDEN), deepcopy(wrapper))(base, [source], AT)[1]["decoder_logits"]
    assert mine.dtype == theirs.dtype == dtype
    if reason is None:
        assert (mine - theirs).abs().max() <= 1e-4
        assert not caplog.records
    else:
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        assert caplog.records[-1].message.startswith(reason)


def test_a_model_that_matches_texts(caplog: pytest.LogCaptureFixture) -> None:
    scores = []
    for each in (ours, original):
        model = BlipForImageTextRetrieval.from_pretrained(shipped_model("match"))
        made = each(config("text_encoder.encoder.layer[1].output"), model)
        scores.append(made(BASES["picture"], [CLEAN], AT)[1].itm_score)
    assert torch.equal(*scores)
    assert caplog.records[0].message.startswith("a BlipForImageTextRetrieval is not supported here")


def test_widths(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A named component is as wide as `image_text_hidden_size` says, which need not be the stream's width: of
    less pyvene exchanges the first channels alone."""
    for width, reason in ((200, None), (42, "exchanging the first channels of a state alone")):
        found = []
        for each, name in ((ours, "ours"), (original, "pyvene")):
            monkeypatch.setattr(load(name).config, "image_text_hidden_size", width)
            found.append(call(each(config("block_output", 3), Wrapper(load(name)))))
        assert (found[0] - found[1]).abs().max() <= (1e-4 if reason is None else 0)
        assert [record.message.split(" is not")[0] for record in caplog.records] == (
            [reason] if reason else []
        )


def test_rows_after_a_short_form(caplog: pytest.LogCaptureFixture) -> None:
    """A number for a location turns `use_fast` on for good: pyvene then takes row 0's position for all."""
    rows = [[[token] for token in range(TOKENS)]]
    base, source = stacked(*[BASES["picture"]] * TOKENS), stacked(*[CLEAN] * TOKENS)
    found = []
    for each in (ours, original):
        made = each(config(HIDDEN))
        right = made(base, [source], {"sources->base": (rows, rows)})[1]["decoder_logits"]
        call(made)
        wrong = made(base, [source], {"sources->base": (rows, rows)})[1]["decoder_logits"]
        found.append((right, wrong))
    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert (found[0][0] - found[0][1]).abs().max() > 1e-2
    assert [record.message[:8] for record in caplog.records] == ["use_fast"]
    # A later call does not change what an earlier one returned.
    made = ours(config(HIDDEN))
    early = made(base, [source], {"sources->base": (rows, rows)})[1]
    call(made)
    states = early["encoder_last_hidden_state"]
    assert (states[7, 7] - states[6, 7]).abs().max() > 1e-2


def test_weights_that_change(passes: list[int]) -> None:
    model = fresh()
    made, theirs = ours(config(HIDDEN), Wrapper(model)), original(config(HIDDEN), Wrapper(deepcopy(model)))
    first = call(made)
    with torch.no_grad():
        for changed in (model.text_decoder, theirs.model.model_text_dec):
            changed.cls.predictions.bias[7] += 3
    assert (call(made) - call(theirs)).abs().max() <= 1e-4
    assert (call(made) - first).abs().max() > 1
    model.text_encoder.encoder.layer[3].output.dense = torch.nn.Linear(512, 128)
    theirs.model.model_text_enc.encoder.layer[3] = deepcopy(model.text_encoder.encoder.layer[3])
    again = ours(config(HIDDEN), Wrapper(model))
    assert (call(again) - call(original(config(HIDDEN), theirs.model))).abs().max() <= 1e-4
    assert len(passes) == 4


def test_wrappers_of_one_model_share_a_tracer() -> None:
    """Wrapped anew for each config, as tutorials do; copied and pickled the wrapper stays a wrapper."""
    model = fresh()
    wrappers = [Wrapper(model), Wrapper(model)]
    for wrapper in wrappers:
        call(ours(config(HIDDEN), wrapper))
    kept = vars(model.text_encoder)["_blip_trace_whole"].model
    assert kept.text_encoder is model.text_encoder
    names = set(BlipWrapper(fresh()).state_dict())
    for wrapper in (*wrappers, deepcopy(wrappers[0]), pickle.loads(pickle.dumps(wrappers[0]))):
        assert set(wrapper.state_dict()) == names
        assert (call(ours(config(HIDDEN), wrapper)) - call(original(config(HIDDEN)))).abs().max() <= 1e-4
    assert vars(model.text_encoder)["_blip_trace_whole"].model is kept


def test_generate(caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for each, name in ((ours, "ours"), (original, "pyvene")):
        made = each(config("block_output", 3), load(name))
        base, source = BASES["picture"], {**CLEAN, "decoder_input_ids": run()["decoder_input_ids"]}
        found.append(made.generate(base, [source], AT, intervene_on_prompt=True, max_new_tokens=4))
    assert torch.equal(found[0][1], found[1][1])
    said = "generate is not supported here: pyvene itself runs the call"
    assert [record.message for record in caplog.records] == [said]


def test_one_model_for_two_tools() -> None:
    """nnsight and pyvene beside each other, each as if it were alone."""
    model = fresh()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn_model = NNsight(model)
    plain = logits(nn_model, TRACED)
    grid = pv.interchange(BlipWrapper(model), [config(HIDDEN)], BASES["picture"], [CLEAN], [AT, MOVED])
    assert torch.equal(logits(nn_model, TRACED), plain)
    patched = activation_patching(
        nn_model, TRACED, OTHERS["picture"], [nn_model.text_encoder.encoder.layer[3]]
    )
    assert (grid[0][0][1]["decoder_logits"][0] - patched[0, 7]).abs().max() <= 1e-4
    assert torch.equal(grid[0][1][1]["decoder_logits"], call(original(config(HIDDEN)), MOVED))
    assert torch.equal(logits(nn_model, TRACED), plain)
