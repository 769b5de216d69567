"""Tracer: the public face; the one place that ties the rooms below together."""

from __future__ import annotations

import hashlib
import platform
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import PIL.Image
import torch
from torch import Tensor
from transformers import BlipForQuestionAnswering

from . import __version__, cost, engine, hooks
from .corruption import Corruption, Edit, GaussianNoise, InputCorruption, Original, corrupt
from .inputs import Inputs
from .lowering.blip import lower
from .lowering.load import load_model, parse_dtype
from .ops import OpSet, get_ops, native_unavailable_reason
from .program import PatchEmbedding, Program
from .result import Restored, TraceResult
from .sites import (
    DIRECTIONS,
    HEAD_KINDS,
    Cell,
    Site,
    check_cells,
    check_maps,
    check_names,
    check_tokens,
    grid_cells,
)

Backend = Literal["auto", "native", "reference", "hooks"]
Image = str | Path | PIL.Image.Image | Tensor
Progress = Callable[[float], None]
"""Called with the share of the work that is done, 0 to 1."""

BACKENDS = ("auto", "native", "reference", "hooks")
CACHED_IMAGES = 32


@dataclass(frozen=True)
class _Asked:
    """A checked question: pixels [1, 3, H, W], question_ids [T], answer_ids [A] or None."""

    pixels: Tensor
    question_ids: Tensor
    answer_ids: Tensor | None

    @property
    def lengths(self) -> dict[str, int]:
        """Tokens of each text stack."""
        answer = 1 if self.answer_ids is None else len(self.answer_ids)
        return {"text_encoder": len(self.question_ids), "text_decoder": answer}


