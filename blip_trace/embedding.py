"""Words and pixels to the rows that enter a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import send_all
from .program import Norm, PatchEmbedding, Program, Stack, TokenEmbedding
from .task import Task


def word_table(stack: Stack) -> Tensor:
    """The table of word embeddings [V, C]."""
    assert isinstance(stack.embedding, TokenEmbedding)
    return stack.embedding.words


def embed_texts(program: Program, stack: Stack, tasks: Sequence[Task]) -> Tensor:
    """What enters a text stack, one text behind the other: [rows, C]. Into the first one goes each task's
    text, clean and then corrupted; into the next its answer, as far as it is given."""
    assert isinstance(stack.embedding, TokenEmbedding)
    table = word_table(stack)
    first = stack is program.texts[0]
    ids = [_entering(program, task, first) for task in tasks]
    words = table[send_all(ids, table.device)]
    copies = [1 + task.samples * (first and task.words is not None) for task in tasks]
    if max(copies) > 1:
        parts = words.split([len(own) for own in ids])
        words = torch.cat([_with_corrupted(own, task) for own, task in zip(parts, tasks, strict=True)])
    places = [torch.arange(len(own)).repeat(n) for own, n in zip(ids, copies, strict=True)]
    positions = stack.embedding.positions[send_all(places, table.device)]
    return layer_norm(words + positions, stack.embedding.norm)


def _entering(program: Program, task: Task, first: bool) -> Tensor:
    """Ids of what enters the first text stack, or the next."""
    begun = task.answer_ids[:-1]
    if not first:
        return torch.cat((torch.tensor([program.start_token]), begun))
    return torch.cat((task.text_ids, begun)) if program.task == "continue" else task.text_ids


def _with_corrupted(clean: Tensor, task: Task) -> Tensor:
    """Words of a task's clean text [T, C] and, behind them, of its corrupted ones: [rows, C]."""
    if task.words is None:
        return clean
    behind = clean[task.words.shape[1] :].expand(len(task.words), -1, -1)
    return torch.cat((clean, torch.cat((task.words, behind), dim=1).flatten(0, 1)))


@torch.inference_mode()
def embed_patches(stack: Stack, pixels: Tensor) -> Tensor:
    """Class token and patches [B, 1 + patches, C] of pixels [B, 3, H, W], positions added."""
    embedding = stack.embedding
    assert isinstance(embedding, PatchEmbedding)
    size = embedding.patch_size
    blocks = pixels.unflatten(2, (-1, size)).unflatten(4, (-1, size))  # [B, 3, rows, p, columns, p]
    patches = blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, patches, 3 p p]
    patches = F.linear(
        patches.to(embedding.positions.dtype), embedding.projection.weight, embedding.projection.bias
    )
    class_token = embedding.class_token.expand(len(pixels), 1, -1)
    return torch.cat((class_token, patches), dim=1) + embedding.positions


def layer_norm(x: Tensor, norm: Norm) -> Tensor:
    """Over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
