"""The naive loop over the unmodified Hugging Face model: one forward pass through hooks for every cell.

It defines what is right, and it is the baseline that the engine is measured against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipForQuestionAnswering

from .engine import Progress, Scores, Task
from .sites import Cell, Site

Edit = Callable[[Tensor], Tensor]
"""Takes the output [S, T, C] of a module and returns what is to stand in its place."""

_MODULES = {
    "hidden": "",
    "hidden_after_self_attn": "attention",
    "hidden_after_cross_attn": "crossattention",
    "self_attn": "attention.output.dense",
    "cross_attn": "crossattention.output.dense",
    "mlp": "output.dense",
    "self_attn_head": "attention.self",
    "cross_attn_head": "crossattention.self",
}


def site_module(model: BlipForQuestionAnswering, stack: str, layer: int, kind: str) -> nn.Module:
    """The module of the Hugging Face model whose output is the state of this kind (a head's: a part of its
    channels)."""
    text = {"text_encoder": model.text_encoder, "text_decoder": model.text_decoder.bert}[stack]
    module: nn.Module = text.encoder.layer[layer].get_submodule(_MODULES[kind])
    return module


@torch.inference_mode()
def encode_images(model: BlipForQuestionAnswering, pixels: Tensor, edit: Edit | None = None) -> Tensor:
    """Image states [B, N, D] of pixel values [B, 3, H, W]; `edit` changes the embedded patches [B, N, D]."""
    with editing({} if edit is None else {model.vision_model.embeddings: edit}):
        states: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
    return states


@torch.inference_mode()
def answer_logits(
    model: BlipForQuestionAnswering, question_ids: Tensor, decoder_ids: Tensor, images: Tensor
) -> Tensor:
    """Logits [S, A, V] of the answer, for question_ids [T], decoder_ids [A] and image states [S, N, D]."""
    rows = len(images)
    question = model.text_encoder(
        input_ids=question_ids.expand(rows, -1), encoder_hidden_states=images
    ).last_hidden_state
    answer = model.text_decoder(
        input_ids=decoder_ids.expand(rows, -1), encoder_hidden_states=question, use_cache=False
    )
    logits: Tensor = answer.logits
    return logits


@torch.inference_mode()
def score(
    model: BlipForQuestionAnswering, tasks: Sequence[Task], progress: Progress | None = None
) -> list[Scores]:
    """What `engine.score` computes, by one forward pass for every cell (its samples are a batch)."""
    total, done = sum(len(task.cells) for task in tasks), 0
    results = []
    for task in tasks:
        start = torch.tensor([model.decoder_start_token_id])
        decoder_ids = start if task.answer_ids is None else torch.cat((start, task.answer_ids[:-1]))
        sites = {site for cell in task.cells for site in cell.sites}
        with recording(model, sites) as clean_states:
            logits = answer_logits(model, task.question_ids, decoder_ids, task.clean[None])
        answer = logits[0, :1].argmax(1) if task.answer_ids is None else task.answer_ids
        clean = replace(task, corrupted=task.clean.expand(task.samples, -1, -1), words=None)
        with recording(model, sites) as corrupted_states:
            corrupted = _corrupted_logits(model, task, decoder_ids)
        states, base = (clean_states, task) if task.direction == "denoise" else (corrupted_states, clean)
        restored = []
        for cell in task.cells:
            with _restoring(model, cell, states):
                patched = _corrupted_logits(model, base, decoder_ids)
            restored.append(_log_probs(patched, answer))
            done += 1
            if progress is not None:
                progress(done, total)
        empty = corrupted.new_empty(task.samples, 0, len(answer)).float()
        results.append(
            Scores(
                answer_ids=answer,
                clean=_log_probs(logits, answer)[0],
                corrupted=_log_probs(corrupted, answer),
                restored=torch.stack(restored, dim=1) if restored else empty,
            )
        )
    return results


def _corrupted_logits(model: BlipForQuestionAnswering, task: Task, decoder_ids: Tensor) -> Tensor:
    """Logits [S, A, V] of the task's corrupted inputs."""
    images = task.clean.expand(task.samples, -1, -1) if task.corrupted is None else task.corrupted
    words = task.words
    edits: dict[nn.Module, Edit] = {}
    if words is not None:
        # a copy: transformers adds the positions to it in place
        edits[model.text_encoder.embeddings.word_embeddings] = lambda _: words.clone()
    with editing(edits):
        return answer_logits(model, task.question_ids, decoder_ids, images)


def _log_probs(logits: Tensor, answer: Tensor) -> Tensor:
    """Log-probabilities [S, A] of the answer's tokens, in float32 or better."""
    wide = logits.double() if logits.dtype == torch.float64 else logits.float()
    return wide.log_softmax(-1).gather(2, answer.expand(len(logits), -1)[..., None])[..., 0]


@contextmanager
def recording(model: BlipForQuestionAnswering, sites: set[Site]) -> Iterator[dict[Site, Tensor]]:
    """Keep the state [S, C] of every site of the forward pass that is run inside; of a head's, that of all
    heads of the attention."""
    states: dict[Site, Tensor] = {}
    edits: dict[nn.Module, Edit] = {}
    for module, own in _by_module(model, sites).items():

        def keep(output: Tensor, own: Sequence[Site] = own) -> Tensor:
            for site in own:
                states[site] = output[:, site.token]
            return output

        edits[module] = keep
    with editing(edits):
        yield states


@contextmanager
def _restoring(model: BlipForQuestionAnswering, cell: Cell, states: Mapping[Site, Tensor]) -> Iterator[None]:
    """Put these states at a cell's sites in the forward pass that is run inside."""
    edits: dict[nn.Module, Edit] = {}
    heads = model.config.text_config.num_attention_heads
    for module, own in _by_module(model, cell.sites).items():

        def restore(output: Tensor, own: Sequence[Site] = own) -> Tensor:
            output = output.clone()
            for site in own:
                here, there = output[:, site.token], states[site]  # [S, C], [S or 1, C]
                if site.head is not None:
                    here, there = (state.unflatten(1, (heads, -1))[:, site.head] for state in (here, there))
                here.copy_(there)
            return output

        edits[module] = restore
    with editing(edits):
        yield


def _by_module(
    model: BlipForQuestionAnswering, sites: set[Site] | frozenset[Site]
) -> dict[nn.Module, list[Site]]:
    modules: dict[nn.Module, list[Site]] = defaultdict(list)
    for site in sites:
        modules[site_module(model, site.stack, site.layer, site.kind)].append(site)
    return modules


@contextmanager
def editing(edits: Mapping[nn.Module, Edit]) -> Iterator[None]:
    """Replace the outputs of modules in the forward passes that are run inside; a module that returns a
    tuple has its first element replaced."""

    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edits[module](output[0]), *output[1:])
        return edits[module](output)

    handles = [module.register_forward_hook(hook) for module in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
