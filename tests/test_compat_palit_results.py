"""What the notebooks' functions take and give back, and their model."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from PIL.Image import Image
from test_compat_palit import IMAGE, LAYERS, QUESTION, TOKENS, TOLERANCE, clean_input, pair, run
from torch import Tensor, nn
from transformers import BlipConfig, BlipForQuestionAnswering, BlipProcessor

from blip_trace import engine
from blip_trace.compat import palit
from blip_trace.compat.models import tracer_of
from blip_trace.compat.palit import attention
from blip_trace.compat.palit.layers import STATES
from blip_trace.lowering.load import shipped_model

MAIN = ["scores", "low_score", "high_score", "question", "answer", "correct_prediction", "block_name"]


class TestResults:
    def test_as_in_the_main_notebook(self) -> None:
        flow = palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder")
        assert list(flow) == MAIN
        assert flow["scores"].dtype == torch.float32
        assert flow["scores"].shape == (TOKENS, LAYERS)
        assert isinstance(flow["low_score"], float)
        assert flow["high_score"].shape == (2,)
        assert flow["high_score"][0] == flow["high_score"][1]
        assert flow["question"] == QUESTION
        assert flow["answer"] == "circle"
        assert flow["correct_prediction"] is True
        assert flow["block_name"] == "text_encoder"
        assert flow.tokens == ("[CLS]", *QUESTION.split(), "[SEP]")
        assert flow.layers == range(LAYERS)

    @pytest.mark.parametrize("faithful", [True, False])
    def test_as_in_the_attention_notebook(self, faithful: bool) -> None:
        flow = attention.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", faithful=faithful)
        assert list(flow) == [*MAIN, "kind"]
        assert flow["kind"] is None
        assert flow.tokens == ("[DEC]",)
        assert flow["high_score"].shape == (2,)

    @pytest.mark.parametrize("faithful", [True, False])
    @pytest.mark.parametrize(
        ("expect", "right"), [("circle", True), (" A Circle.", True), ("square", False), (None, True)]
    )
    def test_expected_answers(self, expect: str | None, right: bool, faithful: bool) -> None:
        flow = palit.calculate_hidden_flow(
            *pair(), IMAGE, QUESTION, "text_decoder", None, expect, faithful=faithful
        )
        assert flow["correct_prediction"] is right

    def test_the_whole_answer_is_compared(self) -> None:
        """Of several tokens, of which only the first is traced."""
        asked = "where in the picture is the square"
        flow = palit.calculate_hidden_flow(*pair(), IMAGE, asked, "text_decoder", None, "bottom center")
        assert flow["answer"] == "bottom"
        assert flow["correct_prediction"] is True
        flow = palit.calculate_hidden_flow(*pair(), IMAGE, asked, "text_decoder", None, "bottom")
        assert flow["correct_prediction"] is False

    def test_copies(self) -> None:
        flow = palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", samples=2)
        for again in (pickle.loads(pickle.dumps(flow)), copy.copy(flow), copy.deepcopy(flow)):
            assert torch.equal(again["scores"], flow["scores"])
            assert again.tokens == flow.tokens
            assert again.settings == flow.settings

    def test_loops_that_average(self) -> None:
        """The cells of both notebooks that add results up and divide them by their number."""
        total: Any = torch.zeros(TOKENS, LAYERS)
        lows = 0.0
        for seed in range(2):
            result = palit.plot_average_hidden_flow(
                *pair(), IMAGE, QUESTION, "text_encoder", samples=2, seed=seed
            )
            high = result["high_score"].cpu().detach()
            total += (result["scores"] - result["low_score"]) / (high[0] - result["low_score"])
            lows += result["low_score"]
        assert total.shape == (TOKENS, LAYERS)
        result = attention.plot_kindavg_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", "attention")
        assert result["kind"] == "attention"
        result["scores"] -= result["low_score"]  # in place, as some do


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cells of each pass of the engine from now on."""
    passes: list[int] = []
    begin = engine.begin

    def counted(program: Any, ops: Any, tasks: Any, *rest: Any) -> Any:
        passes.append(sum(len(task.cells) for task in tasks))
        return begin(program, ops, tasks, *rest)

    monkeypatch.setattr(engine, "begin", counted)
    return passes


def test_a_map_is_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = count_passes(monkeypatch)
    palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder")
    assert passes == [TOKENS * LAYERS]
    palit.trace_important_states(*pair(), 0, LAYERS, "text_encoder", IMAGE, QUESTION, 5)
    assert passes[1:] == [TOKENS * LAYERS]
    palit.trace_with_patch(*pair(), IMAGE, QUESTION, 5, [(1, "model_text_enc.encoder.layer.1")])
    assert passes[2:] == [1]
    attention.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", "attention", faithful=True)
    assert passes[3:] == [TOKENS * LAYERS]


