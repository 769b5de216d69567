"""Model folders and hub names to a checked BLIP and its processor.

Nothing in a folder is trusted: weights are read from safetensors alone (no pickle), no code is run, and a
model whose weights are not exactly those that its configuration names is refused.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError
from transformers import BlipConfig, BlipImageProcessorPil, BlipProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from .blip import MODELS, Blip

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHIPPED = {"vqa": "blip-shapes", "caption": "blip-shapes-caption", "match": "blip-shapes-match"}
"""The names of the models that come with the package, and their folders."""
NAMED_KEYS = 3
"""How many weights an error names."""


def parse_dtype(name: str) -> torch.dtype:
    """The type called "float32" or "bfloat16". Raises ValueError for any other name."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: choose among {', '.join(DTYPES)}")
    return DTYPES[name]


def shipped_model(name: str = "vqa") -> Path:
    """The folder of a small trained model that comes with the package: "vqa" answers questions, "caption"
    writes captions and "match" matches texts with pictures.

    Raises ValueError for any other name, FileNotFoundError where this installation does not hold the model.
    """
    if name not in SHIPPED:
        raise ValueError(f"unknown model {name!r}: choose among {', '.join(SHIPPED)}")
    folder = Path(str(resources.files("blip_trace") / "assets" / SHIPPED[name]))
    if not (folder / SAFE_WEIGHTS_NAME).is_file():
        raise FileNotFoundError(f"the {name} model of blip_trace is missing from this installation")
    return folder


PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
"""Of which a model has some."""


def local_folder(hub_id_or_folder: str | Path) -> Path:
    """The folder in which a model's files are; those of a model on the hub are downloaded if need be.

    Raises as `load_model` does.
    """
    source = str(hub_id_or_folder)
    local = os.path.isdir(source)
    if not local:
        _check_hub_id(hub_id_or_folder)
    config = _find(source, local, "config.json")
    if config is None:
        raise ValueError(f"{source} is no model folder: it holds no config.json")
    _weight_files(source, local)
    for name in PROCESSOR_FILES:
        _find(source, local, name)
    return config.parent


def load_model(hub_id_or_folder: str | Path, dtype: torch.dtype) -> tuple[Blip, BlipProcessor]:
    """Load a BLIP that answers questions, writes captions or matches texts, and its processor (Pillow's
    resizing, never torchvision's).

    Raises ValueError where this is another kind of model, or its weights are missing, broken or not exactly
    those of its configuration (the first few are named); FileNotFoundError where there is no such folder;
    OSError where it, or the hub, cannot be read.
    """
    source = str(hub_id_or_folder)
    local = os.path.isdir(source)  # Path would take an empty name for the current folder
    if not local:
        _check_hub_id(hub_id_or_folder)
    config, kind = _load_config(source, local)
    _check_size(source, config, _weight_files(source, local))
    with _quiet():
        return _load_weights(source, local, kind, config, dtype), _load_processor(source, local)


def _check_hub_id(source: str | Path) -> None:
    if os.path.isfile(source):
        raise ValueError(f"{source} is a file: a model is given by its folder or its name on the hub")
    # no owner/name: without this check the hub would be asked, for half a minute where there is no network
    if isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no model folder {str(source)!r} (a name on the hub is owner/name)")


def _find(source: str, local: bool, name: str) -> Path | None:
    """A file of the model, downloaded if need be; None where the model does not have it."""
    if local:
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, HFValidationError) as error:
        raise OSError(f"the model {source} cannot be read: {_one_line(error)}") from error


def _load_config(source: str, local: bool) -> tuple[BlipConfig, type[Blip]]:
    raw = _read_json(source, _find(source, local, "config.json"), "config.json")
    kind = raw.get("model_type")
    if kind != "blip":
        raise ValueError(f"{source} is no BLIP model: its model_type is {kind!r}")
    known = {model.__name__: model for model in MODELS}
    classes = raw.get("architectures") or list(known)
    found = [known[name] for name in classes if name in known] if isinstance(classes, list) else []
    if not found:
        named = ", ".join(map(str, classes)) if isinstance(classes, list) else classes
        raise ValueError(f"{source} is a {named}: only {' and '.join(known)} can be traced")
    # both make transformers read weights in ways that are not checked here, one of them a pickle
    for entry in ("transformers_weights", "quantization_config"):
        if raw.get(entry):
            raise ValueError(f"the config.json of {source} asks for {entry}, which is not supported")
    try:
        return BlipConfig.from_dict(raw), found[0]
    except Exception as error:  # values of wrong types surface as almost any exception
        raise ValueError(f"the config.json of {source} is broken: {_one_line(error)}") from error


