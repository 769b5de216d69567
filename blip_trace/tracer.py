"""Tracer: the public face; the one place that ties the rooms below together."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from . import __version__
from .assemble import Assembler
from .attribution import Screened
from .corrupting import Corruption
from .corruption import check_corruption
from .decoding import decode
from .devices import parse_device
from .graphs import Graphs
from .inputs import Image as Image
from .inputs import Inputs
from .lowering.blip import MODELS, Blip, lower
from .lowering.load import load_model, parse_dtype
from .mapping import Mapper
from .measuring import Forecast, Measurer, Progress
from .metrics import OWN, check_foil, check_metrics, reads_of
from .ops import OpSet, choose_backend, get_ops
from .prepare import Asked, Prepared, Preparer
from .program import Program
from .request import Options, Request, check_request
from .result import Logits, Restored, TraceResult
from .sites import Cell, Site, check_names
from .vision import EngineVision, HooksVision, Vision

Backend = Literal["auto", "native", "triton", "reference", "hooks"]
BACKENDS = ("auto", "native", "triton", "reference", "hooks")


class Tracer:
    """Traces which states of a BLIP carry what it says: an answer (`BlipForQuestionAnswering`), a caption
    (`BlipForConditionalGeneration`), or that a text fits an image (`BlipForImageTextRetrieval`).

    Weights are read once, when the tracer is made; dropout is off. It works on the device where the model is,
    the CPU or a GPU; results are on the CPU.

    backend: "native" (compiled), "triton" (Triton kernels, for a GPU), "reference" (the same engine in plain
    torch), "hooks" (one forward pass of the unmodified model for every cell: slow, and what defines right),
    or "auto": native where it was built, else, with a warning, reference. memory: bytes of activations that a
    pass may take; unless given 128 MiB, or 512 MiB where the image stack is traced, and on a GPU a quarter of
    what is free, at most 4 GiB. Larger traces are split and give the same numbers but for rounding.

    Raises ValueError for an unknown backend, for weights that are not finite and for a model that cannot be
    expressed, TypeError for another model, and `BackendUnavailableError`
    (a RuntimeError) where "native" was asked for but not built.
    """

    def __init__(
        self,
        model: Blip,
        processor: Any = None,
        backend: Backend = "auto",
        memory: int | None = None,
    ) -> None:
        check_names("backend", [backend], BACKENDS)
        if not isinstance(model, MODELS):
            known = " and ".join(kind.__name__ for kind in MODELS)
            raise TypeError(f"only {known} can be traced, not {type(model).__name__}")
        if model.device.type not in ("cpu", "cuda"):
            raise ValueError(f"the model is on {model.device}: it must be on the CPU or on a GPU")
        if memory is not None and memory < 2**20:
            raise ValueError(f"memory must be at least {2**20} bytes, not {memory}")
        for name, weight in model.named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"the model's weight {name} holds NaN or infinity")
        self.model = model.eval()
        self.processor = processor
        self.memory = memory
        self.backend = backend if backend == "hooks" else choose_backend(backend, self.device)
        self.inputs = Inputs(model.config, processor, self.program.task)
        self._preparer = Preparer(self.program, self.inputs)
        self._assembler = Assembler(self.program, self.inputs)

    @classmethod
    def from_pretrained(
        cls,
        hub_id_or_folder: str | Path,
        device: str = "cpu",
        dtype: str = "float32",
        backend: Backend = "auto",
        memory: int | None = None,
    ) -> Tracer:
        """Load a BLIP and its processor: safetensors only, no remote code.

        device: "cpu", "cuda" or one of several GPUs, as "cuda:1".
        dtype: "float32", or "bfloat16" (weights and matrix products in bfloat16; softmax, LayerNorm, sums and
        scores in float32).

        Raises ValueError where the folder holds no such model, or any weight is missing, unexpected or of
        another shape (named in the message), and for an unknown dtype or device; OSError where it cannot be
        read.
        """
        where = parse_device(device)
        check_names("backend", [backend], BACKENDS)
        model, processor = load_model(hub_id_or_folder, parse_dtype(dtype))
        return cls(model.to(where), processor, backend, memory)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

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
        return get_ops(self.backend, self.device)

    @cached_property
    def _graphs(self) -> Graphs | None:
        # the reference backend reads row numbers on the CPU, which no graph can hold
        return Graphs() if self.device.type == "cuda" and self.backend in ("native", "triton") else None

    @property
    def stacks(self) -> tuple[str, ...]:
        """The names of the model's stacks, in the order of computation."""
        return tuple(self.program.stacks)

    def trace(
        self,
        image: Image,
        question: str | Tensor,
        answer: str | int | None = None,
        corruption: Corruption | None = None,
        stacks: Sequence[str] | None = None,
        kinds: Sequence[str] = ("hidden",),
        window: int = 1,
        progress: Progress | None = None,
        *,
        foil: str | int | None = None,
        announce: Callable[[Forecast], None] | None = None,
        **options: Unpack[Options],
    ) -> TraceResult:
        """Map, for every layer x token x kind of state, how much of the answer returns when that state of the
        corrupted run is put back to its clean value (causal tracing: Meng et al. 2022; for BLIP: Palit et al.
        2023).

        image: a PIL image, a path, or pixel_values [1, 3, H, W]; its encoding is cached across calls.
        question: a string, or input_ids [1, T]; padding at the end is ignored. Of a captioning model: what
            the caption begins with, perhaps nothing. Of a matching one: the text to match.
        answer: None for the first token of the model's own clean answer; a string, whose tokens are
            teacher-forced and scored by their joint probability; or a token id. Of a matching model: "match"
            (unless given) or "no match".
        corruption: what corrupts the image embeddings: an object of `blip_trace.corruption`, or a callable
            from [N, D] to [S, N, D]; `GaussianNoise()` (ten samples) unless given.
        stacks, kinds: which maps to make, of all text stacks unless given; kinds as in the table of the
            README. The vision stack's patches can be restored where the corruption comes before them: noise
            on pixels or patches, another image, a region hidden.
        window: how many consecutive layers a cell restores, centred on its own.
        progress: called with the share of the work done.
        foil: for the metric logit_difference, the answer to compare with: at the first token where the two
            part.
        announce: called before the work begins with how many cells there are and about how long they take,
            done exactly.
        options: tokens, direction, metrics, sever, patch_group, method: see `blip_trace.request.Options`.

        Raises ValueError or TypeError, in one sentence, for inputs that cannot be traced.
        """
        foils = None if foil is None else [foil]
        return self.trace_batch(
            [(image, question)],
            [answer],
            corruption,
            stacks,
            kinds,
            window,
            progress,
            foils=foils,
            announce=announce,
            **options,
        )[0]

    def trace_batch(
        self,
        pairs: Sequence[tuple[Image, str | Tensor]],
        answers: Sequence[str | int | None] | None = None,
        corruption: Corruption | None = None,
        stacks: Sequence[str] | None = None,
        kinds: Sequence[str] = ("hidden",),
        window: int = 1,
        progress: Progress | None = None,
        *,
        foils: Sequence[str | int] | None = None,
        announce: Callable[[Forecast], None] | None = None,
        **options: Unpack[Options],
    ) -> list[TraceResult]:
        """Trace several (image, question) pairs, packed into common passes without padding; each result is
        that of `trace` on its pair. Arguments as there; `answers` and `foils` have one for each pair."""
        request = self.request(stacks, kinds, window, foils, **options)
        corruption = check_corruption(corruption)
        asked = self._ask_all(pairs, answers, foils)
        if announce is not None and asked:
            prepared = self.prepare_all(request, asked, [corruption] * len(asked))
            announce(self.forecast(prepared))
            return self.measure(request, prepared, progress)
        return self._mapper.maps(request, asked, corruption, progress)

    def request(
        self,
        stacks: Sequence[str] | None = None,
        kinds: Sequence[str] = ("hidden",),
        window: int = 1,
        foil: object = None,
        **options: Unpack[Options],
    ) -> Request:
        """Which maps to make of each question, checked: arguments as in `trace`; `foil` says whether there
        will be foils. `trace_batch` is this, `ask`, `prepare` and `measure`, one behind the other."""
        stacks = self.stacks[1:] if stacks is None else stacks
        return check_request(self.stacks, stacks, kinds, window, foil, **options)

    def ask(
        self,
        image: Image,
        question: str | Tensor,
        answer: str | int | None = None,
        foil: str | int | None = None,
    ) -> Asked:
        """A question as `trace` takes it, checked and turned into tensors. Raises as `trace` does."""
        foils = None if foil is None else [foil]
        return self._ask_all([(image, question)], [answer], foils)[0]

    def prepare(self, request: Request, asked: Asked, corruption: Corruption) -> Prepared:
        """Encode a question's image and corrupt it. Raises ValueError or TypeError, in one sentence, where
        that cannot be done."""
        return self.prepare_all(request, [asked], [corruption])[0]

    def prepare_all(
        self, request: Request, asked: Sequence[Asked], corruptions: Sequence[Corruption]
    ) -> list[Prepared]:
        """The same of several questions, each with its corruption; a GPU encodes their images together."""
        return self._mapper.prepare(request, asked, corruptions)

    def measure(
        self, request: Request, prepared: Sequence[Prepared], progress: Progress | None = None
    ) -> list[TraceResult]:
        """Trace questions that are prepared, packed into common passes."""
        return self._mapper.begin(request, prepared, progress)()

    def forecast(self, prepared: Sequence[Prepared]) -> Forecast:
        """How many cells these are and about how long they take, done exactly."""
        return self._measurer.forecast([own.task for own in prepared])

    def operations(self, request: Request, asked: Asked, samples: int) -> int | None:
        """How many operations the matrix products of a question take, with its image corrupted in so many
        samples, known before anything is computed; None where they are not counted (by hooks)."""
        return self._measurer.operations([self._mapper.outline(request, asked, samples)])

    def forget_images(self) -> None:
        """Drop the encodings of images that were seen before."""
        self._preparer.forget_images()

    def answers(
        self, asked: Sequence[Asked], max_tokens: int = 20, guesses: Sequence[str | None] | None = None
    ) -> list[str]:
        """What the model says to each question: the most probable token, one after the other, up to the end
        or `max_tokens`, or as many as the model has places for (greedy decoding, as `generate` does unless
        told otherwise). Of a captioning model what it puts behind the beginning; of a matching one "match" or
        "no match".

        guesses: what it may say; a right guess saves time and changes nothing.
        """
        return decode(self.inputs, self._mapper.unchanged, asked, guesses or [None] * len(asked), max_tokens)

    def restore(
        self,
        image: Image,
        question: str | Tensor,
        cells: Sequence[Cell | Site | Iterable[Site]],
        answer: str | int | None = None,
        corruption: Corruption | Literal["none"] | None = None,
        direction: str = "denoise",
        progress: Progress | None = None,
        metrics: Sequence[str] = ("probability",),
        foil: str | int | None = None,
    ) -> Restored:
        """The answer with any sets of states put back, in one pass: what other tools build on.

        cells: each a `Cell`, a `Site` or several sites, which are restored together in a run of their own, in
        any stack, layer, kind, token and head (`Cell.each` makes many from arrays). A cell may also keep
        sites frozen as they are in the run that is changed, and lack edges of attention (`Cell.knockout`).
        Equal cells are computed once.
        corruption: as in `trace`, or "none": all runs start from the clean input, and what cells change is
        what they cut.
        metrics, foil: as in `trace`. Everything else likewise.

        Raises ValueError for an empty list, an empty cell, and a site or an edge that this question or model
        does not have.
        """
        metrics = check_metrics(metrics, foil)
        asked = self.ask(image, question, answer, foil)
        changed = self._mapper.changed(asked, cells, corruption, direction, reads_of(metrics))
        ((answer_ids, measured),) = self._measurer.exactly([changed.task], metrics, progress)
        places = changed.places
        measured = {name: replace(own, cells=own.cells[:, places]) for name, own in measured.items()}
        every = torch.ones(len(places), dtype=torch.bool)
        return self._assembler.restored(asked, Screened(answer_ids, measured, every), changed.settings)

    def logits(
        self,
        image: Image,
        question: str | Tensor,
        cells: Sequence[Cell | Site | Iterable[Site]],
        answer: str | int | None = None,
        corruption: Corruption | Literal["none"] | None = None,
        direction: str = "denoise",
        progress: Progress | None = None,
    ) -> Logits:
        """As `restore`, but all that the model says with each cell: the logits of all words, for a metric of
        one's own. They take 4 bytes a sample, cell, token of the answer and word. Raises as `restore` does.
        """
        asked = self.ask(image, question, answer)
        changed = self._mapper.changed(asked, cells, corruption, direction, "logits")
        (found,) = self._measurer.score([changed.task], progress)
        clean, corrupted, patched = (
            read["logits"].float() for read in (found.clean, found.corrupted, found.patched)
        )
        answer_ids = tuple(found.answer_ids.tolist())
        if changed.places != list(range(patched.shape[1])):  # else it would be a copy
            patched = patched[:, changed.places]
        return Logits(patched, corrupted, clean, answer_ids, changed.settings)

    def _ask_all(
        self,
        pairs: Sequence[tuple[Image, str | Tensor]],
        answers: Sequence[str | int | None] | None,
        foils: Sequence[str | int] | None,
    ) -> list[Asked]:
        for what, given in (("answers", answers), ("foils", foils)):
            if given is not None and len(given) != len(pairs):
                raise ValueError(f"{len(pairs)} questions but {len(given)} {what}")
        if foils is not None and None in foils:
            raise ValueError("a foil is an answer, not None")
        inputs, asked = self.inputs, []
        for number, (_, question) in enumerate(pairs):
            answer_ids = inputs.answer_ids(None if answers is None else answers[number])
            foil_ids = None if foils is None else inputs.answer_ids(foils[number])
            if foil_ids is not None and answer_ids[-1] != OWN:
                check_foil(answer_ids, foil_ids)
            text_ids = inputs.text_ids(question, answer_ids)
            asked.append((text_ids, answer_ids, foil_ids, inputs.question_text(question, text_ids)))
        pixels = inputs.all_pixels([image for image, _ in pairs])
        return [Asked(own, *text) for own, text in zip(pixels, asked, strict=True)]

    def token_ids(self, asked: Asked, answer_ids: Sequence[int]) -> dict[str, list[int]]:
        """The tokens of each text stack, in a run that is scored by this answer."""
        return self._assembler.token_ids(asked, answer_ids)

    @property
    def _vision(self) -> Vision:
        if self.backend == "hooks":
            return HooksVision(self.model)
        return EngineVision(self.program, self.ops, self.memory, self._graphs)

    @property
    def _mapper(self) -> Mapper:
        return Mapper(self._vision, self._preparer, self._measurer, self._assembler, self.settings)

    @property
    def _measurer(self) -> Measurer:
        ops = None if self.backend == "hooks" else self.ops
        return Measurer(self.model, self.program, ops, self.memory, self._graphs)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result says of the tracer that made it."""
        return {
            "blip_trace": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "backend": self.backend,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "model": self.model.config.name_or_path or type(self.model).__name__,
            "image_processor": self.inputs.image_processor,
        }
