"""Images, questions and answers as people give them, checked and turned into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from .images import open_image
from .metrics import OWN
from .threads import side_by_side

Image = str | Path | PIL.Image.Image | Tensor

MATCH = {0: "no match", 1: "match"}
"""What a matching head says."""


class Inputs:
    """Turns a user's inputs into what one model takes, or says in one sentence what is wrong with them."""

    def __init__(self, config: Any, processor: Any, task: str) -> None:
        self._task = task
        self._text = config.text_config
        self._size: int = config.vision_config.image_size
        self._processor = processor

    @property
    def image_processor(self) -> str | None:
        """The class that prepares images: preprocessing is part of the result."""
        return type(self._processor.image_processor).__name__ if self._processor is not None else None

    def all_pixels(self, images: Sequence[Image]) -> list[Tensor]:
        """Of several images what `pixels` gives, read side by side; one that comes again is read once, and is
        the same tensor."""
        keys = [str(image) if isinstance(image, str | Path) else id(image) for image in images]
        distinct = dict(zip(keys, images, strict=True))
        made = dict(zip(distinct, side_by_side(self.pixels, list(distinct.values())), strict=True))
        return [made[key] for key in keys]

    def pixels(self, image: Image) -> Tensor:
        """Pixel values [1, 3, H, W] in float32, on the CPU."""
        if isinstance(image, Tensor):
            pixels = image[None] if image.dim() == 3 else image
            if pixels.shape != (1, 3, self._size, self._size) or not pixels.is_floating_point():
                raise ValueError(
                    f"pixel_values must be floating point [1, 3, {self._size}, {self._size}], "
                    f"not {str(pixels.dtype).removeprefix('torch.')} {list(image.shape)}"
                )
        else:
            picture = open_image(image)
            if self._processor is None:
                raise ValueError("without a processor an image must be given as pixel_values")
            pixels = self._processor.image_processor(picture, return_tensors="pt").pixel_values
            if pixels.shape != (1, 3, self._size, self._size):
                raise ValueError(
                    f"the processor makes images {list(pixels.shape)}, the model takes "
                    f"[1, 3, {self._size}, {self._size}]"
                )
        pixels = pixels.detach().float().cpu().contiguous()
        # by numpy: torch's threads would stand in the way of a pass while pictures are read beside it
        if not np.isfinite(pixels.numpy()).all():
            raise ValueError("the image's pixel_values hold NaN or infinity")
        return pixels

    def question_ids(self, question: str | Tensor) -> Tensor:
        """Token ids [T] (int64), padding at the end taken away."""
        if isinstance(question, str):
            if not question.strip():
                raise ValueError("the question is empty")
            ids = torch.tensor(self._tokenizer("a question")(question).input_ids)
        elif isinstance(question, Tensor):
            if question.is_floating_point() or question.is_complex() or question.dtype == torch.bool:
                raise TypeError(f"input_ids must be whole numbers, not {question.dtype}")
            question = question.cpu()
            ids = question[0] if question.dim() == 2 and len(question) == 1 else question
            if ids.dim() != 1:
                raise ValueError(f"input_ids must be one question [1, T], not {list(question.shape)}")
            words = (ids != self._text.pad_token_id).nonzero().flatten()
            ids = ids[: int(words[-1]) + 1] if len(words) else ids[:0]
            if (ids == self._text.pad_token_id).any():
                raise ValueError("input_ids hold padding before their last token")
        else:
            raise TypeError(f"a question must be a string or input_ids, not {type(question).__name__}")
        if len(ids) == 0:
            raise ValueError("the question is empty")
        return self._check(ids.long(), "question")

    def question_text(self, question: str | Tensor, ids: Tensor) -> str:
        """A question as text, whose tokens [T] these are."""
        return question if isinstance(question, str) else self.text(ids.tolist())

    def text_ids(self, text: str | Tensor, answer: Tensor) -> Tensor:
        """Token ids [T] of what goes into the first text stack: a question; or, of a captioning model, what
        the caption begins with, which may be nothing: its start token then stands alone."""
        if self._task != "continue":
            return self.question_ids(text)
        if isinstance(text, str):
            words = self._tokenizer("a beginning")(text, add_special_tokens=False).input_ids if text else []
            text = torch.tensor([self._text.bos_token_id, *words])
        ids = self.question_ids(text)
        self._check(torch.cat((ids, answer[:-1])), "caption")
        return ids

    def picture(self, pixels: Tensor) -> Tensor:
        """Pixel values [1, 3, H, W] as a picture again: uint8 [H, W, 3]."""
        image = pixels[0].permute(1, 2, 0)
        processor = None if self._processor is None else self._processor.image_processor
        if processor is not None and processor.do_normalize:
            image = image * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
        else:
            low, high = image.min(), image.max()
            image = (image - low) / (high - low).clamp(min=1e-6)
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)

    def find(self, phrase: str, ids: Tensor) -> range:
        """The tokens of a question [T] in which a phrase stands, where it stands first. Raises ValueError
        where it does not occur."""
        wanted = self._tokenizer("a span")(phrase, add_special_tokens=False).input_ids
        given = ids.tolist()
        for first in range(len(given) - len(wanted) + 1):
            if wanted and given[first : first + len(wanted)] == wanted:
                return range(first, first + len(wanted))
        raise ValueError(f"the span {phrase!r} does not occur in the question {self.text(given)!r}")

    def answer_ids(self, answer: str | int | None) -> Tensor:
        """Token ids [A] (int64); None: the model's own first token, [OWN]."""
        if self._task == "match":
            return self._match(answer)
        if answer is None:
            return torch.tensor([OWN])
        if isinstance(answer, str):
            ids = self._tokenizer("an answer")(answer, add_special_tokens=False).input_ids
            if not ids:
                raise ValueError("the answer is empty")
            if self._tokenizer("an answer").unk_token_id in ids:
                raise ValueError(f"the answer {answer!r} holds a word outside the model's vocabulary")
        elif isinstance(answer, int) and not isinstance(answer, bool):
            ids = [answer]
        else:
            raise TypeError(f"an answer must be a string, a token id or None, not {type(answer).__name__}")
        return self._check(torch.tensor(ids), "answer")

    def answer_room(self, ids: Tensor) -> int:
        """How many tokens an answer to this text [T] may have."""
        places: int = self._text.max_position_embeddings
        return {"answer": places, "continue": places + 1 - len(ids), "match": 1}[self._task]

    @lru_cache(maxsize=4096)  # noqa: B019 - data sets repeat their answers, and a process has few of these
    def known_ids(self, answer: str) -> Sequence[int]:
        """Tokens of an answer that the model could say, or none where it could not."""
        if self._task == "match" or self._processor is None:
            return ()
        ids: list[int] = self._processor.tokenizer(answer, add_special_tokens=False).input_ids
        return () if self._processor.tokenizer.unk_token_id in ids else ids

    @property
    def special_tokens(self) -> frozenset[str]:
        """Labels of tokens that are no text."""
        return (
            frozenset()
            if self._processor is None
            else frozenset(self._processor.tokenizer.all_special_tokens)
        )

    @property
    def end(self) -> int:
        """The token behind the last one of an answer or a caption."""
        end: int = self._text.sep_token_id
        return end

    def answer_text(self, ids: Sequence[int]) -> str:
        """An answer as text."""
        return MATCH[ids[0]] if self._task == "match" else self.text(ids)

    def labels(self, ids: Sequence[int]) -> tuple[str, ...]:
        """A label for each token, its number where the tokenizer has no word for it."""
        if self._processor is None:
            return tuple(str(i) for i in ids)
        words = self._processor.tokenizer.convert_ids_to_tokens(list(ids))
        return tuple(str(i) if word is None else word for i, word in zip(ids, words, strict=True))

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        if self._processor is None:
            return " ".join(str(i) for i in ids)
        text: str = self._processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text or " ".join(self.labels(ids))

    def _match(self, answer: str | int | None) -> Tensor:
        """Of a model that says whether a text fits: the class [1], "match" unless given."""
        named = (
            MATCH[1] if answer is None else MATCH.get(answer, answer) if isinstance(answer, int) else answer
        )
        for number, name in MATCH.items():
            if name == named:
                return torch.tensor([number])
        raise ValueError(f"this model answers {' or '.join(MATCH.values())}, not {answer!r}")

    def _tokenizer(self, what: str) -> Any:
        if self._processor is None:
            raise ValueError(f"without a processor {what} must be given as token ids")
        return self._processor.tokenizer

    def _check(self, ids: Tensor, what: str) -> Tensor:
        if len(ids) > self._text.max_position_embeddings:
            raise ValueError(
                f"the {what} has {len(ids)} tokens, the model takes {self._text.max_position_embeddings}"
            )
        outside = ids[(ids < 0) | (ids >= self._text.vocab_size)]
        if len(outside):
            raise ValueError(
                f"the {what}'s token id {int(outside[0])} is outside the model's vocabulary of "
                f"{self._text.vocab_size}"
            )
        return ids