class Tracer:
    """Traces which states of a BLIP question answerer carry its answer.

    Weights are read once, when the tracer is made; dropout is off.

    backend: "native" (compiled), "reference" (the same engine in plain torch), "hooks" (one forward pass of
    the unmodified model for every cell: slow, and what defines right), or "auto": native where it was built,
    else, with a warning, reference.
    memory: bytes of activations that a pass may take; larger traces are split and give the same numbers but
    for rounding.

    Raises ValueError for an unknown backend, for weights that are not finite and for a model that cannot be
    expressed, TypeError for a model that is no `BlipForQuestionAnswering`, and `BackendUnavailableError`
    (a RuntimeError) where "native" was asked for but not built.
    """

    def __init__(
        self,
        model: BlipForQuestionAnswering,
        processor: Any = None,
        backend: Backend = "auto",
        memory: int = engine.DEFAULT_MEMORY,
    ) -> None:
        check_names("backend", [backend], BACKENDS)
        if not isinstance(model, BlipForQuestionAnswering):
            raise TypeError(f"only BlipForQuestionAnswering can be traced, not {type(model).__name__}")
        if model.device.type != "cpu":
            raise ValueError(f"the model is on {model.device}: this version traces on the CPU")
        if memory < 2**20:
            raise ValueError(f"memory must be at least {2**20} bytes, not {memory}")
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"the model's weight {name} holds NaN or infinity")
        self.model = model.eval()
        self.processor = processor
        self.memory = memory
        self.backend = _choose_backend(backend)
        self._inputs = Inputs(model.config, processor)
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        hub_id_or_folder: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        backend: Backend = "auto",
        memory: int = engine.DEFAULT_MEMORY,
    ) -> Tracer:
        """Load a `BlipForQuestionAnswering` and its processor: safetensors only, no remote code.

        dtype: "float32", or "bfloat16" (weights and matrix products in bfloat16; softmax, LayerNorm, sums and
        scores in float32).

        Raises ValueError where the folder holds no such model, or any weight is missing, unexpected or of
        another shape (named in the message), and for an unknown dtype or device; OSError where it cannot be
        read.
        """
        if device != "cpu":
            raise ValueError(f"unknown device {device!r}: this version traces on the CPU")
        check_names("backend", [backend], BACKENDS)
        model, processor = load_model(hub_id_or_folder, parse_dtype(dtype))
        return cls(model, processor, backend, memory)

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and matrix products."""
        dtype: torch.dtype = self.model.dtype
        return dtype

    @cached_property
    def program(self) -> Program:
        """The model as data."""
        return lower(self.model)

    @cached_property
    def ops(self) -> OpSet:
        """The ops that the engine calls."""
        return get_ops(self.backend)

    def trace(
        self,
        image: Image,
        question: str | Tensor,
        answer: str | int | None = None,
        corruption: Corruption | None = None,
        stacks: Sequence[str] = ("text_encoder", "text_decoder"),
        kinds: Sequence[str] = ("hidden",),
        window: int = 1,
        progress: Progress | None = None,
        tokens: Mapping[str, Sequence[int]] | None = None,
        direction: str = "denoise",
    ) -> TraceResult:
        """Map, for every layer x token x kind of state, how much of the answer returns when that state of the
        corrupted run is put back to its clean value (causal tracing: Meng et al. 2022; for BLIP: Palit et al.
        2023).

        image: a PIL image, a path, or pixel_values [1, 3, H, W]; its encoding is cached across calls.
        question: a string, or input_ids [1, T]; padding at the end is ignored.
        answer: None for the first token of the model's own clean answer; a string, whose tokens are
            teacher-forced and scored by their joint probability; or a token id.
        corruption: what corrupts the image embeddings: an object of `blip_trace.corruption`, or a callable
            from [N, D] to [S, N, D]; `GaussianNoise()` (ten samples) unless given.
        stacks, kinds: which maps to make; kinds as in the table of the README.
        window: how many consecutive layers a cell restores, centred on its own.
        progress: called with the share of the work done.
        tokens: for a stack, the tokens whose states are restored, from 0 or from -1 backwards; all of them in
            a stack that is not named. Maps of heads have many cells: those of the last token alone are
            `tokens={"text_encoder": [-1]}`.
        direction: "denoise", or "noise": corrupted states are put into the clean run, and what a cell shows
            is how much of the answer that leaves.

        Raises ValueError or TypeError, in one sentence, for inputs that cannot be traced.
        """
        return self.trace_batch(
            [(image, question)], [answer], corruption, stacks, kinds, window, progress, tokens, direction
        )[0]

    def trace_batch(
        self,
        pairs: Sequence[tuple[Image, str | Tensor]],
        answers: Sequence[str | int | None] | None = None,
        corruption: Corruption | None = None,
        stacks: Sequence[str] = ("text_encoder", "text_decoder"),
        kinds: Sequence[str] = ("hidden",),
        window: int = 1,
        progress: Progress | None = None,
        tokens: Mapping[str, Sequence[int]] | None = None,
        direction: str = "denoise",
    ) -> list[TraceResult]:
        """Trace several (image, question) pairs, packed into common passes without padding; each result is
        that of `trace` on its pair. Arguments as there; `answers` has one for each pair."""
        corruption = self._check_corruption(corruption, direction)
        answers = [None] * len(pairs) if answers is None else answers
        if len(answers) != len(pairs):
            raise ValueError(f"{len(pairs)} questions but {len(answers)} answers")
        stacks, kinds = check_maps(stacks, kinds, window)
        check_names("stack", list(tokens or stacks), stacks)

        tasks, cuts = [], []
        asked = [self._ask(*pair, answer) for pair, answer in zip(pairs, answers, strict=True)]
        for inputs in asked:
            lengths = inputs.lengths
            chosen = {stack: check_tokens((tokens or {}).get(stack), lengths[stack]) for stack in stacks}
            grids = self._grids(stacks, kinds, window, chosen)
            cells = tuple(cell for grid in grids.values() for cell in grid)
            task, note = self._task(inputs, corruption, cells, direction)
            tasks.append(task)
            cuts.append((grids, chosen, note))
        scores = self._score(tasks, progress)

        settings = {**self._settings(corruption), "window": window, "direction": direction}
        return [
            self._result(question, task, grids, chosen, own, {**settings, "corrupted": note})
            for (_, question), task, own, (grids, chosen, note) in zip(
                pairs, tasks, scores, cuts, strict=True
            )
        ]

    def restore(
        self,
        image: Image,
        question: str | Tensor,
        cells: Sequence[Cell | Site | Iterable[Site]],
        answer: str | int | None = None,
        corruption: Corruption | None = None,
        direction: str = "denoise",
        progress: Progress | None = None,
    ) -> Restored:
        """P(answer) with any sets of states put back, in one pass: what other tools build on.

        cells: each a `Cell`, a `Site` or several sites, which are restored together in a run of their own, in
        any stack, layer, kind, token and head (`Cell.each` makes many from arrays). Equal cells are computed
        once. Everything else as in `trace`.

        Raises ValueError for an empty list, an empty cell, and a site that this question or model does not
        have.
        """
        corruption = self._check_corruption(corruption, direction)
        inputs = self._ask(image, question, answer)
        config = self.model.config.text_config
        checked = check_cells(cells, inputs.lengths, config.num_hidden_layers, config.num_attention_heads)
        distinct = {cell: number for number, cell in enumerate(dict.fromkeys(checked))}
        task, note = self._task(inputs, corruption, tuple(distinct), direction)
        (scores,) = self._score([task], progress)
        log_probs = scores.restored[:, [distinct[cell] for cell in checked]]  # [S, cells, A]
        return Restored(
            scores=log_probs.sum(-1).exp().float(),
            token_log_probs=log_probs.double(),
            low_scores=scores.corrupted.sum(-1).exp().float(),
            high_score=float(scores.clean.sum().exp()),
            question=self._question_text(question, task),
            answer=self._inputs.text(scores.answer_ids.tolist()),
            answer_ids=tuple(scores.answer_ids.tolist()),
            settings={**self._settings(corruption), "direction": direction, "corrupted": note},
        )

    @staticmethod
    def _check_corruption(corruption: Corruption | None, direction: str) -> Corruption:
        check_names("direction", direction, DIRECTIONS)
        corruption = GaussianNoise() if corruption is None else corruption
        if not callable(corruption) and not isinstance(corruption, InputCorruption):
            raise TypeError(f"a corruption must be callable, not {type(corruption).__name__}")
        return corruption

    def _ask(self, image: Image, question: str | Tensor, answer: str | int | None) -> _Asked:
        return _Asked(
            self._inputs.pixels(image), self._inputs.question_ids(question), self._inputs.answer_ids(answer)
        )

    def _task(
        self, asked: _Asked, corruption: Corruption, cells: tuple[Cell, ...], direction: str
    ) -> tuple[engine.Task, str]:
        """What the engine is given, and what the corruption says it changed."""
        clean = self._image_states(asked.pixels)
        made = corrupt(corruption, self._original(asked.pixels, asked.question_ids, clean))
        task = engine.Task(
            asked.question_ids, asked.answer_ids, clean, made.images, cells, direction, made.words
        )
        return task, made.note

    def _question_text(self, question: str | Tensor, task: engine.Task) -> str:
        return question if isinstance(question, str) else self._inputs.text(task.question_ids.tolist())

    def _grids(
        self, stacks: Sequence[str], kinds: Sequence[str], window: int, tokens: Mapping[str, Sequence[int]]
    ) -> dict[tuple[str, str], list[Cell]]:
        config = self.model.config.text_config
        layers, heads = config.num_hidden_layers, config.num_attention_heads
        return {
            (stack, kind): grid_cells(stack, kind, tokens[stack], layers, window, heads)
            for stack in stacks
            for kind in kinds
        }

    def _image_states(self, pixels: Tensor) -> Tensor:
        """Image embeddings [N, D] of pixel values [1, 3, H, W], from the cache if they were seen before."""
        key = hashlib.blake2b(pixels.numpy().tobytes(), digest_size=16).digest()
        if key not in self._states:
            states = self._encode(pixels, None)[0]
            if not bool(torch.isfinite(states).all()):
                raise ValueError("the image encoder gives NaN or infinite embeddings for this image")
            self._states[key] = states
            while len(self._states) > CACHED_IMAGES:
                self._states.popitem(last=False)
        self._states.move_to_end(key)
        return self._states[key]

    def _encode(self, pixels: Tensor, edit: Edit | None) -> Tensor:
        """Image embeddings [S, N, D] of pixel values [S, 3, H, W], as many at once as memory allows."""
        states = []
        for first in range(0, len(pixels), self._images_at_once):
            samples = slice(first, first + self._images_at_once)
            part = pixels[samples].float()

            change = None if edit is None else _for_samples(edit, samples)
            if self.backend == "hooks":
                states.append(hooks.encode_images(self.model, part, change))
            else:
                states.append(engine.encode_images(self.program, self.ops, part, change))
        return torch.cat(states)

    @property
    def _images_at_once(self) -> int:
        if self.backend == "hooks":
            return 1
        image = self.program.image
        assert isinstance(image.embedding, PatchEmbedding)
        return max(1, self.memory // (len(image.embedding.positions) * cost.row_bytes(image)))

    @property
    def _word_table(self) -> Tensor:
        table: Tensor = self.model.text_encoder.embeddings.word_embeddings.weight
        return table.detach()

    @cached_property
    def _words_std(self) -> float:
        """Of all word embeddings; a pass over the whole table, which only noise in multiples of it needs."""
        return float(self._word_table.float().std())

    def _original(self, pixels: Tensor, ids: Tensor, states: Tensor) -> Original:
        """What a corruption may know of a question."""
        table = self._word_table
        return Original(
            pixels=pixels,
            states=states,
            ids=ids,
            words=table[ids],
            words_std=lambda: self._words_std,
            labels=self._inputs.labels(ids.tolist()),
            encode=self._encode,
            image=self._inputs.pixels,
            question=self._inputs.question_ids,
            embed=lambda other: table[other],
            find=lambda phrase: self._inputs.find(phrase, ids),
        )

    def _score(self, tasks: Sequence[engine.Task], progress: Progress | None) -> list[engine.Scores]:
        if not tasks:
            return []

        report = None if progress is None else lambda done, total: progress(done / total)
        if self.backend == "hooks":
            return hooks.score(self.model, tasks, report)
        return engine.score(self.program, self.ops, tasks, self.memory, report)

    def _result(
        self,
        question: str | Tensor,
        task: engine.Task,
        grids: Mapping[tuple[str, str], Sequence[Cell]],
        chosen: Mapping[str, Sequence[int]],
        scores: engine.Scores,
        settings: Mapping[str, Any],
    ) -> TraceResult:
        restored = scores.restored.sum(-1).exp().float()  # [S, cells]: joint over the answer's tokens
        config = self.model.config.text_config
        maps = {}
        first = 0
        for (stack, kind), cells in grids.items():
            part = restored[:, first : first + len(cells)]
            heads = (config.num_attention_heads,) if kind in HEAD_KINDS else ()
            shape = (*heads, len(chosen[stack]), config.num_hidden_layers)
            maps[stack, kind] = part.unflatten(1, shape).clone()
            first += len(cells)
        answer_ids = scores.answer_ids.tolist()
        labels = {
            "text_encoder": self._inputs.labels(task.question_ids.tolist()),
            "text_decoder": self._inputs.labels([self.model.decoder_start_token_id, *answer_ids[:-1]]),
        }
        return TraceResult(
            restored=maps,
            low_scores=scores.corrupted.sum(-1).exp().float(),
            high_score=float(scores.clean.sum().exp()),
            positions={stack: tuple(tokens) for stack, tokens in chosen.items()},
            stack_tokens={stack: tuple(labels[stack][t] for t in tokens) for stack, tokens in chosen.items()},
            question=self._question_text(question, task),
            answer=self._inputs.text(answer_ids),
            answer_ids=tuple(answer_ids),
            settings=settings,
        )

    def _settings(self, corruption: Corruption) -> dict[str, Any]:
        return {
            "blip_trace": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "backend": self.backend,
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "model": self.model.config.name_or_path or type(self.model).__name__,
            "image_processor": self._inputs.image_processor,
            "corruption": repr(corruption),
        }


def _for_samples(edit: Edit, samples: slice) -> Callable[[Tensor], Tensor]:
    return lambda embedded: edit(embedded, samples)


def _choose_backend(backend: Backend) -> Literal["native", "reference", "hooks"]:
    if backend != "auto":
        if backend != "hooks":
            get_ops(backend)  # raises where it is unavailable
        return backend
    reason = native_unavailable_reason()
    if reason is None:
        return "native"
    warnings.warn(f"tracing with the slower reference backend: {reason}", stacklevel=3)
    return "reference"
