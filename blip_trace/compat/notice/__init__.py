"""NOTICE's activation patching of BLIP (Golovanevsky et al. 2025), with its names, arguments and results, on
this engine: a whole map, all tokens x layers x heads, is one pass.

NOTICE corrupts without noise: another image (a semantic minimal pair), or another question of as many tokens
(symmetric token replacement). It runs three rows, clean, corrupt and patched, whose last has one state of the
first, and compares the logits of a correct and an incorrect answer.

    flow = calculate_hidden_flow(
        model, processor, "is this door old or new?", "old.png", "new.png", [ids_old, ids_new], "image",
        start=0, num_layers=12, block_name="text_encoder", kind="crossattention_block",
    )
    flow["scores"]  # [tokens, layers, 4]

The four metrics of a state: P_patched(correct), P_patched - P_corrupt, LD_patched - LD_corrupt and that over
LD_clean - LD_corrupt, the patching effect; LD = logit(correct) - logit(incorrect), of each answer's first
word piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ... import hooks
from ...sites import Cell
from ..layers import site
from ..models import UnsupportedError
from .circuit import get_circuits, head_scores, selected_scores
from .patch import Asked, ask, layername
from .results import load_rows, rows_name, save_rows
from .rows import Question, get_incorrect_answers, parse_triplet, questions_of, read_rows

__all__ = [
    "calculate_head_flows",
    "calculate_hidden_flow",
    "debug_head_flows",
    "debug_hidden_flow",
    "get_circuits",
    "get_incorrect_answers",
    "head_scores",
    "layername",
    "load_rows",
    "parse_triplet",
    "read_rows",
    "rows_name",
    "save_rows",
    "selected_scores",
    "trace_important_states",
    "trace_with_patch",
]


def trace_with_patch(
    model: Any,
    processor: Any,
    constant_input: Any,
    clean_input: Any,
    corrupt_input: Any,
    answer_tokens: Sequence[int],
    mode: str,
    states_to_patch: Sequence[tuple[int, str]],
    attn_head: int | None = None,
) -> Tensor:
    """The four metrics of one run, float32 [4]: the corrupt one with these states, tokens and names of
    modules (`layername`), of the clean one.

    constant_input, clean_input, corrupt_input: mode "image": the question, the image and the other image;
    mode "text": the image, the question and the other one; mode "both" (beyond NOTICE): None and two pairs
    (image, question). answer_tokens: ids of the correct and of the incorrect answer. attn_head: one head of
    attention_block or crossattention_block; None: all of them.

    Where LD_clean and LD_corrupt are as good as the same (`VANISHING`) the patching effect is NaN, with a
    warning. Raises ValueError for an unknown mode, for equal inputs and for tokens, layers and heads that are
    not there, and UnsupportedError for prompts of unequal length, for models that do not answer questions,
    for states that are none of a text layer and for a head of a state that has none.
    """
    states = [site(name, token, attn_head) for token, name in states_to_patch]
    asked = ask(model, processor, constant_input, clean_input, corrupt_input, answer_tokens, mode)
    found = asked.patch([Cell.of(states)] if states else [])
    if found.vanishes:
        _warn("the corruption leaves")
    return found.scores[0] if states else found.low


def trace_important_states(
    model: Any,
    processor: Any,
    constant_input: Any,
    clean_input: Any,
    corrupt_input: Any,
    answer_tokens: Sequence[int],
    mode: str,
    start: int,
    num_layers: int,
    block_name: str,
    num: int | None = None,
    kind: str | None = None,
    attn_head: int | None = None,
) -> Tensor:
    """The four metrics of every token and of the layers from `start` to before `num_layers`, in one pass:
    float32 [tokens, layers, 4]. num: how many tokens, all unless given. Otherwise as `trace_with_patch`."""
    asked = ask(model, processor, constant_input, clean_input, corrupt_input, answer_tokens, mode)
    scores, found = asked.maps(range(start, num_layers), block_name, kind, [attn_head], num)
    if found.vanishes:
        _warn("the corruption leaves")
    return scores[0]


def calculate_hidden_flow(
    model: Any,
    processor: Any,
    constant_input: Any,
    clean_input: Any,
    corrupt_input: Any,
    answer_tokens: Sequence[int],
    mode: str,
    start: int,
    num_layers: int,
    block_name: str,
    kind: str | None = None,
    attn_head: int | None = None,
) -> dict[str, Any]:
    """A map and what belongs to it, in one pass.

    Returns scores (float32 [tokens, layers, 4]), low_score (float32 [4], of the corrupt run), question,
    correct_token, incorrect_token, block_name, kind and attn_head. Arguments and errors as in
    `trace_with_patch` and `layername`.
    """
    asked = ask(model, processor, constant_input, clean_input, corrupt_input, answer_tokens, mode)
    (flow,), vanishes = asked.flows(range(start, num_layers), block_name, kind, [attn_head])
    if vanishes:
        _warn("the corruption leaves")
    return flow


def calculate_head_flows(
    model: Any,
    processor: Any,
    constant_input: Any,
    clean_input: Any,
    corrupt_input: Any,
    answer_tokens: Sequence[int],
    mode: str,
    start: int,
    num_layers: int,
    block_name: str,
    kind: str,
) -> list[dict[str, Any]]:
    """What `calculate_hidden_flow` gives for each head, head after head: all of them in one pass, where
    NOTICE starts a job for each."""
    asked = ask(model, processor, constant_input, clean_input, corrupt_input, answer_tokens, mode)
    heads = range(hooks.text_heads(model))
    flows, vanishes = asked.flows(range(start, num_layers), block_name, kind, heads)
    if vanishes:
        _warn("the corruption leaves")
    return flows


def debug_hidden_flow(
    model: Any,
    processor: Any,
    df: Any,
    block_name: str,
    kind: str | None,
    start: int,
    end: int,
    mode: str,
    attn_head: int | None = None,
    image_tensors: Any = None,
) -> list[dict[str, Any]]:
    """`calculate_hidden_flow` of every row of a table, in its order.

    df: a pandas DataFrame, or rows as `read_rows` gives them: clean_image_path, clean_prompt, correct_answer,
    incorrect_answer and, for its mode, corrupt_image_path or corrupt_prompt. image_tensors: by what stands
    there as a path, the images: float [3, H, W] between 0 and 1, uint8 [3, H, W], or whatever `Tracer.trace`
    takes for one. All rows are checked before the first is traced.

    Raises ValueError, naming the row, where it lacks something, and as `calculate_hidden_flow` does.
    """
    (flows,) = _table(
        model, processor, df, block_name, kind, range(start, end), mode, [attn_head], image_tensors
    )
    return flows


def debug_head_flows(
    model: Any,
    processor: Any,
    df: Any,
    block_name: str,
    kind: str,
    start: int,
    end: int,
    mode: str,
    image_tensors: Any = None,
) -> list[list[dict[str, Any]]]:
    """`debug_hidden_flow` for each head, head after head: one pass a row for all of them."""
    heads = range(hooks.text_heads(model))
    return _table(model, processor, df, block_name, kind, range(start, end), mode, heads, image_tensors)


def _table(
    model: Any,
    processor: Any,
    df: Any,
    block_name: str,
    kind: str | None,
    layers: Sequence[int],
    mode: str,
    heads: Sequence[int | None],
    image_tensors: Any,
) -> list[list[dict[str, Any]]]:
    """The results of these heads [heads][rows]."""

    def ask_row(row: Question) -> Asked:
        try:
            return ask(model, processor, *row.inputs(mode), row.answer_tokens(processor.tokenizer), mode)
        except UnsupportedError as error:
            raise UnsupportedError(f"{row.where}: {error.part}", error.instead) from error
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error

    rows = questions_of(df, mode, image_tensors)
    for row in rows:
        ask_row(row)  # a check: kept, the images of all rows would be in memory at once
    flows: list[list[dict[str, Any]]] = [[] for _ in heads]
    vanishing = 0
    for row in rows:
        found, vanishes = ask_row(row).flows(layers, block_name, kind, heads)
        vanishing += vanishes
        for own, flow in zip(flows, found, strict=True):
            own.append(flow)
    if vanishing:
        _warn(f"in {vanishing} of {len(rows)} rows the corruption leaves", 4)
    return flows


def _warn(begin: str, stacklevel: int = 3) -> None:
    warnings.warn(
        f"{begin} the logit difference of the answers as good as it was: the patching effect is NaN there",
        stacklevel=stacklevel,
    )
