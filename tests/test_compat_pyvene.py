"""`compat.pyvene` gives the numbers and the results of pyvene's own loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import pyvene
import torch
from pyvene import VanillaIntervention
from pyvene.models.blip.modelings_blip import BlipWrapper
from pyvene.models.constants import CONST_INPUT_HOOK, split_head_and_permute
from test_compat_nnsight import HEADS, LAYERS, TOKENS, assert_same, pictures, question
from torch import Tensor
from transformers import BlipForQuestionAnswering

from blip_trace import Tracer, shipped_model
from blip_trace.compat import pyvene as pv

ENCODER = "model_text_enc.encoder.layer[%d]"
Inputs = dict[str, Tensor]


class Wrapper(BlipWrapper):  # type: ignore[misc]
    """What a user of pyvene 0.1.8 must write: its wrapper does not say where the model is."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


def register_heads() -> None:
    """The heads of both attentions as components, as pyvene asks for it; a type has its own tables."""
    for table in (pyvene.type_to_module_mapping, pyvene.type_to_dimension_mapping):
        table[Wrapper] = dict(table[BlipWrapper])
    modules, widths = pyvene.type_to_module_mapping[Wrapper], pyvene.type_to_dimension_mapping[Wrapper]
    for name in ("attention", "crossattention"):
        place = f"model_text_enc.encoder.layer[%s].{name}.output.dense"
        modules[f"head_{name}"] = (place, CONST_INPUT_HOOK, (split_head_and_permute, "n_head"))
        widths[f"head_{name}"] = ("text_config.hidden_size/text_config.num_attention_heads",)
    widths["n_head"] = ("text_config.num_attention_heads",)


register_heads()


@cache
def load(whose: str) -> Any:
    """The shipped model, one for pyvene itself and one for us."""
    return BlipForQuestionAnswering.from_pretrained(shipped_model()).eval()


def inputs(picture: int = 0, text: int = 0) -> Inputs:
    return {"input_ids": question(text), "pixel_values": pictures()[picture]}


CLEAN = inputs()
BASES = {"picture": inputs(1), "words": inputs(0, 1), "both": inputs(1, 1)}


def config(component: str, layer: int = 0, unit: str = "pos", **fields: Any) -> pyvene.IntervenableConfig:
    fields = {"intervention_type": VanillaIntervention, **fields}
    return pyvene.IntervenableConfig([pyvene.RepresentationConfig(layer, component, unit, **fields)])


def original(made: Any, model: Any = None, **options: Any) -> Any:
    """pyvene's own object."""
    return pyvene.IntervenableModel(made, Wrapper(load("pyvene")) if model is None else model, **options)


def ours(made: Any, model: Any = None, **options: Any) -> Any:
    return pv.IntervenableModel(made, Wrapper(load("ours")) if model is None else model, **options)


def their_grid(
    configs: Sequence[Any], base: Inputs, locations: Sequence[Any], source: Inputs = CLEAN
) -> Tensor:
    """The loop of pyvene's tutorials: logits [configs, locations, 1, V]."""
    rows = []
    for made in map(original, configs):
        calls = [made(base, [source], location)[1]["decoder_logits"][0] for location in locations]
        rows.append(torch.stack(calls))
    return torch.stack(rows)


def our_grid(configs: Sequence[Any], base: Inputs, locations: Sequence[Any]) -> Tensor:
    """The same in one pass, which is counted: pyvene itself is not run."""
    grid = pv.interchange(Wrapper(load("ours")), configs, base, [CLEAN], locations)
    return torch.stack([torch.stack([call[1]["decoder_logits"][0] for call in row]) for row in grid])


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells each pass of the engine has had; what was logged before is forgotten."""
    pv.say.cache_clear()
    counted: list[int] = []
    plain = Tracer.logits

    def count(self: Tracer, image: Any, text: Any, cells: Any, **options: Any) -> Any:
        counted.append(len(cells))
        return plain(self, image, text, cells, **options)

    monkeypatch.setattr(Tracer, "logits", count)
    return counted


@pytest.fixture
def covered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing falls through to pyvene."""
    yield
    assert not caplog.records


def at(*tokens: int) -> list[dict[str, int]]:
    return [{"sources->base": token} for token in tokens]


