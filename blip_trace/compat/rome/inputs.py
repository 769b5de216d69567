"""ROME's batches for BLIP: a question and its picture, row 0 clean, the others to be corrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor

from ...devices import parse_device
from ...images import open_image
from ...lowering.load import load_model, parse_dtype
from ..layers import layer_name
from ..models import UnsupportedError, check_answers

Image = str | Path | PIL.Image.Image | Tensor
QUESTION_WORDS = ("Who", "What", "Where", "When", "Which", "Why")


class ModelAndTokenizer:
    """A BLIP that answers questions, and what prepares its questions and pictures.

    model_name: a name on the hub, a folder, or `blip_trace.shipped_model()`; left out where `model` and
    `tokenizer` are given. tokenizer: the model's processor (`BlipProcessor`), which holds the tokenizer;
    afterwards `tokenizer` is that, and `processor` the whole. low_cpu_mem_usage: transformers 5 always does
    so. torch_dtype: torch.float32 unless given, or torch.bfloat16.

    Raises ValueError and OSError as `Tracer.from_pretrained`, ValueError where neither a name nor a model is
    given, TypeError for a tokenizer without a picture's processor, and UnsupportedError for a BLIP that does
    not answer questions.
    """

    def __init__(
        self,
        model_name: str | Path | None = None,
        model: Any = None,
        tokenizer: Any = None,
        low_cpu_mem_usage: bool = False,
        torch_dtype: torch.dtype | None = None,
    ) -> None:
        if model is None or tokenizer is None:
            if model_name is None:
                raise ValueError("give the name of a model, or a model and its processor")
            dtype = parse_dtype(str(torch_dtype or torch.float32).removeprefix("torch."))
            loaded, processor = load_model(model_name, dtype)
            model = loaded if model is None else model
            tokenizer = processor if tokenizer is None else tokenizer
        if not hasattr(tokenizer, "tokenizer") or not hasattr(tokenizer, "image_processor"):
            raise TypeError(
                f"questions about pictures need the model's processor, not a {type(tokenizer).__name__} alone"
            )
        check_answers(model)
        self.model = model.eval()
        self.processor = tokenizer
        self.tokenizer = tokenizer.tokenizer
        self.num_layers: int = model.config.text_config.num_hidden_layers
        self.layer_names = [layer_name("text_encoder", layer) for layer in range(self.num_layers)]

    def __repr__(self) -> str:
        return (
            f"ModelAndTokenizer({type(self.model).__name__} of {self.num_layers} layers, "
            f"{type(self.tokenizer).__name__})"
        )


class Batch(NamedTuple):
    """A checked batch: ids [B, T]; pixels [1, 3, H, W] where all rows see the same, else [B, 3, H, W]."""

    ids: Tensor
    pixels: Tensor

    def row(self, number: int) -> tuple[Tensor, Tensor]:
        """Pixels [1, 3, H, W] and ids [1, T] of a row."""
        pixels = self.pixels if len(self.pixels) == 1 else self.pixels[number : number + 1]
        return pixels, self.ids[number : number + 1]


def make_inputs(
    tokenizer: Any, prompts: Sequence[str], device: str = "cpu", *, image: Image
) -> dict[str, Tensor]:
    """A batch of questions about one picture, on a device: input_ids and attention_mask [B, T], pixel_values
    [B, 3, H, W].

    tokenizer: the model's processor; or its tokenizer, and then `image` must be pixel_values. image: a
    picture, its path, or pixel_values [1, 3, H, W].

    Raises UnsupportedError for questions of unequal length, ValueError where there are none and for a device
    that is not there, and ValueError, TypeError or OSError for pictures as `Tracer.trace` does.
    """
    where = parse_device(str(device))
    rows = [getattr(tokenizer, "tokenizer", tokenizer)(prompt).input_ids for prompt in prompts]
    if not rows:
        raise ValueError("no prompts given")
    if len({len(row) for row in rows}) > 1:
        raise UnsupportedError(
            "a batch of prompts of unequal length",
            "BLIP's cross-attention ignores the mask of padding (transformers 4.54 and later), so make a "
            "batch of each",
        )
    ids = torch.tensor(rows)
    pixels = _pixels(tokenizer, image)
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels.expand(len(rows), -1, -1, -1),
    }
    return {name: own.to(where) for name, own in made.items()}


def _pixels(processor: Any, image: Image) -> Tensor:
    if isinstance(image, Tensor):
        return image[None] if image.dim() == 3 else image
    if not hasattr(processor, "image_processor"):
        raise ValueError("without the model's processor an image must be given as pixel_values")
    pixels: Tensor = processor.image_processor(open_image(image), return_tensors="pt").pixel_values
    return pixels


def check_inputs(inp: Mapping[str, Any], rows: int) -> Batch:
    """What `make_inputs` made, or BlipProcessor itself, of at least so many rows.

    Raises ValueError where something is missing or of another shape, UnsupportedError for padding.
    """
    missing = [name for name in ("input_ids", "pixel_values") if not isinstance(inp.get(name), Tensor)]
    if missing:
        raise ValueError(f"the batch has no {' and no '.join(missing)}: make_inputs makes both")
    ids, pixels = inp["input_ids"], inp["pixel_values"]
    if ids.dim() != 2 or len(ids) < rows:
        raise ValueError(f"input_ids must be [B, T] of at least {rows} rows, not {list(ids.shape)}")
    if pixels.dim() != 4 or len(pixels) not in (1, len(ids)):
        raise ValueError(f"pixel_values must be [{len(ids)}, 3, H, W], not {list(pixels.shape)}")
    mask = inp.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        raise UnsupportedError("padding in a batch", "make a batch of questions of one length")
    # rows that `expand` made share their memory: nothing to compare
    same = pixels.stride(0) == 0 or torch.equal(pixels, pixels[:1].expand_as(pixels))
    return Batch(ids, pixels[:1] if same else pixels)


def decode_tokens(tokenizer: Any, token_array: Any) -> list[Any]:
    """The text of each token of [T], or of [B, T] row by row; word pieces that go on a word begin with ##."""
    if getattr(token_array, "ndim", 1) > 1:
        return [decode_tokens(tokenizer, row) for row in token_array]
    return [tokenizer.decode([int(token)]) for token in token_array]


