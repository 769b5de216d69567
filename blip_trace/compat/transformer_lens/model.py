"""A BLIP as TransformerLens sees a model: the surface that its patching functions touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.config import TransformerLensConfig
from transformer_lens.hook_points import HookPoint

from ...corrupting import Corruption
from ...corruption import check_corruption
from ...sites import check_names
from ...tracer import Image, Tracer
from ..models import UnsupportedError, tracer_of
from .forward import Edit, forward, hooked
from .hooks import HOOKS, layer_and_place
from .passes import BY_HAND
from .rows import Pictures, Row, make_rows

Hook = Callable[..., Tensor | None]
Tokens = Tensor | str | Sequence[str]
NamesFilter = str | Sequence[str] | Callable[[str], bool] | None

_hook_point: Callable[[], Any] = HookPoint  # which has no types


class HookedBlip:
    """One text stack of a BLIP as TransformerLens sees a model, with the picture that it looks at.

    model: a Hugging Face BLIP, with its `processor` where texts and pictures are to be prepared, or a
        `Tracer`.
    image: a picture for all rows of tokens, or one for each; each as `Tracer.trace` takes it.
    stack: "text_encoder" (the first where the model has two) or "text_decoder"; its layers are `blocks.{l}`.
    question: of the answer decoder, what it answers: a question for all rows or one for each, or ids [B, T].
    answer: behind the question encoder, what is teacher-forced, as `Tracer.trace` takes it.
    corruption: any of `blip_trace.corruption`, of the picture or of the words of the first text stack. One
        sample is for all rows; of several, sample b is for row b.

    Tokens are those of the stack: a question; what an answer decoder has said, from its start token on; a
    caption, likewise; a text to match. Logits are [B, A, V]: of a decoder at each of its tokens, behind a
    question encoder at each token of the answer (one, unless given), of a matching model [B, 1, 2].

    Raises ValueError for an unknown stack and for a `question` or `answer` that it does not take, and what
    `Tracer` raises for models, pictures and texts.
    """

    def __init__(
        self,
        model: Any,
        image: Image | Sequence[Image],
        *,
        stack: str | None = None,
        question: Tokens | None = None,
        answer: str | int | None = None,
        corruption: Corruption | None = None,
        processor: Any = None,
    ) -> None:
        self._given = model if isinstance(model, Tracer) else None
        self._processor = processor
        self.original_model: Any = model.model if isinstance(model, Tracer) else model
        tracer = self.tracer
        stacks = tracer.stacks[1:]
        (self.stack,) = check_names("stack", [stacks[0] if stack is None else stack], stacks)
        answers = tracer.program.task == "answer"
        self._decodes = answers and self.stack == "text_decoder"
        if self._decodes != (question is not None):
            raise ValueError(f"{self.stack} takes {'a question' if self._decodes else 'no question'}")
        if answer is not None and not (answers and self.stack == "text_encoder"):
            raise ValueError(f"{self.stack} takes no answer: it is in the tokens, or there is none")
        tracer.inputs.answer_ids(answer)
        self.answer = answer
        self._question = None if question is None else _ids(question, tracer.inputs.question_ids)
        self._corruption = None if corruption is None else check_corruption(corruption)
        self._pictures = Pictures(tracer, image)
        self._made: tuple[Tracer, Tensor, tuple[Row, ...]] | None = None

    @property
    def tracer(self) -> Tracer:
        """That of the model: another one where its weights were changed."""
        return self._given or tracer_of(self.original_model, self._processor)

    @property
    def cfg(self) -> TransformerLensConfig:
        """The sizes of the stack, in TransformerLens's own terms."""
        text = self.original_model.config.text_config
        return TransformerLensConfig(
            d_model=text.hidden_size,
            d_head=text.hidden_size // text.num_attention_heads,
            n_layers=text.num_hidden_layers,
            n_ctx=text.max_position_embeddings,
            n_heads=text.num_attention_heads,
            d_mlp=text.intermediate_size,
            d_vocab=text.vocab_size,
            device=str(self.original_model.device),
            default_prepend_bos=False,
            eps=text.layer_norm_eps,
            act_fn=text.hidden_act,
            dtype=self.original_model.dtype,
        )

    @property
    def hook_names(self) -> list[str]:
        """All hook points of the stack: `HOOKS` of each layer."""
        return [f"blocks.{layer}.{place}" for layer in range(self.cfg.n_layers) for place in HOOKS]

    def to_tokens(self, input: str | Sequence[str]) -> Tensor:
        """Token ids [B, T], where the model is, of texts of equal length (a decoder's may be empty), with the
        special tokens that the stack expects.

        Raises UnsupportedError for texts of unequal length: BLIP has no mask for padding.
        """
        inputs = self.tracer.inputs

        def tokens(text: str) -> Tensor:
            if not self._decodes:
                return inputs.text_ids(text, inputs.answer_ids(None))
            start = torch.tensor([self.tracer.program.start_token])
            return torch.cat((start, inputs.answer_ids(text))) if text else start

        return _ids(input, tokens).to(self.original_model.device)

    def to_str_tokens(self, input: str | Tensor) -> list[str]:
        """The tokens of a text, or of ids [T] or [1, T], as strings."""
        ids = self.to_tokens(input) if isinstance(input, str) else input
        return list(self.tracer.inputs.labels(ids.flatten().tolist()))

    def to_single_token(self, string: str) -> int:
        """The token that a word is. Raises ValueError where it is none, or several."""
        ids = self.tracer.inputs.known_ids(string)
        if len(ids) != 1:
            raise ValueError(f"{string!r} is no single token of the model")
        return ids[0]

    def rows(self, tokens: Tokens) -> tuple[Row, ...]:
        """What goes into the stacks with these tokens, corrupted once and for all.

        Raises ValueError for tokens that the model cannot take and in training mode, UnsupportedError for
        padding.
        """
        if any(module.training for module in self.original_model.modules()):
            raise ValueError("the model is in training mode: call model.eval() first")
        ids, tracer = self._tokens(tokens), self.tracer
        if self._made is None or self._made[0] is not tracer or not self._made[1].equal(ids):
            text, decoded = (ids, None) if self._question is None else (self._question, ids)
            if len(text) not in (1, len(ids)):
                raise ValueError(f"the model holds {len(text)} questions for {len(ids)} rows of tokens")
            text = text.expand(len(ids), -1)
            rows = make_rows(tracer, self._pictures, text, decoded, self._corruption)
            self._made = tracer, ids.clone(), rows
        return self._made[2]

    @torch.inference_mode(False)  # what is made there has no version, by which changes of a cache are noticed
    @torch.no_grad()
    def run_with_hooks(
        self, tokens: Tokens, fwd_hooks: Sequence[tuple[str | Callable[[str], bool], Hook]] = ()
    ) -> Tensor:
        """Logits [B, A, V] of the unmodified Hugging Face model, with functions (activation, hook) at hook
        points, given by name or by a filter of names. What they return stands in the activation's place; they
        may also change it and return None.

        Raises ValueError for a name that is no hook point.
        """
        edits: list[tuple[str, Edit]] = []
        for wanted, function in fwd_hooks:
            names = [wanted] if isinstance(wanted, str) else list(filter(wanted, self.hook_names))
            for name in names:
                self._check_hook(name)
                point = _hook_point()
                point.name = name
                edits.append((name, partial(function, hook=point)))
        rows, tracer = self.rows(tokens), self.tracer
        with hooked(tracer.model, self.stack, edits):
            return forward(tracer, rows, tracer.inputs.answer_ids(self.answer))

    def __call__(self, tokens: Tokens) -> Tensor:
        """Logits [B, A, V]."""
        return self.run_with_hooks(tokens)

    def run_with_cache(
        self, tokens: Tokens, *, names_filter: NamesFilter = None
    ) -> tuple[Tensor, ActivationCache]:
        """Logits [B, A, V] and all activations of the run; names_filter: a name, several, or a filter."""
        match names_filter:
            case None:
                names = self.hook_names
            case str():
                names = [names_filter]
            case Sequence():
                names = list(names_filter)
            case _:
                names = list(filter(names_filter, self.hook_names))
        kept: dict[str, Tensor] = {}

        def keep(activation: Tensor, hook: HookPoint) -> None:
            kept[str(hook.name)] = activation

        logits = self.run_with_hooks(tokens, [(name, keep) for name in names])
        cache: Any = ActivationCache(dict(kept), self)
        versions = {name: (found, found._version) for name, found in kept.items()}
        cache.blip_run = CachedRun(self.rows(tokens), self.stack, self.tracer, versions)
        return logits, cache

    def _check_hook(self, name: str) -> None:
        found = layer_and_place(name)
        if found is None or found[0] >= self.cfg.n_layers:
            raise ValueError(
                f"there is no hook point {name!r}: there are blocks.0 to blocks.{self.cfg.n_layers - 1} with "
                f"{', '.join(HOOKS)}"
            )

    def _tokens(self, tokens: Tokens) -> Tensor:
        if not isinstance(tokens, Tensor):
            return self.to_tokens(tokens).cpu()
        tokens = tokens.cpu()
        if tokens.dim() != 2 or not len(tokens):
            raise ValueError(f"tokens must be [B, T], not {list(tokens.shape)}")
        inputs = self.tracer.inputs
        for row in tokens:
            if len(inputs.question_ids(row)) < len(row):
                raise UnsupportedError("padding", "make a batch of texts of one length, or one of each")
        if self._decodes and bool((tokens[:, 0] != self.tracer.program.start_token).any()):
            raise ValueError(f"a decoder's tokens begin with {self.tracer.program.start_token}")
        return tokens.long()


