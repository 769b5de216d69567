"""Images, questions and answers as people give them, checked and turned into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from .images import open_image


class Inputs:
    """Turns a user's inputs into what one model takes, or says in one sentence what is wrong with them."""

    def __init__(self, config: Any, processor: Any) -> None:
        self._text = config.text_config
        self._size: int = config.vision_config.image_size
        self._processor = processor

    @property
    def image_processor(self) -> str | None:
        """The class that prepares images: preprocessing is part of the result."""
        return type(self._processor.image_processor).__name__ if self._processor is not None else None

    def pixels(self, image: str | Path | PIL.Image.Image | Tensor) -> Tensor:
        """Pixel values [1, 3, H, W] in float32."""
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
        if not bool(torch.isfinite(pixels).all()):
            raise ValueError("the image's pixel_values hold NaN or infinity")
        return pixels.detach().float().contiguous()

    def question_ids(self, question: str | Tensor) -> Tensor:
        """Token ids [T] (int64), padding at the end taken away."""
        if isinstance(question, str):
            if not question.strip():
                raise ValueError("the question is empty")
            ids = torch.tensor(self._tokenizer("a question")(question).input_ids)
        elif isinstance(question, Tensor):
            if question.is_floating_point() or question.is_complex() or question.dtype == torch.bool:
                raise TypeError(f"input_ids must be whole numbers, not {question.dtype}")
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

    def find(self, phrase: str, ids: Tensor) -> range:
        """The tokens of a question [T] in which a phrase stands, where it stands first. Raises ValueError
        where it does not occur."""
        wanted = self._tokenizer("a span")(phrase, add_special_tokens=False).input_ids
        given = ids.tolist()
        for first in range(len(given) - len(wanted) + 1):
            if wanted and given[first : first + len(wanted)] == wanted:
                return range(first, first + len(wanted))
        raise ValueError(f"the span {phrase!r} does not occur in the question {self.text(given)!r}")

    def answer_ids(self, answer: str | int | None) -> Tensor | None:
        """Token ids [A] (int64), or None for the model's own."""
        if answer is None:
            return None
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

    def labels(self, ids: Sequence[int]) -> tuple[str, ...]:
        """A label for each token."""
        if self._processor is None:
            return tuple(str(i) for i in ids)
        return tuple(self._processor.tokenizer.convert_ids_to_tokens(list(ids)))

    def text(self, ids: Sequence[int]) -> str:
        """Tokens as text."""
        if self._processor is None:
            return " ".join(str(i) for i in ids)
        text: str = self._processor.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text or " ".join(self.labels(ids))

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
