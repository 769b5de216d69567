"""Words and pixels to the rows that enter a stack."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .program import Norm, PatchEmbedding, Program, Stack, TokenEmbedding


def word_table(stack: Stack) -> Tensor:
    """The table of word embeddings [V, C]."""
    assert isinstance(stack.embedding, TokenEmbedding)
    return stack.embedding.words


def embed_text(
    program: Program, stack: Stack, text_ids: Tensor, answer_ids: Tensor, corrupted: Tensor | None
) -> Tensor:
    """What enters a text stack, one text behind the other: [rows, C]. Into the first one goes the text, clean
    and then corrupted; into the next its answer, as far as it is given.

    text_ids [T], answer_ids [A], corrupted embeddings of the text's words [S, T, C].
    """
    assert isinstance(stack.embedding, TokenEmbedding)
    begun = answer_ids[:-1]
    if stack is not program.texts[0]:
        words = word_table(stack)[torch.cat((torch.tensor([program.start_token]), begun))][None]
    else:
        words = word_table(stack)[text_ids][None]
        if corrupted is not None:
            words = torch.cat((words, corrupted))
        if program.task == "continue":
            behind = word_table(stack)[begun].expand(len(words), -1, -1)
            words = torch.cat((words, behind), dim=1)
    positions = stack.embedding.positions[: words.shape[1]]
    return layer_norm(words + positions, stack.embedding.norm).flatten(0, 1)


@torch.inference_mode()
def embed_patches(stack: Stack, pixels: Tensor) -> Tensor:
    """Class token and patches [B, 1 + patches, C] of pixels [B, 3, H, W], positions added."""
    embedding = stack.embedding
    assert isinstance(embedding, PatchEmbedding)
    size = embedding.patch_size
    patches = F.unfold(pixels, size, stride=size).transpose(1, 2)  # [B, patches, 3 p p]
    patches = F.linear(
        patches.to(embedding.positions.dtype), embedding.projection.weight, embedding.projection.bias
    )
    class_token = embedding.class_token.expand(len(pixels), 1, -1)
    return torch.cat((class_token, patches), dim=1) + embedding.positions


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