def test_no_hooks_are_left() -> None:
    model = pair()[0].model
    palit.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_decoder", faithful=True)
    attention.calculate_hidden_flow(*pair(), IMAGE, QUESTION, "text_encoder", "attention")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_a_picture_on_its_side() -> None:
    """By its EXIF data: turned upright, but not in the notebooks."""
    turned = IMAGE.copy()
    turned.getexif()[0x0112] = 6
    upright = IMAGE.rotate(-90)
    trace = [*pair(), QUESTION, "text_decoder"]

    def score(image: Image, **options: Any) -> Tensor:
        return palit.calculate_hidden_flow(*trace[:2], image, *trace[2:], **options)["scores"]

    assert torch.equal(score(turned), score(upright))
    assert not torch.equal(score(turned), score(IMAGE))
    for notebook in ("main", "attention"):
        own = []
        for image in (turned, IMAGE):
            torch.manual_seed(0)
            own.append(score(image, faithful=True, notebook=notebook))
        assert torch.equal(*own)


SIGNATURES = {
    "make_inputs": "mt new_model image question device=None",
    "predict_from_input": "new_model tup",
    "result_gen": "output return_p=False",
    "decoding": "mt pred_prob",
    "layername": "model num block_name kind=None",
    "noisy_embedding": "image_embed_tensor noise=5.0 percentage_dimensions=1",
    "trace_with_patch": "mt new_model image question pred_ans patching_layers replace=False "
    "trace_layers=None",
    "trace_important_states": "mt new_model start num_layers block_name image question pred_ans num=None "
    "replace=False",
    "trace_important_window": "mt new_model start num_layers block_name image question pred_ans kind "
    "window=3 num=None replace=False",
    "calculate_hidden_flow": "mt new_model image question block_name kind=None expect=None",
    "plot_hidden_flow": "mt new_model image question block_name savepdf=None",
    "plot_average_hidden_flow": "mt new_model image question block_name savepdf=None",
    "plot_all_flow": "mt new_model image question savepdf=None subject=None",
    "plot_kind_hidden_flow": "mt new_model image question block_name kind savepdf=None",
    "plotkind_all_flow": "mt new_model image question savepdf=None subject=None",
    "plot_trace_heatmap": "result savepdf=None title=None xlabel=None modelname=None",
    "plot_kindtrace_heatmap": "result savepdf=None title=None xlabel=None modelname=None",
    "plot_map": "result differences savepdf=None title=None xlabel=None modelname=None",
    "avgnormal_heatmap": "result block_name savepdf=None title=None xlabel=None modelname=None",
    "avg_heatmap": "result block_name savepdf=None title=None xlabel=None modelname=None",
}
IN_ATTENTION = {
    "noisy_embedding": "image_embed_tensor uniform_noise=True noise=0.7691 percentage_dimensions=1",
    "avgnormal_heatmap": "result block_name kind savepdf=None title=None xlabel=None modelname=None",
    "plot_kindavg_hidden_flow": SIGNATURES["plot_kind_hidden_flow"],
}
MAIN_ONLY = {"avg_heatmap", "plot_map", "plot_average_hidden_flow"}


def positional(function: Any) -> str:
    """The arguments that the notebooks have: what is new is by keyword only."""
    return " ".join(
        each.name if each.default is each.empty else f"{each.name}={each.default!r}"
        for each in inspect.signature(function).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD
    )


def test_signatures() -> None:
    for name, expected in SIGNATURES.items():
        assert positional(getattr(palit, name)) == expected, name
    for name, expected in {**SIGNATURES, **IN_ATTENTION}.items():
        if name not in MAIN_ONLY:
            assert positional(getattr(attention, name)) == expected, name
    for module in (palit, attention):
        assert sorted(module.__all__) == module.__all__
        assert all(hasattr(module, name) for name in module.__all__)


