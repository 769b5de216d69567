"""ROME's traces of a question about a picture: `rome` says what is what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...result import Restored
from ...sites import Cell, check_count, window_layers
from ..layers import layer_name, site
from ..models import NOWHERE, UnsupportedError, check_answers, tracer_of
from .inputs import (
    Batch,
    Image,
    ModelAndTokenizer,
    check_inputs,
    decode_tokens,
    find_token_range,
    make_inputs,
)
from .noise import BatchNoise, Noise

States = Sequence[tuple[int, str]]
"""Tokens and names of modules (`layername`)."""

MODULES = {
    "": "",
    "mlp": "output.dense",
    "attn": "attention.output.dense",
    "cross_attn": "crossattention.output.dense",
}
EMBEDDINGS = "text_encoder.embeddings.word_embeddings"


def layername(model: Any, num: int, kind: str | None = None) -> str:
    """The module of the question encoder whose output a kind of state is; "embed": the word embeddings, which
    take the noise. Raises ValueError for an unknown kind."""
    return EMBEDDINGS if kind == "embed" else layer_name("text_encoder", num, _module(kind))


def trace_with_patch(
    model: Any,
    inp: Mapping[str, Tensor],
    states_to_patch: States,
    answers_t: int | Tensor,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    trace_layers: Sequence[str] | None = None,
) -> Tensor:
    """The probability of an answer's token with some states of the corrupted rows put back to those of the
    clean row 0, mean over the rows: float32 [].

    inp: see `make_inputs`; its rows behind the first may also hold another question or picture.
    states_to_patch: tokens and names of modules (`layername`), none: nothing is put back. tokens_to_mix: the
    words that get noise, first and behind the last; None: none. noise: a factor, or what is made of standard
    normal draws [rows, words, C] (float64). uniform_noise: of draws between -1 and 1. replace: noise in the
    place of the words, not added to them.

    Raises UnsupportedError for trace_layers, several answers at once, padding, and states of other modules;
    ValueError for tokens and layers that are not there.
    """
    if trace_layers is not None:
        raise UnsupportedError(
            "trace_layers", "the engine hands out no activations; record them with forward hooks on the model"
        )
    cell = Cell.of(site(name, token) for token, name in states_to_patch)
    return _cell_score(cell, model, inp, answers_t, tokens_to_mix, noise, uniform_noise, replace)


def trace_with_repatch(
    model: Any,
    inp: Mapping[str, Tensor],
    states_to_patch: States,
    states_to_unpatch: States,
    answers_t: int | Tensor,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
) -> Tensor:
    """As `trace_with_patch`, with other states kept as they are in the corrupted run (the severed paths of
    Meng et al. 2022, section 2.2): float32 []. A state that is in both lists is kept."""
    kept = {site(name, token) for token, name in states_to_unpatch}
    cell = Cell.of({site(name, token) for token, name in states_to_patch} - kept, kept)
    return _cell_score(cell, model, inp, answers_t, tokens_to_mix, noise, uniform_noise, False)


def trace_important_states(
    model: Any,
    num_layers: int,
    inp: Mapping[str, Tensor],
    e_range: tuple[int, int] | None,
    answer_t: int | Tensor,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    token_range: Iterable[int] | None = None,
) -> Tensor:
    """The map of whole states, one layer at a time, in one pass: float32 [tokens, layers]. token_range: the
    tokens whose states are put back, all unless given. Arguments and errors as in `trace_with_patch`."""
    cells = _grid(inp, num_layers, None, 1, token_range)
    traced = _traced(cells, model, inp, answer_t, e_range, noise, uniform_noise, replace)
    return traced.scores.mean(0).view(-1, num_layers)


def trace_important_window(
    model: Any,
    num_layers: int,
    inp: Mapping[str, Tensor],
    e_range: tuple[int, int] | None,
    answer_t: int | Tensor,
    kind: str | None,
    window: int = 10,
    noise: Noise = 0.1,
    uniform_noise: bool = False,
    replace: bool = False,
    token_range: Iterable[int] | None = None,
) -> Tensor:
    """The map of a kind of state in windows of layers, in one pass: float32 [tokens, layers]. The window of a
    layer l begins at l - window // 2 and is cut off at both ends (`sites.window_layers`). Otherwise as
    `trace_important_states`."""
    cells = _grid(inp, num_layers, kind, window, token_range)
    traced = _traced(cells, model, inp, answer_t, e_range, noise, uniform_noise, replace)
    return traced.scores.mean(0).view(-1, num_layers)


def calculate_hidden_flow(
    mt: ModelAndTokenizer,
    prompt: str,
    subject: str,
    samples: int = 10,
    noise: Noise = 0.1,
    token_range: str | None = None,
    uniform_noise: bool = False,
    replace: bool = False,
    window: int = 10,
    kind: str | None = None,
    expect: str | None = None,
    *,
    image: Image,
    faithful: bool = False,
) -> dict[str, Any]:
    """Trace every token and layer of the question encoder, under noise on the words of the subject.

    image: what the question is about, as `make_inputs` takes it. token_range: None, or "subject_last" for the
    last token of the subject alone. kind: None for whole states, layer by layer; "mlp", "attn" or
    "cross_attn" in windows of layers. expect: the answer that is right: with any other, nothing is traced.
    faithful: the low score as ROME has it, which forgets `replace` there and adds the noise. Others: see
    `trace_with_patch`.

    Returns scores (float32 [tokens, layers]: the answer's probability, mean over the samples), low_score
    (float), high_score (float32 []), input_ids [T], input_tokens, subject_range (first token and behind the
    last), answer (the first token of the model's own), window, correct_prediction and kind ("" for None); or
    only correct_prediction, False.

    Raises ValueError for a subject that is not in the question and for unknown values, and as
    `trace_with_patch` and `make_inputs` do.
    """
    check_count("samples", samples)
    inp = make_inputs(mt.processor, [prompt] * (samples + 1), image=image)
    clean = check_inputs(inp, 2)
    if expect is not None:
        foretold, _ = _predicted(mt.model, clean, 0)
        if decode_tokens(mt.tokenizer, [foretold])[0].strip() != expect:
            return {"correct_prediction": False}
    e_range = find_token_range(mt.tokenizer, clean.ids[0], subject)
    if token_range not in (None, "subject_last"):
        raise ValueError(f"unknown token_range {token_range!r}: choose None or 'subject_last'")
    tokens = None if token_range is None else [e_range[1] - 1]
    cells = _grid(inp, mt.num_layers, kind, window if kind else 1, tokens)
    traced = _traced(cells, mt.model, inp, None, e_range, noise, uniform_noise, replace)
    (answer_id,), low = traced.answer_ids, traced.low_scores.mean()
    if faithful and replace:
        low = trace_with_patch(mt.model, inp, [], answer_id, e_range, noise, uniform_noise)
    return {
        "scores": traced.scores.mean(0).view(-1, mt.num_layers),
        "low_score": float(low),
        "high_score": torch.tensor(traced.high_score),
        "input_ids": clean.ids[0],
        "input_tokens": decode_tokens(mt.tokenizer, clean.ids[0]),
        "subject_range": e_range,
        "answer": decode_tokens(mt.tokenizer, [answer_id])[0],
        "window": window,
        "correct_prediction": True,
        "kind": kind or "",
    }


def predict_token(
    mt: ModelAndTokenizer, prompts: Sequence[str], return_p: bool = False, *, image: Image
) -> list[str] | tuple[list[str], Tensor]:
    """The most probable first token of the answer to each question about a picture, and with `return_p` its
    probability, float32 [prompts]."""
    predicted = [
        predict_from_input(mt.model, make_inputs(mt.processor, [prompt], image=image)) for prompt in prompts
    ]
    words = [mt.tokenizer.decode(preds) for preds, _ in predicted]
    return (words, torch.cat([p for _, p in predicted])) if return_p else words


def predict_from_input(model: Any, inp: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The most probable first token of the answer in each row, int64 [B], and its probability, float32 [B].
    Raises as `make_inputs` does."""
    batch = check_inputs(inp, 1)
    seen: dict[tuple[int, ...], tuple[int, Tensor]] = {}
    found = []
    for number, ids in enumerate(batch.ids.tolist()):
        row = (*ids, number if len(batch.pixels) > 1 else 0)
        if row not in seen:
            seen[row] = _predicted(model, batch, number)
        found.append(seen[row])
    return torch.tensor([token for token, _ in found]), torch.stack([p for _, p in found])


def _module(kind: str | None) -> str:
    if (kind or "") not in MODULES:
        raise ValueError(f"unknown kind {kind!r}: choose None, {', '.join(filter(None, MODULES))}")
    return MODULES[kind or ""]


def _grid(
    inp: Mapping[str, Tensor],
    num_layers: int,
    kind: str | None,
    window: int,
    token_range: Iterable[int] | None,
) -> list[Cell]:
    """Cells [tokens, layers] of the question encoder, layer after layer of a token."""
    module = _module(kind)
    check_count("num_layers", num_layers)
    check_count("window", window, "layers")
    tokens = range(check_inputs(inp, 2).ids.shape[1]) if token_range is None else token_range
    return [
        Cell.of(
            site(layer_name("text_encoder", near, module), token)
            for near in window_layers(layer, window, num_layers)
        )
        for token in tokens
        for layer in range(num_layers)
    ]


def _cell_score(cell: Cell, model: Any, inp: Mapping[str, Tensor], *given: Any) -> Tensor:
    """The score of one cell, or the low score where it puts nothing back."""
    traced = _traced([cell if cell.sites else NOWHERE], model, inp, *given)
    return (traced.scores[:, 0] if cell.sites else traced.low_scores).mean()


def _traced(
    cells: Sequence[Cell],
    model: Any,
    inp: Mapping[str, Tensor],
    answers_t: int | Tensor | None,
    tokens_to_mix: tuple[int, int] | None,
    noise: Noise,
    uniform_noise: bool,
    replace: bool,
) -> Restored:
    """All of these cells in one pass. answers_t: None for the most probable token of the clean row."""
    check_answers(model)
    batch = check_inputs(inp, 2)
    if isinstance(answers_t, Tensor) and answers_t.numel() != 1:
        raise UnsupportedError("several answers at once", "trace each of them, one call after the other")
    pixels = batch.pixels[1:] if len(batch.pixels) > 1 else None
    corruption = BatchNoise(batch.ids[1:], pixels, tokens_to_mix, noise, uniform_noise, replace)
    answer = None if answers_t is None else int(answers_t)
    return tracer_of(model).restore(*batch.row(0), cells, answer, corruption)


def _predicted(model: Any, batch: Batch, row: int) -> tuple[int, Tensor]:
    """The most probable first token of a row's answer, and its probability []."""
    check_answers(model)
    logits = tracer_of(model).logits(*batch.row(row), [NOWHERE], corruption="none").high[0]
    p, token = logits.softmax(-1).max(-1)
    return int(token), p