def _weight_files(source: str, local: bool) -> list[Path]:
    """The files from which transformers will read the weights: safetensors and nothing else, though an index
    may name any file."""
    whole = _find(source, local, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [whole]
    index = _find(source, local, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        raise ValueError(
            f"{source} holds no {SAFE_WEIGHTS_NAME}: weights are read from safetensors, never from a pickle"
        )
    shards = _read_json(source, index, index.name).get("weight_map")
    if not isinstance(shards, dict) or not all(_is_shard(name) for name in shards.values()):
        raise ValueError(f"the {index.name} of {source} names files that are no safetensors beside it")
    files = [_find(source, local, name) for name in sorted(set(shards.values()))]
    return [file for file in files if file is not None]


def _check_size(source: str, config: BlipConfig, files: Sequence[Path]) -> None:
    """Refuse a configuration that describes a far larger model than its files can hold: transformers would
    take the memory for it first and find the weights missing afterwards."""
    held = sum(file.stat().st_size for file in files)  # bytes, and no weight takes less than one
    try:
        described = _least_weights(config)
    except TypeError as error:
        raise ValueError(f"the config.json of {source} is broken: {_one_line(error)}") from error
    if described > 4 * held + 2**24:
        raise ValueError(
            f"the config.json of {source} describes at least {described:.2g} weights, but its files are of "
            f"{held:.2g} bytes"
        )


def _least_weights(config: BlipConfig) -> int:
    """How many weights a model of this configuration has at the least."""
    text, vision = config.text_config, config.vision_config

    def layer(width: int, inner: int) -> int:
        return 4 * width * width + 2 * width * inner

    least: int = (
        text.hidden_size * (text.vocab_size + text.max_position_embeddings)
        + 2 * text.num_hidden_layers * layer(text.hidden_size, text.intermediate_size)
        + vision.hidden_size * (vision.image_size // max(1, vision.patch_size)) ** 2
        + vision.hidden_size * 3 * vision.patch_size**2
        + vision.num_hidden_layers * layer(vision.hidden_size, vision.intermediate_size)
    )
    return least


def _is_shard(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _read_json(source: str, path: Path | None, name: str) -> dict[str, Any]:
    if path is None:
        raise ValueError(f"{source} is no model folder: it holds no {name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the {name} of {source} is no JSON: {_one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"the {name} of {source} holds no JSON object")
    return content


def _load_weights(source: str, local: bool, kind: type[Blip], config: BlipConfig, dtype: torch.dtype) -> Blip:
    try:
        model, report = kind.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            local_files_only=local,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # reported below, together with the others
            output_loading_info=True,
        )
    except OSError:
        raise
    except Exception as error:  # a broken file, or sizes in the config that no model can have
        raise ValueError(f"the weights of {source} cannot be loaded: {_one_line(error)}") from error
    mismatched = [
        f"{name} (in the file {list(found)}, in the model {list(wanted)})"
        for name, found, wanted in report["mismatched_keys"]
    ]
    problems = {
        "missing": report["missing_keys"],
        "unexpected": report["unexpected_keys"],
        "of another shape": mismatched,
    }
    found = [f"{len(names)} {what}: {_first(sorted(names))}" for what, names in problems.items() if names]
    if found:
        raise ValueError(f"the weights of {source} are not those of its config.json: {'; '.join(found)}")
    return model


def _first(names: Sequence[str]) -> str:
    more = ", …" if len(names) > NAMED_KEYS else ""
    return ", ".join(names[:NAMED_KEYS]) + more


def _load_processor(source: str, local: bool) -> BlipProcessor:
    # without its vocabulary transformers makes a tokenizer that knows no word, and does not complain
    if not any(_find(source, local, name) for name in ("tokenizer.json", "vocab.txt")):
        raise ValueError(f"{source} holds no tokenizer: neither tokenizer.json nor vocab.txt")
    try:
        processor = BlipProcessor.from_pretrained(
            source, backend="pil", local_files_only=local, trust_remote_code=False
        )
    except Exception as error:  # missing or broken files surface as almost any exception
        raise ValueError(f"the processor of {source} cannot be loaded: {_one_line(error)}") from error
    if not isinstance(processor.image_processor, BlipImageProcessorPil):
        name = type(processor.image_processor).__name__
        raise ValueError(f"the image processor of {source} is a {name}, not that of BLIP")
    return processor


def _one_line(error: Exception) -> str:
    text = f"{type(error).__name__} {error}" if isinstance(error, KeyError) else str(error)
    return textwrap.shorten(text, 240, placeholder=" …") or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' loading bars and reports away: what is wrong is raised, in one sentence."""
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    # disable_progress_bar() would also switch off the hub's bars, whose state could not be put back
    hook = logging.set_tqdm_hook(lambda _, args, __: logging.EmptyTqdm(*args))
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.set_tqdm_hook(hook)
