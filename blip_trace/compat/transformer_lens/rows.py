"""The rows of a batch as they go into the text stacks: each with its tokens and its picture, corrupted or
not, by the unmodified Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import hooks
from ...checks import Checks
from ...corrupting import Corrupted, Corruption, Edit, Original, corrupt
from ...devices import send
from ...tracer import Tracer


@dataclass(frozen=True, eq=False)
class Row:
    """One row: pixels [1, 3, H, W]; ids [T] of the first text stack, and of the answer decoder where that is
    what is hooked, decoded [P]; all on the CPU.

    Where the model is: images [N, D]: image states, corrupted where `other_image`; words [T, C]: corrupted
    embeddings of the tokens, None where they are those of `ids`.
    """

    pixels: Tensor
    ids: Tensor
    decoded: Tensor | None
    images: Tensor
    other_image: bool
    words: Tensor | None

    @property
    def corrupted(self) -> bool:
        """Whether pixels and tokens are not all that there is to say."""
        return self.other_image or self.words is not None

    def embedded(self, table: Tensor) -> Tensor:
        """The words [T, C] by the table of word embeddings [V, C], unless they are corrupted."""
        return table[send(self.ids, table.device)] if self.words is None else self.words


class Pictures:
    """The pictures of a batch, pixels [1, 3, H, W] each, encoded once. Raises ValueError and OSError as
    `Tracer.trace` does, and ValueError where there are none."""

    def __init__(self, tracer: Tracer, images: Any) -> None:
        several = isinstance(images, list | tuple) or (isinstance(images, Tensor) and images.dim() == 4)
        self.pixels = [tracer.inputs.pixels(image) for image in (images if several else [images])]
        if not self.pixels:
            raise ValueError("no image given")
        self._tracer: Tracer | None = None
        self._states: list[Tensor] = []

    def states(self, tracer: Tracer) -> list[Tensor]:
        """Image states [N, D] of each."""
        if self._tracer is not tracer:  # another one: the weights were changed
            self._states = [encode(tracer, pixels, None)[0] for pixels in self.pixels]
            self._tracer = tracer
        return self._states


def encode(tracer: Tracer, pixels: Tensor, edit: Edit | None) -> Tensor:
    """Image states [S, N, D] of pixels [S, 3, H, W], by the Hugging Face model; `edit`: of the patches."""
    made = []
    for number in range(len(pixels)):
        here = slice(number, number + 1)
        embedded = hooks.embed_image(tracer.model, pixels[here].float())
        embedded = embedded if edit is None else edit(embedded, here)
        made.append(hooks.encode_image(tracer.model, embedded))
    return torch.cat(made)


@torch.inference_mode(False)
@torch.no_grad()
def make_rows(
    tracer: Tracer,
    pictures: Pictures,
    ids: Tensor,
    decoded: Tensor | None,
    corruption: Corruption | None,
) -> tuple[Row, ...]:
    """Rows of ids [B, T] and decoded [B, P], with a picture for all of them or one for each, and a sample of
    the corruption for all of them or one for each.

    Raises ValueError for another number of pictures or samples, and whatever the corruption raises.
    """
    count, states = len(ids), pictures.states(tracer)
    if len(states) not in (1, count):
        raise ValueError(f"the model holds {len(states)} pictures for {count} rows of tokens")
    made: dict[tuple[int, ...], Corrupted] = {}
    rows = []
    for number, own in enumerate(ids):
        picture = number if len(states) > 1 else 0
        changed = Corrupted()
        if corruption is not None:
            key = (picture, *own.tolist())
            if key not in made:
                original = _original(tracer, pictures.pixels[picture], own, states[picture])
                made[key] = corrupt(corruption, original, Checks())
            changed = made[key]
        images, words = (_sample(part, number, count) for part in (changed.images, changed.words))
        rows.append(
            Row(
                pictures.pixels[picture],
                own,
                None if decoded is None else decoded[number],
                states[picture] if images is None else images,
                images is not None,
                words,
            )
        )
    return tuple(rows)


def _sample(samples: Tensor | None, row: int, rows: int) -> Tensor | None:
    if samples is None:
        return None
    if len(samples) not in (1, rows):
        raise ValueError(
            f"the corruption draws {len(samples)} samples for {rows} rows of tokens: draw one, or repeat the "
            f"tokens, tokens.expand({len(samples)}, -1), for a row each"
        )
    return samples[row if len(samples) > 1 else 0]


def _original(tracer: Tracer, pixels: Tensor, ids: Tensor, states: Tensor) -> Original:
    table, inputs = hooks.word_table(tracer.model), tracer.inputs
    return Original(
        pixels=pixels,
        states=lambda: states,
        image_shape=(states.shape[0], states.shape[1]),
        ids=ids,
        words=table[send(ids, table.device)],
        words_std=lambda: float(table.float().std()),
        labels=inputs.labels(ids.tolist()),
        enter=lambda given, edit: encode(tracer, given, edit),
        image=lambda given: encode(tracer, inputs.pixels(given), None),
        question=inputs.question_ids,
        embed=lambda other: table[send(other, table.device)],
        find=lambda phrase: inputs.find(phrase, ids),
    )


def stacked(rows: Sequence[Row], table: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B, N, D] and words [B, T, C] of rows of equal length."""
    return torch.stack([row.images for row in rows]), torch.stack([row.embedded(table) for row in rows])
