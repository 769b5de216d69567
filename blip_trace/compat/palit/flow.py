"""The notebooks' traces: their arguments and results, done by the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor

from ...result import Restored, TraceResult
from ...sites import Cell, check_count, check_names, window_layers
from ...sweep.answers import is_correct
from ...tracer import Tracer
from ..models import NOWHERE, UnsupportedError
from .layers import BLOCKS, STATES, cell_of, layername
from .model import ModelandProcessor, customblip_temp, tracer_for
from .settings import Options, Settings, refuse_unused

WINDOW = 3
"""Layers that a cell of a kind restores."""


class HiddenFlow(dict[str, Any]):
    """The notebooks' result: scores float32 [tokens, layers], low_score (float), high_score [2] (the clean
    probability, twice), question, answer, correct_prediction, block_name; kind, of a kind or of the attention
    notebook.

    What they lack is in attributes: `tokens`, the labels of the rows; `layers`, the numbers of the columns;
    `settings`, by which it was made; and `trace`, the whole `TraceResult` with its samples, None where each
    cell has noise of its own.
    """

    def __init__(
        self,
        entries: dict[str, Any],
        tokens: tuple[str, ...],
        layers: range,
        settings: Settings,
        trace: TraceResult | None,
    ) -> None:
        super().__init__(entries)
        self.tokens = tokens
        self.layers = layers
        self.settings = settings
        self.trace = trace


def trace_with_patch(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    pred_ans: Tensor | int,
    patching_layers: Sequence[tuple[int, str]],
    replace: bool = False,
    trace_layers: Sequence[str] | None = None,
    **options: Unpack[Options],
) -> Tensor:
    """The probability [] of the token pred_ans after the corrupted run with all of these states put back to
    their clean values, mean over samples; with none of them, the low score.

    patching_layers: (token, `layername`) pairs; tokens from 0, or from -1 backwards.
    Raises UnsupportedError for replace and trace_layers, which the notebooks take and ignore, and for modules
    whose outputs cannot be restored; ValueError or TypeError for what is not there.
    """
    refuse_unused(replace=replace, trace_layers=trace_layers)
    settings, tracer = Settings(**options), tracer_for(mt, new_model)
    cell = cell_of(new_model, patching_layers, _tokens(tracer, question))
    return _scores(tracer, image, question, [cell], pred_ans, settings)[0]


def trace_important_states(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    start: int,
    num_layers: int,
    block_name: str,
    image: Any,
    question: str,
    pred_ans: Tensor | int,
    num: int | None = None,
    replace: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """`trace_with_patch` for the layers from `start` up to but not including num_layers of each of the first
    `num` tokens, of all the block's unless given: float32 [num, num_layers - start].

    Common noise: all in one pass. Redrawn: one draw for each cell, token by token and layer by layer. Raises
    as `trace_with_patch` does.
    """
    own = (start, num_layers, block_name, image, question, pred_ans, None, 1, num, replace)
    return trace_important_window(mt, new_model, *own, **options)


def trace_important_window(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    start: int,
    num_layers: int,
    block_name: str,
    image: Any,
    question: str,
    pred_ans: Tensor | int,
    kind: str | None,
    window: int = WINDOW,
    num: int | None = None,
    replace: bool = False,
    **options: Unpack[Options],
) -> Tensor:
    """As `trace_important_states`, of a kind of states (see `layers.STATES`) in `window` layers at a time:
    from max(0, l - window // 2) up to but not including min(num_layers, l + ceil(window / 2))."""
    refuse_unused(replace=replace)
    settings, tracer = Settings(**options), tracer_for(mt, new_model)
    check_names("block_name", [block_name], BLOCKS)
    _check_kind(kind)
    check_count("window", window, "layers")
    tokens = _tokens(tracer, question)
    rows, columns = range(tokens[block_name] if num is None else num), range(start, num_layers)
    if start < 0 or not rows or not columns:
        raise ValueError(f"no cells to trace: {len(rows)} tokens, layers {start} up to {num_layers}")
    cells = [
        cell_of(
            new_model,
            [
                (row, layername(new_model, near, block_name, kind))
                for near in window_layers(column, window, num_layers)
            ],
            tokens,
        )
        for row in rows
        for column in columns
    ]
    return _scores(tracer, image, question, cells, pred_ans, settings).view(len(rows), len(columns))


def calculate_hidden_flow(
    mt: ModelandProcessor,
    new_model: customblip_temp,
    image: Any,
    question: str,
    block_name: str,
    kind: str | None = None,
    expect: str | None = None,
    **options: Unpack[Options],
) -> HiddenFlow:
    """The map of a block, "text_encoder" (all tokens of the question) or "text_decoder" (its first token), of
    the probability of the first token of the model's own answer: see `HiddenFlow`.

    kind: None, restoring a layer's state; or a kind of `layers.STATES`, in windows of three layers.
    expect: the answer with which the model's whole (greedy) answer is compared, as the VQA evaluation does,
        for `correct_prediction`; without one that is True.
    options: see `Options`. By default one pass of the engine. Faithful noise is drawn for the low score
        first, then for each cell, token by token and layer by layer.

    Raises UnsupportedError for a faithful map that the notebook cannot make; ValueError or TypeError, in one
    sentence, for what cannot be traced.
    """
    settings, tracer = Settings(**options), tracer_for(mt, new_model)
    check_names("block_name", [block_name], BLOCKS)
    _check_kind(kind)
    if not isinstance(expect, str | None):
        raise TypeError(f"expect is an answer or None, not {type(expect).__name__}")
    if settings.faithful:
        _check_faithful(settings, block_name, kind)
    pixels = _pixels(tracer, image, settings)
    layers, trace = range(mt.num_layers), None
    if settings.redrawn:
        found = tracer.restore(pixels, question, [NOWHERE], corruption=settings.corruption())
        span = (layers.start, layers.stop, block_name, image, question, found.answer_ids[0])
        scores = trace_important_states(mt, new_model, *span, **options)
        low, high, answer = float(found.low_scores), found.high_score, found.answer
        ids = tracer.token_ids(tracer.ask(pixels, question), found.answer_ids)
        tokens = tracer.inputs.labels(ids[block_name])
    else:
        if settings.faithful and block_name == "text_decoder":
            layers = layers[1:]
        trace = tracer.trace(
            pixels,
            question,
            corruption=settings.corruption(),
            stacks=(block_name,),
            kinds=(STATES[kind],),
            window=1 if kind is None else WINDOW,
        )
        scores = trace.grid(block_name, STATES[kind])[:, layers.start :]
        low, high, answer = trace.low_score, trace.high_score, trace.answer
        tokens = trace.tokens(block_name)
    entries = {
        "scores": scores,
        "low_score": low,
        "high_score": torch.tensor([high, high]),
        "question": question,
        "answer": answer,
        "correct_prediction": expect is None or _says(tracer, pixels, question, expect),
        "block_name": block_name,
    }
    if kind is not None or settings.notebook == "attention":
        entries["kind"] = kind
    return HiddenFlow(entries, tokens, layers, settings, trace)


def _scores(
    tracer: Tracer,
    image: Any,
    question: str,
    cells: Sequence[Cell],
    pred_ans: Tensor | int,
    settings: Settings,
) -> Tensor:
    """The probability [cells] of the token with each of these cells restored, empty ones too."""
    token, pixels, corruption = _token_id(pred_ans), _pixels(tracer, image, settings), settings.corruption()

    def restored(some: Sequence[Cell]) -> Tensor:
        given = [cell if cell.sites else NOWHERE for cell in some]
        found: Restored = tracer.restore(pixels, question, given, answer=token, corruption=corruption)
        low = found.low_scores[:, None].expand_as(found.scores)
        empty = torch.tensor([not cell.sites for cell in some])
        return torch.where(empty, low, found.scores).mean(0)

    if settings.redrawn:  # nothing can be shared but the image's encoding
        return torch.cat([restored([cell]) for cell in cells])
    return restored(cells)


def _tokens(tracer: Tracer, question: str) -> dict[str, int]:
    """How many tokens each block has."""
    return {"text_encoder": len(tracer.inputs.question_ids(question)), "text_decoder": 1}


def _pixels(tracer: Tracer, image: Any, settings: Settings) -> Tensor:
    """Pixel values [1, 3, H, W]; faithful ones are the processor's alone, which leaves a photograph lying on
    its side where only its EXIF data say so."""
    if settings.faithful and not isinstance(image, Tensor):
        pixels: Tensor = tracer.processor(images=image, return_tensors="pt").pixel_values
        return pixels
    return tracer.inputs.pixels(image)


def _says(tracer: Tracer, pixels: Tensor, question: str, expect: str) -> bool:
    """Whether the model's whole answer is this one."""
    (said,) = tracer.answers([tracer.ask(pixels, question)])
    return is_correct(said, [expect])


def _token_id(pred_ans: object) -> int:
    if isinstance(pred_ans, Tensor) and pred_ans.numel() == 1 and not pred_ans.is_floating_point():
        return int(pred_ans)
    if isinstance(pred_ans, int) and not isinstance(pred_ans, bool):
        return pred_ans
    raise TypeError(f"pred_ans must be one token id, not {pred_ans!r}")


def _check_kind(kind: object) -> None:
    if kind not in STATES:
        known = ", ".join(str(name) for name in STATES)
        raise ValueError(f"unknown kind {kind!r}: choose among {known}")


def _check_faithful(settings: Settings, block_name: str, kind: str | None) -> None:
    """Raises UnsupportedError for a map for which the notebook has no branch."""
    known = (None, "attention", "crossattention") if settings.notebook == "attention" else (None,)
    if kind not in known or (kind is not None and block_name != "text_encoder"):
        raise UnsupportedError(
            f"a faithful map of kind {kind!r} of the {block_name} in the {settings.notebook} notebook",
            "the notebook itself fails there with an UnboundLocalError; leave faithful out",
        )