INOUT = ("input", "output")
PLACES = (
    "",
    "attention",
    "attention.self",
    "attention.output",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "crossattention",
    "crossattention.self",
    "crossattention.output",
    "crossattention.output.dense",
    "crossattention.output.LayerNorm",
    "intermediate",
    "intermediate.dense",
    "output",
    "output.dense",
    "output.LayerNorm",
)


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("end", INOUT)
@pytest.mark.parametrize("name", PLACES)
def test_string_components(name: str, end: str, passes: list[int]) -> None:
    component = ".".join(filter(None, (ENCODER, name, end)))
    configs = [config(component % layer) for layer in (1, 2, 3)]
    mine = our_grid(configs, BASES["both"], at(4, 7, 8))
    assert passes == [9]
    assert_same(mine, their_grid(configs, BASES["both"], at(4, 7, 8)))


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize(("base", "component"), [("picture", "output"), ("words", "crossattention.output")])
def test_whole_grids(base: str, component: str, passes: list[int]) -> None:
    configs = [config(f"{ENCODER % layer}.{component}.output") for layer in range(LAYERS)]
    mine = our_grid(configs, BASES[base], at(*range(TOKENS)))
    assert passes == [LAYERS * TOKENS]
    assert_same(mine, their_grid(configs, BASES[base], at(*range(TOKENS))))


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize(
    "component",
    [
        "block_output",
        "block_input",
        "attention_output",
        "attention_input",
        "attention_value_output",  # of which pyvene exchanges head 0 alone
        "mlp_output",
        "mlp_input",
        "mlp_activation",
    ],
)
def test_named_components(component: str) -> None:
    configs = [config(component, layer) for layer in (1, 2, 3)]
    mine = our_grid(configs, BASES["both"], at(4, 7, 8))
    assert_same(mine, their_grid(configs, BASES["both"], at(4, 7, 8)))


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("component", ["head_attention", "head_crossattention"])
def test_heads(component: str) -> None:
    """One head at a token, two heads at two tokens, all tokens of a head, and no location: the first
    channels, which are head 0's."""
    base = BASES["both" if component == "head_attention" else "picture"]

    def nested(heads: list[int], tokens: list[int]) -> dict[str, Any]:
        return {"sources->base": ([[[heads], [tokens]]],) * 2}

    layers = [1, 2, 3]
    each = [nested([head], [token]) for head in range(HEADS) for token in (4, 7)]
    locations = [*each, nested([0, 2], [4, 7]), nested([1, 2, 3], [7]), {"sources->base": ([None], [None])}]
    configs = [config(component, layer, "h.pos") for layer in layers]
    assert_same(our_grid(configs, base, locations), their_grid(configs, base, locations))
    configs = [config(component, layer, "h") for layer in layers]
    assert_same(our_grid(configs, base, at(0, 1, 2)), their_grid(configs, base, at(0, 1, 2)))
    configs = [config(component, layer, "h.pos", max_number_of_units=2) for layer in layers]
    locations = [nested([0, 2], [4, 7]), nested([3], [7]), nested([1], [8])]
    assert_same(our_grid(configs, base, locations), their_grid(configs, base, locations))


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize(
    ("components", "tokens"),
    [
        ([f"model_text_dec.bert.encoder.layer[{layer}].output" for layer in range(4)], [0]),
        (
            [f"model_text_dec.bert.encoder.layer[{layer}].crossattention.self.output" for layer in range(4)],
            [0],
        ),
        (["model_text_dec.bert.output", "model_text_dec.bert.encoder.layer[1].intermediate.input"], [0]),
        (["model_text_enc.output", "model_text_enc.encoder.output"], [4, 7, 8]),
        ([f"model_vis.encoder.layers[{layer}].output" for layer in (0, 3)], [0, 52, 61]),
        ([f"model_vis.encoder.layers[{layer}].input" for layer in (1, 3)], [0, 52, 61]),
        ([f"model_vis.encoder.layers[{layer}].layer_norm1.input" for layer in (1, 3)], [0, 52, 61]),
        ([f"model_vis.encoder.layers[{layer}].layer_norm2.output" for layer in (0, 3)], [0, 52, 61]),
        ([f"model_vis.encoder.layers[{layer}].mlp.{end}" for layer in (0, 3) for end in INOUT], [0, 52, 61]),
        ([f"model_vis.encoder.layers[{layer}].mlp.fc1.{end}" for layer in (0, 3) for end in INOUT], [52, 61]),
        ([f"model_vis.encoder.layers[{layer}].mlp.fc2.{end}" for layer in (0, 3) for end in INOUT], [52, 61]),
        ([f"model_vis.encoder.layers[3].self_attn.projection.{end}" for end in INOUT], [0, 52, 61]),
        (["model_vis.encoder.layers[3].self_attn.output"], [0, 52, 61]),
        (["model_vis.output", "model_vis.encoder.output"], [0, 52, 61]),
    ],
)
def test_other_stacks(components: list[str], tokens: list[int]) -> None:
    configs = [config(component) for component in components]
    mine = our_grid(configs, BASES["picture"], at(*tokens))
    assert_same(mine, their_grid(configs, BASES["picture"], at(*tokens)))


