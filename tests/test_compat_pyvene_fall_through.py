"""What `compat.pyvene` does not cover goes through pyvene itself, which is told, and loses nobody's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import pyvene
import torch
from pyvene import CollectIntervention, VanillaIntervention
from test_compat_nnsight import LAYERS, run
from test_compat_pyvene import (
    BASES,
    CLEAN,
    ENCODER,
    config,
    inputs,
    load,
    original,
    ours,
    passes,
    stacked,
)

__all__ = ["passes"]  # a fixture

HIDDEN = f"{ENCODER % 3}.output"
START = run()["decoder_input_ids"]


class Given(NamedTuple):
    """A call that is not covered, and why."""

    reason: str
    config: Any = None
    base: Any = BASES["picture"]
    sources: Any = [CLEAN]  # noqa: RUF012
    locations: Any = {"sources->base": 7}  # noqa: RUF012
    options: Any = {}  # noqa: RUF012
    made: Any = {}  # noqa: RUF012
    raw: bool = False


def two(**fields: Any) -> Any:
    """Two representations at once."""
    kept = {"intervention_type": VanillaIntervention, **fields}
    return pyvene.IntervenableConfig(
        [kept | {"component": HIDDEN}, kept | {"component": f"{ENCODER % 2}.output"}]
    )


def padded(mask: bool) -> Any:
    """A base with padding, and perhaps a mask that hides it."""
    pad = torch.zeros(1, 2, dtype=torch.int64)
    base = {**BASES["picture"], "input_ids": torch.cat((CLEAN["input_ids"], pad), dim=1)}
    return base | ({"attention_mask": (base["input_ids"] != 0).long()} if mask else {})


def with_words(*ids: int) -> Any:
    return {**CLEAN, "input_ids": torch.cat((CLEAN["input_ids"], torch.tensor([ids])), dim=1)}


def adding(base: Any, source: Any, subspaces: Any = None) -> Any:
    return base + source


ROWS = [[[7], [4]]]
TWO_ROWS = {"base": stacked(*[BASES["picture"]] * 2), "sources": [stacked(CLEAN, CLEAN)]}
LABELS = torch.cat((START, torch.tensor([[7, 8]])), dim=1)
CASES: dict[str, Given] = {
    "another position": Given("a state that goes to another position", locations={"sources->base": (6, 7)}),
    "subspaces": Given(
        "choosing subspaces",
        config(HIDDEN, subspace_partition=[[0, 64], [64, 128]]),
        options={"subspaces": 1},
    ),
    "linked": Given("linking interventions", two(intervention_link_key=0)),
    "serial": Given(
        "the mode serial",
        pyvene.IntervenableConfig([pyvene.RepresentationConfig(3, HIDDEN)], mode="serial"),
        locations={"source_0->base": 7},
    ),
    "addition": Given(
        "an intervention of type AdditionIntervention",
        config(HIDDEN, intervention_type=pyvene.AdditionIntervention),
    ),
    "a function": Given(
        "an intervention of type LambdaIntervention",
        pyvene.IntervenableConfig([{"component": HIDDEN, "intervention": adding}]),
    ),
    "rotated": Given(
        "an intervention of type RotatedSpaceIntervention",
        config("block_output", 3, intervention_type=pyvene.RotatedSpaceIntervention),
    ),
    "a constant source": Given(
        "an intervention with a constant source", config(HIDDEN, source_representation=torch.ones(128))
    ),
    "source representations": Given(
        "source_representations",
        sources=None,
        locations={"base": 7},
        options={"source_representations": torch.ones(128)},
    ),
    "additional arguments": Given(
        "intervention_additional_kwargs", options={"intervention_additional_kwargs": {"a": 1}}
    ),
    "use_cache": Given("use_cache", options={"use_cache": False}),
    "as_adaptor": Given("as_adaptor", made={"as_adaptor": True}),
    "use_fast": Given(
        "use_fast, by which all rows get row 0's position,",
        **TWO_ROWS,
        locations={"sources->base": (ROWS, ROWS)},
        made={"use_fast": True},
    ),
    "sources that differ": Given(
        "a call with several different sources",
        two(),
        sources=[CLEAN, inputs(0, 1)],
        locations={"sources->base": ([[[7]], [[4]]],) * 2},
    ),
    "no sources": Given("a call without sources", sources=None, locations=None),
    "sources that are none": Given("a call without sources", two(), sources=[None, None]),
    "a longer source": Given("a source whose question has another length", sources=[with_words(7)]),
    "padding": Given("padding in input_ids", base=padded(mask=False), sources=[padded(mask=False)]),
    "a mask": Given("an attention_mask that hides tokens", base=padded(mask=True)),
    "another input": Given(
        "the input output_attentions", base={**BASES["picture"], "output_attentions": True}
    ),
    "pixels": Given(
        "the image's pixel_values hold NaN or infinity",
        base={**BASES["picture"], "pixel_values": torch.full((1, 3, 64, 64), torch.nan)},
    ),
    "gradients": Given(
        "taking gradients",
        base={**BASES["picture"], "pixel_values": BASES["picture"]["pixel_values"].clone().requires_grad_()},
    ),
    "the embeddings": Given("the component 'block_input' of layer 0", config("block_input", 0)),
    "a query": Given("attention.self.query.output'", config(f"{ENCODER % 3}.attention.self.query.output")),
    "one picture": Given(
        "a state of the image encoder where both runs have one picture",
        config("model_vis.encoder.layers[1].output"),
        base=BASES["words"],
    ),
    "collecting a state": Given(
        "collecting anything but the decoder's logits",
        pyvene.IntervenableConfig(
            [
                {"component": HIDDEN, "intervention_type": VanillaIntervention},
                {"component": HIDDEN, "intervention_type": CollectIntervention},
            ]
        ),
        sources=[CLEAN, None],
        locations={"sources->base": ([[[7]], None], [[[7]], [[7, 8]]])},
    ),
    "everywhere in a part": Given(
        "locations of the source alone or of the base alone",
        locations={"sources->base": ([[list(range(9))]], [None])},
    ),
    "labels": Given(
        "an answer other than one token behind the start token",
        config("block_output", 3),
        base={**BASES["picture"], "labels": LABELS},
        sources=[{**CLEAN, "labels": LABELS}],
        raw=True,
    ),
    "the decoder, everywhere": Given(
        "a source whose answer has another length",
        config("text_decoder.bert.encoder.layer[1].output.dense.output"),
        base={**BASES["picture"], "labels": LABELS[:, :2]},
        sources=[{**CLEAN, "decoder_input_ids": START}],
        locations={"sources->base": ([None], [None])},
        raw=True,
    ),
    "the image of a model without wrapper": Given(
        "the image encoder of a model without pyvene's wrapper",
        config("vision_model.encoder.layers[1].output"),
        base={**BASES["picture"], "labels": LABELS[:, :2]},
        sources=[{**CLEAN, "labels": LABELS[:, :2]}],
        raw=True,
    ),
}


@pytest.fixture
def foreign() -> Iterator[Callable[[], list[str]]]:
    """Hooks of somebody else on our model; what they noted of a run of it afterwards."""
    fired: list[str] = []
    model = load("ours")
    model(**run(), output_hidden_states=True)  # installs transformers' own
    layer = model.text_encoder.encoder.layer[3]
    handles = [
        layer.register_forward_hook(lambda *_: fired.append("last")),
        layer.register_forward_hook(lambda *_, **__: fired.append("first"), prepend=True, with_kwargs=True),
        layer.register_forward_pre_hook(lambda *_: fired.append("before")),
    ]
    before = hooks(model)

    def after() -> list[str]:
        assert fired == [], "as with pyvene, they do not fire within a call"
        assert hooks(model) == before
        states = model.text_encoder(CLEAN["input_ids"], output_hidden_states=True)
        assert len(states.hidden_states) == LAYERS + 1
        return fired

    yield after
    for handle in handles:
        handle.remove()


def hooks(model: Any) -> list[tuple[int, ...]]:
    return [(*m._forward_hooks, -1, *m._forward_pre_hooks) for m in model.modules()]


def value(found: Any) -> torch.Tensor:
    """What there is to compare in what a call returned."""
    first, output = found
    collected = first[1] if isinstance(first, tuple) else []
    own = output["decoder_logits"] if "decoder_logits" in output else next(iter(output.values()))
    return torch.cat([own.flatten(), *(x.flatten() for x in collected)]).detach().nan_to_num()


@pytest.mark.parametrize("name", CASES)
def test_reasons(
    name: str, caplog: pytest.LogCaptureFixture, passes: list[int], foreign: Callable[[], list[str]]
) -> None:
    given = CASES[name]
    made, found = config(HIDDEN) if given.config is None else given.config, []
    for each, whose in ((ours, "ours"), (original, "pyvene")):
        torch.manual_seed(0)
        model = each(deepcopy(made), load(whose) if given.raw else None, **given.made)
        torch.manual_seed(0)
        for _ in range(2):
            sources = None if given.sources is None else list(given.sources)  # pyvene makes it longer
            found.append(model(given.base, sources, given.locations, **given.options))
    assert foreign() == ["before", "first", "last"]
    assert torch.equal(value(found[0]), value(found[2]))
    assert torch.equal(value(found[1]), value(found[3]))
    said = [r.message for r in caplog.records if r.name == "blip_trace.compat.pyvene"]
    assert len(said) == 1, "once for each reason"
    assert given.reason in said[0]
    assert said[0].endswith(": pyvene itself runs the call")
    assert passes == [] or name == "pixels"  # which the engine refuses


def test_a_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """For all objects together: a loop makes a new one for each layer."""
    for layer in (2, 3):
        made = ours(config("block_output", layer))
        for position in ((5, 6), (6, 7)):
            made(BASES["picture"], [CLEAN], {"sources->base": position})
    made(BASES["picture"], [CLEAN], {"sources->base": 7})[1]["image_embeds"]
    assert [record.message.split(" is not")[0] for record in caplog.records] == [
        "a state that goes to another position",
        "reading more of an output than decoder_logits",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


@pytest.mark.parametrize(
    ("component", "unit", "location"),
    [
        (HIDDEN, "pos", -1),
        (HIDDEN, "pos", 9),
        (HIDDEN, "pos", ([[[7], [7, 8]]], [[[7]]])),
        (HIDDEN, "h.pos", ([[[[1]], [[7]]]],) * 2),
        ("head_attention", "pos", 7),
        ("head_attention", "h.pos", ([[[[4]], [[7]]]],) * 2),
        (HIDDEN, "pos", (None, 7)),
    ],
)
def test_what_pyvene_refuses(
    component: str, unit: str, location: Any, foreign: Callable[[], list[str]]
) -> None:
    """It is refused as pyvene refuses it, and no hook is left or lost."""
    errors = []
    for each in (ours, original):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each has its own
            each(config(component, 3, unit))(BASES["picture"], [CLEAN], {"sources->base": location})
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert foreign() == ["before", "first", "last"]


@pytest.mark.parametrize(
    "given",
    [
        Given("rows", **(TWO_ROWS | {"sources": [CLEAN]}), locations={"sources->base": (ROWS, ROWS)}),
        Given("labels for the wrapper", options={"labels": LABELS}),
        Given("no answer", config("block_output", 3), raw=True),
        Given(
            "labels of one of two runs",
            config("block_output", 3),
            sources=[{**CLEAN, "labels": LABELS[:, :2]}],
            options={"labels": LABELS[:, :2], "output_original_output": True},
            raw=True,
        ),
        Given("group keys", two(group_key=3)),
        Given(
            "another position of the decoder",
            [
                {"component": "model_text_dec.output", "intervention_type": CollectIntervention},
                {"component": HIDDEN, "intervention_type": VanillaIntervention},
            ],
            sources=[None, CLEAN],
            locations={"sources->base": ([None, [[7]]], [[[1]], [[7]]])},
        ),
    ],
    ids=lambda given: given.reason,
)
def test_calls_that_pyvene_refuses(given: Given, foreign: Callable[[], list[str]]) -> None:
    errors = []
    for each, whose in ((ours, "ours"), (original, "pyvene")):
        made = each(given.config or config(HIDDEN), load(whose) if given.raw else None)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - each has its own
            made(given.base, list(given.sources), given.locations, **given.options)
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]
    assert foreign() == ["before", "first", "last"]


def test_a_config_that_changes_what_is_returned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, labels = load("ours"), LABELS[:, :2]
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    ours(config("block_output", 3), model)(
        {**BASES["picture"], "labels": labels}, [{**CLEAN, "labels": labels}], {"sources->base": 7}
    )
    assert caplog.records[-1].message.startswith("a model whose config changes what it returns")
