"""Model folders that are not what they should be are refused in one sentence, and nothing in them is run."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipImageProcessorPil
from transformers.utils import logging as transformers_logging

from blip_trace.lowering.load import load_model, parse_dtype, shipped_model

WEIGHTS = "model.safetensors"
WORDS = "text_decoder.bert.embeddings.word_embeddings.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def edit_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def edit_text_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", text_config={**config["text_config"], **entries})


def edit_weights(folder: Path, **weights: torch.Tensor | None) -> None:
    """Replace, add or (None) remove weights; dots in names are written as two underscores."""
    state = load_file(folder / WEIGHTS)
    for name, weight in weights.items():
        if weight is None:
            del state[name.replace("__", ".")]
        else:
            state[name.replace("__", ".")] = weight
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def refused(folder: str | Path, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match) as caught:
        load_model(folder, torch.float32)
    assert "\n" not in str(caught.value)


def test_dtypes() -> None:
    assert (parse_dtype("float32"), parse_dtype("bfloat16")) == (torch.float32, torch.bfloat16)
    for name in ("float16", "int8", "", "torch.float32"):
        with pytest.raises(ValueError, match="unknown dtype"):
            parse_dtype(name)


def test_loads_in_either_type(tiny_folder: Path) -> None:
    whole, processor = load_model(tiny_folder, torch.float32)
    half, _ = load_model(str(tiny_folder), torch.bfloat16)
    assert isinstance(processor.image_processor, BlipImageProcessorPil)
    assert processor.tokenizer("what color ?").input_ids == [2, 6, 7, 13, 3]
    rounded = half.state_dict()
    for name, weight in whole.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight.bfloat16(), rounded[name]), name
    assert not whole.training


def test_the_shipped_model_loads() -> None:
    model, processor = load_model(shipped_model(), torch.float32)
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "vocab.txt"])
def test_the_hubs_older_layout(folder: Path, vocabulary: str) -> None:
    processor = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "processor_config.json").unlink()
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**processor, "processor_class": "BlipProcessor"})
    )
    if vocabulary == "vocab.txt":
        words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.get)))
    _, loaded = load_model(folder, torch.float32)
    assert isinstance(loaded.image_processor, BlipImageProcessorPil)
    assert loaded.image_processor.size["height"] == 32
    assert loaded.tokenizer("what color ?").input_ids == [2, 6, 7, 13, 3]


def test_weights_of_older_checkpoints(folder: Path, tiny_folder: Path) -> None:
    """Such as Salesforce/blip-vqa-base: position_ids and tied weights are written out."""
    state = load_file(folder / WEIGHTS)
    edit_weights(
        folder,
        text_encoder__embeddings__position_ids=torch.arange(16)[None],
        text_decoder__bert__embeddings__position_ids=torch.arange(16)[None],
        text_decoder__cls__predictions__decoder__weight=state[WORDS].clone(),
        text_decoder__cls__predictions__decoder__bias=state["text_decoder.cls.predictions.bias"].clone(),
    )
    old, new = (load_model(path, torch.float32)[0].state_dict() for path in (folder, tiny_folder))
    assert all(torch.equal(old[name], weight) for name, weight in new.items())


def test_weights_in_shards(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "part.safetensors")
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(folder / "part.safetensors"), "part.safetensors"),
    }
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    load_model(folder, torch.float32)
    for name in ("part.bin", "../part.safetensors", 3):
        index["weight_map"] = {WORDS: name}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
        refused(folder, "no safetensors beside it")


def test_no_model_folder(tmp_path: Path) -> None:
    for name in (tmp_path / "missing", str(tmp_path / "missing"), "missing", "", "./a/b", Path("a/b")):
        refused(name, "there is no model folder", FileNotFoundError)
    refused(tmp_path, "holds no config.json")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "is a file")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/has-this-model", "the model nobody/has-this-model cannot be read", OSError)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: edit_json(f / "config.json", model_type="vilt"), "its model_type is 'vilt'"),
        (
            lambda f: edit_json(f / "config.json", architectures=["BlipModel"]),
            "is a BlipModel: only BlipForQuestionAnswering",
        ),
        (lambda f: (f / "config.json").write_text("{"), "no JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "no JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "no JSON object"),
        (lambda f: edit_json(f / "config.json", text_config="none"), "config.json of .* is broken"),
        (lambda f: edit_json(f / "config.json", transformers_weights="adapter_model.bin"), "not supported"),
        (lambda f: edit_text_config(f, hidden_size="wide"), "hidden_size"),
        (lambda f: edit_text_config(f, num_attention_heads=0), "cannot be loaded"),
        (lambda f: edit_text_config(f, num_attention_heads=3), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "processor of .* cannot be loaded"),
        (lambda f: (f / "processor_config.json").unlink(), "processor of .* cannot be loaded"),
        (lambda f: (f / "processor_config.json").write_text("?"), "processor of .* cannot be loaded"),
    ],
)
def test_broken_descriptions(folder: Path, spoil: Callable[[Path], Any], match: str) -> None:
    spoil(folder)
    refused(folder, match)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda f: edit_weights(f, text_encoder__embeddings__LayerNorm__bias=None),
            "1 missing: text_encoder.embeddings.LayerNorm.bias$",
        ),
        (lambda f: edit_weights(f, itm_head__weight=torch.ones(2, 32)), "1 unexpected: itm_head.weight$"),
        (
            lambda f: edit_weights(f, vision_model__post_layernorm__bias=torch.ones(9)),
            re.escape("vision_model.post_layernorm.bias (in the file [9], in the model [32])"),
        ),
        (lambda f: edit_text_config(f, num_hidden_layers=3), "52 missing: .*, …"),
        (lambda f: edit_text_config(f, num_hidden_layers=1), "52 unexpected: .*, …"),
    ],
)
def test_weights_that_are_not_the_configs(folder: Path, spoil: Callable[[Path], Any], match: str) -> None:
    spoil(folder)
    refused(folder, match)


@pytest.mark.parametrize(
    "claim",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": 10**7},
        {"intermediate_size": 10**8},
        {"vocab_size": 10**9},
        {"max_position_embeddings": 10**9},
    ],
)
def test_a_description_beyond_what_the_files_hold(folder: Path, claim: dict[str, int]) -> None:
    # before any memory is taken for it
    edit_text_config(folder, **claim)
    refused(folder, "describes at least .* weights, but its files are of")


@pytest.mark.parametrize(
    "broken",
    [
        lambda whole: b"",
        lambda whole: whole[:1000],
        lambda whole: whole[:-100],
        lambda whole: whole + b"more",
        lambda whole: (2**62).to_bytes(8, "little") + whole[8:],  # a header beyond the file
        lambda whole: (len(whole) + 10).to_bytes(8, "little") + whole[8:],
        lambda whole: (60).to_bytes(8, "little") + b'{"a":' + b"[" * 55,
        lambda whole: whole.replace(b"F32", b"F99", 1),
        lambda whole: whole.replace(b"[0,", b"[9,", 1),  # offsets that overlap
        lambda whole: b"PK\x03\x04" + whole[4:],
    ],
)
def test_broken_weights(folder: Path, broken: Callable[[bytes], bytes]) -> None:
    (folder / WEIGHTS).write_bytes(broken((folder / WEIGHTS).read_bytes()))
    refused(folder, "the weights of .* cannot be loaded")


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", WEIGHTS])
def test_a_pickle_is_never_read(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "ran"
    (folder / WEIGHTS).unlink()
    torch.save({WORDS: _Evil(mark)}, folder / name)
    refused(folder, "safetensors, never from a pickle" if name != WEIGHTS else "cannot be loaded")
    assert not mark.exists()


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    auto = {**dict.fromkeys(classes, "evil.Evil"), "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        edit_json(folder / name, auto_map=auto)
    load_model(folder, torch.float32)
    assert not mark.exists()


def test_loading_is_quiet_and_leaves_no_trace(
    folder: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(folder, itm_head__weight=torch.ones(2, 32))
    transformers_logging.set_verbosity(logging.INFO)
    try:
        refused(folder, "unexpected")
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        transformers_logging.set_verbosity(logging.WARNING)
    assert transformers_logging.set_tqdm_hook(None) is None
    assert capfd.readouterr() == ("", "")
