"""Words and pixels to the rows that enter a stack."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .devices import send, send_all
from .program import Norm, PatchEmbedding, Program, Stack, TokenEmbedding
from .task import Task


def word_table(stack: Stack) -> Tensor:
    """The table of word embeddings [V, C]."""
    assert isinstance(stack.embedding, TokenEmbedding)
    return stack.embedding.words


def entering(program: Program, stack: Stack, tasks: Sequence[Task]) -> tuple[Tensor, ...]:
    """What `embed_texts` takes to make what enters a text stack, one text behind the other. Into the first
    one goes each task's text, clean and then corrupted; into the next its answer, as far as it is given."""
    device = word_table(stack).device
    first = stack is program.texts[0]
    ids = [_ids(program, task, first) for task in tasks]
    words = [task.words if first else None for task in tasks]
    copies = [1 if own is None else 1 + len(own) for own in words]
    places = [torch.arange(len(own)).repeat(n) for own, n in zip(ids, copies, strict=True)]
    clean = send_all(ids, device), send_all(places, device)
    corrupted = [own.flatten(0, 1) for own in words if own is not None]
    if not corrupted:
        return clean
    return *clean, torch.cat(corrupted), send(_rows(ids, words), device)


def embed_texts(stack: Stack, ids: Tensor, places: Tensor, *corrupted: Tensor) -> Tensor:
    """Words of these ids [n] at these places [rows]: [rows, C]. Or, of the words and behind them the
    corrupted ones [m, C], those in these rows [rows]."""
    assert isinstance(stack.embedding, TokenEmbedding)
    words = stack.embedding.words[ids]
    if corrupted:
        more, rows = corrupted
        words = torch.cat((words, more))[rows]
    return layer_norm(words + stack.embedding.positions[places], stack.embedding.norm)


def _ids(program: Program, task: Task, first: bool) -> Tensor:
    """Of what enters the first text stack, or the next."""
    begun = task.answer_ids[:-1]
    if not first:
        return torch.cat((torch.tensor([program.start_token]), begun))
    return torch.cat((task.text_ids, begun)) if program.task == "continue" else task.text_ids


def _rows(ids: Sequence[Tensor], words: Sequence[Tensor | None]) -> Tensor:
    """Where the words of each text [T] are, and those of its corrupted copies [S, t, C], which end like it,
    among all texts' words and behind them all corrupted ones."""
    rows = []
    begin, behind = 0, sum(map(len, ids))
    for own, corrupted in zip(ids, words, strict=True):
        clean = torch.arange(begin, begin + len(own))
        rows.append(clean)
        begin += len(own)
        if corrupted is not None:
            samples, spoilt, _ = corrupted.shape
            made = behind + torch.arange(samples * spoilt).view(samples, spoilt)
            rows.append(torch.cat((made, clean[spoilt:].expand(samples, -1)), dim=1).flatten())
            behind += samples * spoilt
    return torch.cat(rows)


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