def find_token_range(tokenizer: Any, token_array: Any, substring: str) -> tuple[int, int]:
    """The tokens, first and behind the last, in which a text stands where it first occurs in the question,
    be it in the middle of a word (as ROME searches). BERT's tokens hold no spaces: they are put back between
    words, and the text is brought into the tokens' spelling (lower case).

    Raises ValueError where it does not occur, and for words outside the vocabulary.
    """
    pieces = tokenizer.convert_ids_to_tokens([int(token) for token in token_array])
    sought = tokenizer.tokenize(substring)
    if tokenizer.unk_token in sought:
        raise ValueError(f"{substring!r} holds a word outside the model's vocabulary")
    wanted = "".join(_spaced(sought)).strip()
    whole = _spaced(pieces)
    begin = "".join(whole).find(wanted)
    if not wanted or begin < 0:
        raise ValueError(f"{substring!r} does not occur in the question {' '.join(pieces)!r}")
    ends, length = [], 0
    for piece in whole:
        length += len(piece)
        ends.append(length)
    first = next(number for number, end in enumerate(ends) if end > begin)
    last = next(number for number, end in enumerate(ends) if end >= begin + len(wanted))
    return first, last + 1


def _spaced(pieces: Sequence[str]) -> list[str]:
    """Word pieces as text, each word with a space before it."""
    return [piece[2:] if piece.startswith("##") else f" {piece}" for piece in pieces]


def guess_subject(prompt: str) -> str:
    """The first words of a prompt that are capitalised and no question word. Raises ValueError where there
    are none, as in questions in lower case."""
    names = re.compile(r"[A-Z]\S*(?:\s[A-Z][a-z']*)*")
    place = 0
    while found := names.search(prompt, place):
        word = re.match(r"\w+", found[0])
        if word is None or word[0] not in QUESTION_WORDS or prompt[found.start() + word.end() :][:1] != " ":
            return found[0].strip()
        place = found.start() + word.end()
    raise ValueError(f"no subject can be guessed in {prompt!r}: nothing in it is capitalised; name it")