class TestModel:
    def test_loaded_by_name(self) -> None:
        mt = palit.ModelandProcessor(str(shipped_model()), pair()[0].model)
        assert mt.model is pair()[0].model
        assert isinstance(mt.processor, BlipProcessor)
        mt = palit.ModelandProcessor(
            str(shipped_model()), processor=pair()[0].processor, torch_dtype=torch.bfloat16
        )
        assert mt.processor is pair()[0].processor
        assert mt.model.dtype == torch.bfloat16
        assert palit.calculate_hidden_flow(
            mt, palit.customblip_temp(mt.model), IMAGE, QUESTION, "text_decoder", samples=2
        )["scores"].shape == (1, LAYERS)

    def test_names_and_numbers(self) -> None:
        mt, _ = pair()
        assert mt.num_layers == LAYERS
        assert len(mt.layer_names) == 3 * LAYERS
        assert mt.layer_names[0] == "vision_model.encoder.layers.0"
        assert mt.layer_names[-1] == "text_decoder.bert.encoder.layer.3"
        assert repr(mt) == (
            "ModelandProcessor(model: BlipForQuestionAnswering [4 layers], processor: BlipProcessor)"
        )

    def test_layers_are_those_of_the_text_stacks(self) -> None:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
        config = BlipConfig(
            text_config={**size, "num_hidden_layers": 3, "encoder_hidden_size": 32, "vocab_size": 51},
            vision_config={**size, "num_hidden_layers": 1, "image_size": 64, "patch_size": 8},
        )
        config.text_config.bos_token_id = 5
        torch.manual_seed(0)
        model = BlipForQuestionAnswering(config)
        mt = palit.ModelandProcessor(None, model, pair()[0].processor)
        assert mt.num_layers == 3
        flow = palit.calculate_hidden_flow(mt, palit.customblip_temp(model), IMAGE, QUESTION, "text_encoder")
        assert flow["scores"].shape == (TOKENS, 3)

    def test_inputs(self) -> None:
        mt, new_model = pair()
        image_embeds, input_ids = palit.make_inputs(mt, new_model, IMAGE, QUESTION)
        states, ids = clean_input()
        assert image_embeds.shape == (2, 65, 128)
        assert image_embeds.device.type == "cpu"
        assert torch.equal(image_embeds[0], image_embeds[1])
        assert (image_embeds[0] - states[0]).abs().max() <= TOLERANCE
        assert torch.equal(input_ids, ids)
        assert not image_embeds.requires_grad
        palit.noisy_embedding(image_embeds)  # the rows do not share memory
        assert not torch.equal(image_embeds[0], image_embeds[1])
        two = new_model.image_embed([torch.zeros(1, 3, 64, 64)] * 3)
        assert two.shape == (3, 65, 128)

    def test_prediction(self) -> None:
        output = palit.predict_from_input(pair()[1], palit.make_inputs(*pair(), IMAGE, QUESTION))
        assert output.decoder_logits.shape == (2, 1, 51)
        assert output["image_embeds"].shape == (2, 65, 128)
        assert output.encoder_last_hidden_state.shape == (2, TOKENS, 128)
        assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
        assert len(output.encoder_hidden_states) == len(output.decoder_hidden_states) == LAYERS + 1
        assert not output.decoder_logits.requires_grad
        assert output[0] is output.decoder_logits
        preds, p = palit.result_gen(output)
        expected, answer = run(clean_input()[0]).max(-1)
        assert preds.tolist() == [int(answer)] * 2
        assert (p - expected).abs().max() <= TOLERANCE
        assert palit.decoding(pair()[0], (preds, p)) == "circle"

    def test_it_is_a_module_of_the_model_s_own_parts(self) -> None:
        mt, new_model = pair()
        assert new_model.model_text_dec is mt.model.text_decoder
        names = dict(new_model.named_modules())
        assert not any(name.startswith("source") for name in names)
        for block, stack in (
            ("text_encoder", mt.model.text_encoder),
            ("text_decoder", mt.model.text_decoder.bert),
        ):
            layer = stack.encoder.layer[2]
            assert names[palit.layername(new_model, 2, block)] is layer
            for kind in filter(None, STATES):
                assert names[palit.layername(new_model, 2, block, kind)] is layer.get_submodule(kind)
            assert names[palit.layername(new_model, 2, block, "embed")] is stack.embeddings
        assert palit.layername(new_model, 0, "text_decoder", "cls.decoder") in names
        assert tracer_of(copy.deepcopy(new_model).source) is not tracer_of(mt.model)

    def test_hooks_of_others_work_on_it(self) -> None:
        """A cell done by hand, with the notebooks' own means."""
        mt, new_model = pair()
        images, ids = palit.make_inputs(mt, new_model, IMAGE, QUESTION)
        palit.noisy_embedding(images, generator=torch.Generator().manual_seed(1))
        module = new_model.get_submodule(palit.layername(new_model, 3, "text_encoder"))

        def restore(_: nn.Module, __: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            states[1:, 6] = states[0, 6]

        handle = module.register_forward_hook(restore)
        with torch.no_grad():
            output = new_model(ids, images)
        handle.remove()
        answer = palit.result_gen(output)[0][0]
        expected = palit.trace_with_patch(
            *pair(),
            IMAGE,
            QUESTION,
            answer,
            [(6, palit.layername(new_model, 3, "text_encoder"))],
            faithful=True,
            generator=torch.Generator().manual_seed(1),
        )
        assert abs(float(output.decoder_logits[1, -1].softmax(-1)[answer] - expected)) <= TOLERANCE
