"""What the engine is measured against: the published tool's loop, what an informed user can do with hooks
today, and the strongest thing stock torch can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import BlipForQuestionAnswering

from blip_trace import hooks, reference
from blip_trace.engine import Task
from blip_trace.sites import Cell


@torch.inference_mode()
def published_loop(
    model: BlipForQuestionAnswering, encode: Callable[[], Tensor], task: Task, cells: Sequence[Cell]
) -> None:
    """(A) The loop of the BLIP causal-tracing tool (Palit et al. 2023).

    For every cell the image is encoded twice, then a batch of two, clean and corrupted, goes through the text
    stacks, with hooks that put the clean row's state into the corrupted row.
    (B) is the same loop with an `encode` that only returns what was encoded before: what an intervention of
    pyvene or nnsight costs too, which run the clean input along.
    """
    for cell in cells:
        clean = encode()
        images = torch.cat((clean, encode()))
        images[1] = task.corrupted[0]
        edits = {}
        for site in cell.sites:

            def restore(output: Tensor, token: int = site.token) -> Tensor:
                output = output.clone()
                output[1:, token] = output[0, token]
                return output

            edits[hooks.site_module(model, site.stack, site.layer, site.kind)] = restore
        with hooks.editing(edits):
            logits = hooks.answer_logits(model, task, images)
        logits[1:, -1].float().softmax(-1)


@torch.inference_mode()
def lean_hooks(model: BlipForQuestionAnswering, task: Task, cells: Sequence[Cell]) -> None:
    """This package's own hook backend: the image encoded and the clean states recorded once, then one forward
    pass of the corrupted run alone for every cell."""
    hooks.score(model, [replace(task, cells=tuple(cells))])


@torch.inference_mode()
def batched_hooks(
    model: BlipForQuestionAnswering, task: Task, cells: Sequence[Cell], clean: dict[Cell, Tensor]
) -> Tensor:
    """(C) Hooks with these cells as the rows of one batch, each row restored at its own site.

    The image is encoded once, its keys and values are projected for every row. `clean`: the state of each
    one-site cell.
    """
    edits: dict[torch.nn.Module, hooks.Edit] = {}
    rows_of: dict[torch.nn.Module, list[tuple[int, Cell]]] = {}
    for row, cell in enumerate(cells):
        (site,) = cell.sites
        module = hooks.site_module(model, site.stack, site.layer, site.kind)
        rows_of.setdefault(module, []).append((row, cell))
    for module, rows in rows_of.items():

        def restore(output: Tensor, rows: list[tuple[int, Cell]] = rows) -> Tensor:
            output = output.clone()
            for row, cell in rows:
                (site,) = cell.sites
                output[row, site.token] = clean[cell]
            return output

        edits[module] = restore
    images = task.corrupted[:1].expand(len(cells), -1, -1)
    with hooks.editing(edits):
        return hooks.answer_logits(model, task, images)[:, -1]


class StockOps:
    """(D) The same forking pass in stock torch: keys and values projected once for each image and layer,
    `scaled_dot_product_attention` on folded rows, F.layer_norm, F.gelu."""

    linear = staticmethod(reference.linear)
    token_logits = staticmethod(reference.token_logits)

    @staticmethod
    def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))

    @staticmethod
    def linear_add_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        residual_rows: Tensor | None,
        update_rows: Tensor | None,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        return_sum: bool,
    ) -> tuple[Tensor, Tensor]:
        update = F.linear(x, weight, bias)
        if residual_rows is not None and update_rows is not None:
            residual, update = residual[residual_rows], update[update_rows]
        total = residual + update
        return F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, eps), total

    @staticmethod
    def self_attention(
        qkv: Tensor, starts: Tensor, prefixes: Tensor | None, heads: int, causal: bool
    ) -> Tensor:
        runs = len(starts) - 1  # of equal length in the benchmarks
        q, k, v = qkv.view(runs, len(qkv) // runs, 3, heads, -1).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(len(qkv), -1)

    @staticmethod
    def cross_attention(
        query: Tensor,
        states: Tensor,
        key_weight: Tensor,
        value_weight: Tensor,
        query_starts: Tensor,
        state_starts: Tensor,
        heads: int,
    ) -> Tensor:
        keys, values = F.linear(states, key_weight), F.linear(states, value_weight)
        rows_of, sets_of = _on_the_cpu(query_starts), _on_the_cpu(state_starts)
        if _equal_parts(rows_of) and _equal_parts(sets_of):
            groups = len(rows_of) - 1
            folded = _attend(_batched(query, groups, heads), keys, values, groups, heads)
            return folded.transpose(1, 2).reshape(len(query), -1)
        out = torch.empty_like(query)
        for (first, last), (begin, end) in zip(pairwise(rows_of), pairwise(sets_of), strict=True):
            q = _batched(query[first:last], 1, heads)
            context = _attend(q, keys[begin:end], values[begin:end], 1, heads)
            out[first:last] = context[0].transpose(0, 1).flatten(1)
        return out


_marks = WeakTensorKeyDictionary()


def _on_the_cpu(starts: Tensor) -> list[int]:
    """Starts, fetched once from a GPU: a plan's are the same in every pass."""
    if starts not in _marks:
        _marks[starts] = starts.tolist()
    found: list[int] = _marks[starts]
    return found


def _equal_parts(starts: Sequence[int]) -> bool:
    return len({last - first for first, last in pairwise(starts)}) == 1


def _batched(rows: Tensor, groups: int, heads: int) -> Tensor:
    """[groups * n, H * d] as [groups, H, n, d]."""
    return rows.view(groups, len(rows) // groups, heads, -1).transpose(1, 2)


def _attend(q: Tensor, keys: Tensor, values: Tensor, groups: int, heads: int) -> Tensor:
    return F.scaled_dot_product_attention(q, _batched(keys, groups, heads), _batched(values, groups, heads))
