"""The naive loop over the unmodified Hugging Face model: one forward pass through hooks for every cell.

It defines what is right, and it is the baseline that the engine is measured against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from .engine import Progress
from .metrics import Readings, Reads, check_foil, completed
from .sites import Cut, Site
from .task import Scores, Task

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


def site_module(model: Any, stack: str, layer: int, kind: str) -> nn.Module:
    """The module of the Hugging Face model whose output is the state of this kind (a head's: a part of its
    channels)."""
    if stack == "vision":
        block = model.vision_model.encoder.layers[layer]
        name = "" if kind == "hidden" else kind
    else:
        block, name = _layers(model, stack)[layer], _MODULES[kind]
    module: nn.Module = block.get_submodule(name)
    return module


def _layers(model: Any, stack: str) -> Any:
    text = model.text_encoder if stack == "text_encoder" else model.text_decoder.bert
    return text.encoder.layer


def embed_image(model: Any, pixels: Tensor) -> Tensor:
    """Embedded patches [B, N, C] of pixel values [B, 3, H, W], class token first."""
    with _without_tf32():
        embedded: Tensor = model.vision_model.embeddings(pixels.to(model.device))
    return embedded


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Convolutions of float32 in float32: unlike matrix products, on a GPU torch rounds theirs unless told
    otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def encode_image(model: Any, embedded: Tensor) -> Tensor:
    """The image encoder's final states [B, N, C] of embedded patches [B, N, C]."""
    size = model.config.vision_config.image_size
    pixels = embedded.new_zeros(len(embedded), 3, size, size)  # what is made of them is replaced
    with editing({model.vision_model.embeddings: lambda _: embedded}):
        states: Tensor = model.vision_model(pixel_values=pixels).last_hidden_state
    return states


def answer_logits(model: Any, task: Task, images: Tensor) -> Tensor:
    """Logits [S, A, V] of a task's answer, for image states [S, N, D]: what the parts of the model make of
    them one behind the other."""
    rows = len(images)
    begun, text = (ids.to(images.device) for ids in (task.answer_ids[:-1], task.text_ids))
    logits: Tensor
    match model:
        case BlipForQuestionAnswering():
            question = model.text_encoder(
                input_ids=text.expand(rows, -1), encoder_hidden_states=images
            ).last_hidden_state
            given = torch.cat((begun.new_tensor([model.decoder_start_token_id]), begun))
            logits = model.text_decoder(
                input_ids=given.expand(rows, -1), encoder_hidden_states=question, use_cache=False
            ).logits
        case BlipForConditionalGeneration():
            given = torch.cat((text, begun))
            logits = model.text_decoder(
                input_ids=given.expand(rows, -1), encoder_hidden_states=images, use_cache=False
            ).logits[:, len(text) - 1 :]
        case BlipForImageTextRetrieval():
            states = model.text_encoder(
                input_ids=text.expand(rows, -1), encoder_hidden_states=images
            ).last_hidden_state
            logits = model.itm_head(states[:, :1])
        case _:
            raise TypeError(f"no hooks for {type(model).__name__}")
    return logits


@torch.inference_mode()
def score(model: Any, tasks: Sequence[Task], progress: Progress | None = None) -> list[Scores]:
    """What `engine.score` computes, by one forward pass for every cell (its samples are a batch), on the
    device where the model is."""
    total, done = sum(len(task.cells) for task in tasks), 0
    results = []
    for task in tasks:
        clean = replace(task, corrupted=task.clean.expand(task.samples, -1, -1), words=None)
        taken = {site for cell in task.cells for site in cell.sites}
        kept = {site for cell in task.cells for site in cell.frozen}
        with recording(model, taken | kept) as clean_states:
            clean_logits = run(model, replace(clean, corrupted=task.clean[None]))
        answer = completed(task.answer_ids, clean_logits[0, -1])
        foil = None if task.foil_ids is None else check_foil(answer, task.foil_ids)

        def read(
            logits: Tensor,
            task: Task = task,
            answer: Tensor = answer,
            foil: Tensor | None = foil,
            clean_logits: Tensor = clean_logits,
        ) -> Readings:
            return readings(logits, answer, foil, clean_logits, task.reads)

        with recording(model, taken | kept) as corrupted_states:
            corrupted = run(model, task)
        donors, base_states, base = (
            (clean_states, corrupted_states, task)
            if task.direction == "denoise"
            else (corrupted_states, clean_states, clean)
        )
        patched = []
        for cell in task.cells:
            states = {site: donors[site] for site in cell.sites}
            states.update((site, base_states[site]) for site in cell.frozen)
            with _patching(model, states, cell.cuts):
                patched.append(read(run(model, base)))
            done += 1
            if progress is not None:
                progress(done, total)
        low = read(corrupted)
        empty = torch.empty(task.samples, 0, len(answer)).double()
        results.append(
            Scores(
                answer_ids=answer,
                clean={name: own[0].cpu() for name, own in read(clean_logits).items()},
                corrupted={name: own.cpu() for name, own in low.items()},
                patched={
                    name: torch.stack([own[name] for own in patched], dim=1).cpu() if patched else empty
                    for name in low
                },
            )
        )
    return results