def _ids(texts: Tokens, read: Callable[[Any], Tensor]) -> Tensor:
    rows = [read(text) for text in ([texts] if isinstance(texts, str) else texts)]
    if not rows:
        raise ValueError("no text given")
    if len({len(row) for row in rows}) > 1:
        raise UnsupportedError(
            "a batch of texts of unequal length", "BLIP has no mask for padding: make a batch of each"
        )
    return torch.stack(rows)


@dataclass(frozen=True, eq=False)
class CachedRun:
    """The run whose activations a cache holds: on which rows, in which stack, by which tracer's weights."""

    rows: tuple[Row, ...]
    stack: str
    tracer: Tracer
    kept: Mapping[str, tuple[Tensor, int]]

    @classmethod
    def of(cls, cache: Any) -> CachedRun:
        """That of a cache which `HookedBlip.run_with_cache` made. Raises UnsupportedError for others."""
        run = getattr(cache, "blip_run", None)
        if not isinstance(run, CachedRun):
            raise UnsupportedError("a cache that HookedBlip.run_with_cache did not make", BY_HAND)
        return run

    def check(self, cache: ActivationCache, names: Iterable[str]) -> None:
        """Raises UnsupportedError where activations are no longer those of the run, ValueError where they are
        not there."""
        for name in names:
            if name not in self.kept:
                raise ValueError(f"the cache holds no {name!r}: names_filter left it out")
            found, version = self.kept[name]
            if cache.cache_dict.get(name) is not found or found._version != version:
                raise UnsupportedError(f"a cache whose {name!r} was changed", BY_HAND)
