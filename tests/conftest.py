"""Fixtures shared by the tests: a tiny random BLIP with a real processor, and pictures."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
)
from transformers.utils import logging

from blip_trace import Tracer

# The models here are tiny: one thread is as fast as two, and on a busy machine many times faster, for two
# wait for each other at the end of every product.
torch.set_num_threads(1)

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[DEC]",
    "what",
    "color",
    "is",
    "the",
    "shape",
    "red",
    "blue",
    "?",
]


LONGEST = (
    "test_sweep_executors.py",
    "test_triton_interpreted.py",
    "test_sweep_bucket.py",
    "test_gpu_parity.py",
    "test_parity.py",
    "test_sweep_ray.py",
    "test_cuda_compiles.py",
)
"""Files that begin first, so that in the end nobody waits for one of them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All others stay in their order. Where there is a GPU, what stands in for one is not wanted."""
    if torch.cuda.is_available():
        items[:] = [item for item in items if item.get_closest_marker("without_gpu") is None]
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def tiny_config(**text: int) -> BlipConfig:
    """A BLIP of two layers a stack; `text` overrides entries of its text config."""
    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "initializer_range": 0.3,  # larger than usual: the cells of a map must differ
    }
    ids = {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    limits = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 16}
    return BlipConfig(
        text_config={**size, **ids, **limits, **text},
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )


def save_tiny_model(folder: Path, **text: int) -> None:
    """Write a tiny random model and its processor."""
    torch.manual_seed(0)
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}, bos_token="[DEC]")
    logging.disable_progress_bar()
    BlipForQuestionAnswering(tiny_config(**text)).save_pretrained(folder)
    logging.enable_progress_bar()
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("tiny-blip")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def picture() -> PIL.Image.Image:
    """A small picture with some structure."""
    return PIL.Image.radial_gradient("L").resize((50, 40)).convert("RGB")


@pytest.fixture(scope="session")
def tiny_tracer(tiny_folder: Path) -> Tracer:
    """A tracer of the tiny model, in plain torch; tests must not change its model."""
    return Tracer.from_pretrained(tiny_folder, backend="reference")