def run(model: Any, task: Task) -> Tensor:
    """Logits [S, A, V] of the task's corrupted inputs."""
    images = task.clean.expand(task.samples, -1, -1) if task.corrupted is None else task.corrupted
    if task.patches:
        images = encode_image(model, images)
    words = task.words
    edits: dict[nn.Module, Edit] = {}
    if words is not None:

        def corrupted(embedded: Tensor) -> Tensor:
            # a copy, for transformers adds the positions to it in place
            return torch.cat((words, embedded.expand(len(words), -1, -1)[:, words.shape[1] :]), dim=1)

        edits[model.get_input_embeddings()] = corrupted
    with editing(edits):
        return answer_logits(model, task, images)


def word_table(model: Any) -> Tensor:
    """Word embeddings [V, C] of the first text stack."""
    table: Tensor = model.get_input_embeddings().weight
    return table.detach()


def clean_words(model: Any, text_ids: Tensor) -> Tensor:
    """Embeddings [T, C] of a text's tokens [T], before positions and norm."""
    table = word_table(model)
    return table[text_ids.to(table.device)]


def text_heads(model: Any) -> int:
    """Heads of each attention of the text stacks."""
    heads: int = model.config.text_config.num_attention_heads
    return heads


def readings(
    logits: Tensor, answer: Tensor, foil: Tensor | None, clean_logits: Tensor, reads: Reads
) -> Readings:
    """Readings [S, A] of logits [S, A, V], beside the clean ones [1, A, V]; or those logits."""
    if reads == "logits":
        return {"logits": logits}
    wide = logits.double()
    answer = answer.to(logits.device)

    def of(tokens: Tensor, values: Tensor) -> Tensor:
        return values.gather(2, tokens.expand(len(values), -1)[..., None])[..., 0]

    log_probs = wide.log_softmax(-1)
    own = of(answer, wide)
    found = {"log_probability": of(answer, log_probs), "logit": own}
    if foil is not None:
        found["foil_logit"] = of(foil.to(logits.device), wide)
    if reads == "vocabulary":
        clean = clean_logits.double().log_softmax(-1)
        found["kl_divergence"] = (clean.exp() * (clean - log_probs)).sum(-1)
        found["rank"] = 1 + (wide > own[..., None]).sum(-1).double()
    return found


@contextmanager
def recording(model: Any, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
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
def _patching(model: Any, states: Mapping[Site, Tensor], cuts: Iterable[Cut]) -> Iterator[None]:
    """Put these states at their sites, and take these attention edges away, in the forward pass that is run
    inside."""
    edits: dict[nn.Module, Edit] = {}
    for module, own in _by_module(model, states).items():

        def put(output: Tensor, own: Sequence[Site] = own) -> Tensor:
            output = output.clone()
            for site in own:
                here, there = output[:, site.token], states[site]  # [S, C], [S or 1, C]
                if site.head is not None:
                    parts = (1, (text_heads(model), -1))
                    here, there = (state.unflatten(*parts)[:, site.head] for state in (here, there))
                here.copy_(there)
            return output

        edits[module] = put
    with editing(edits), _cutting(model, cuts):
        yield


@contextmanager
def _cutting(model: Any, cuts: Iterable[Cut]) -> Iterator[None]:
    """Add minus infinity to the attention scores of these edges, through the mask that the module takes."""
    by_module: dict[nn.Module, list[Cut]] = defaultdict(list)
    for cut in cuts:
        name = "attention.self" if cut.sublayer == "self_attn" else "crossattention.self"
        by_module[_layers(model, cut.stack)[cut.layer].get_submodule(name)].append(cut)

    def hook(module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        hidden, states = args[0], given.get("encoder_hidden_states")
        name = "attention_mask" if states is None else "encoder_attention_mask"
        keys = (hidden if states is None else states).shape[1]
        mask = hidden.new_zeros(1, 1, hidden.shape[1], keys)
        for cut in by_module[module]:
            queries, seen = (torch.tensor(sorted(t), dtype=torch.int64) for t in (cut.queries, cut.keys))
            mask[..., queries[:, None], seen] = float("-inf")
        before = given.get(name)
        return args, {**given, name: mask if before is None else before + mask}

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in by_module]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_module(model: Any, sites: Iterable[Site]) -> dict[nn.Module, list[Site]]:
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