ONE_CALL: dict[str, Any] = {
    "a number": 6,
    "a pair": (7, 7),
    "a list": [5, 6, 8],
    "rows": ([[[7]]], [[[7]]]),
    "two units": ([[[4, 7]]], [[[4, 7]]]),
    "a unit twice": ([[[8, 8]]], [[[8, 8]]]),
    "everywhere": ([None], [None]),
}


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("named", [True, False])
def test_forms_of_locations(named: bool, passes: list[int]) -> None:
    component = "block_output" if named else f"{ENCODER % 3}.output"
    locations = [{"sources->base": form} for form in ONE_CALL.values()]
    configs = [config(component, 3, max_number_of_units=2)]
    mine = our_grid(configs, BASES["picture"], [*locations, None])
    assert passes == [8]
    assert_same(mine, their_grid(configs, BASES["picture"], [*locations, None]))


def stacked(*rows: Inputs) -> Inputs:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.usefixtures("covered")
def test_rows_of_a_batch(passes: list[int]) -> None:
    """Each with its own position; those with the same inputs share a pass."""
    base = stacked(*[BASES["picture"]] * TOKENS)
    source = stacked(*[CLEAN] * TOKENS)
    rows = [[[token] for token in range(TOKENS)]]
    made = config(f"{ENCODER % 3}.output")
    arguments = (base, [source], {"sources->base": (rows, rows)})
    mine, theirs = (each(made)(*arguments)[1]["decoder_logits"] for each in (ours, original))
    assert passes == [TOKENS]
    assert_same(mine, theirs)

    base = stacked(BASES["picture"], BASES["words"], BASES["both"], BASES["picture"])
    source = stacked(CLEAN, CLEAN, CLEAN, inputs(0, 1))
    rows = [[[7, 8], [4, 7], [7, 6], [1, 7]]]
    arguments = (base, [source], {"sources->base": (rows, rows)})
    mine, theirs = (each(made)(*arguments)[1]["decoder_logits"] for each in (ours, original))
    assert passes[1:] == [1, 1, 1, 1]
    assert_same(mine, theirs)


@pytest.mark.usefixtures("covered")
@pytest.mark.parametrize("groups", [(None, None), (0, 0), (0, 1)])
@pytest.mark.parametrize("given", ["one", "each", "the second"])
def test_several_representations(groups: Any, given: str) -> None:
    """Restored together from one source, given once or for each group; a source None leaves its group out."""
    fields = {"unit": "pos", "intervention_type": VanillaIntervention}
    made = pyvene.IntervenableConfig(
        [
            {"component": f"{ENCODER % 2}.crossattention.output.dense.output", "group_key": groups[0]}
            | fields,
            {"component": f"{ENCODER % 3}.crossattention.output.dense.output", "group_key": groups[1]}
            | fields,
        ]
    )
    if groups == (0, 0) and given != "one":
        return
    sources = {"one": [CLEAN], "each": [CLEAN, dict(CLEAN)], "the second": [None, CLEAN]}[given]
    every = []
    for first, second in ((7, 7), (6, 7), (7, 8), (1, 2)):
        location = {"sources->base": ([[[first]], [[second]]],) * 2}
        calls = (each(made)(BASES["picture"], list(sources), location)[1] for each in (ours, original))
        every.append([call["decoder_logits"] for call in calls])
    assert_same(*(torch.cat(own) for own in zip(*every, strict=True)))


def test_a_grid_is_the_loop_of_calls() -> None:
    """Nested as configs and locations are, each with what a call returns; pyvene does what is left over."""
    configs = [config("block_output", 3), config(f"{ENCODER % 3}.attention.self.query.output")]
    grid = pv.interchange(
        Wrapper(load("ours")), configs, BASES["picture"], CLEAN, at(6, 7), output_original_output=True
    )
    loop = [
        [original(made)(BASES["picture"], [CLEAN], place, output_original_output=True) for place in at(6, 7)]
        for made in configs
    ]
    assert [len(row) for row in grid] == [2, 2]
    mine, theirs = (
        torch.stack([part["decoder_logits"] for row in each for call in row for part in call])
        for each in (grid, loop)
    )
    assert_same(mine, theirs)


def test_the_rest_of_pyvene_is_here() -> None:
    assert pv.VanillaIntervention is VanillaIntervention
    assert pv.RepresentationConfig is pyvene.RepresentationConfig
    assert isinstance(pv.build_intervenable_model(config("block_output"), load("ours")), pv.IntervenableModel)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pv.nothing  # noqa: B018
