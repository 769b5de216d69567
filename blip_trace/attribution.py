"""Approximate maps from gradients, for grids that are too large to be done cell by cell.

Attribution patching (Nanda 2023; Syed et al. 2023): the effect of putting state h' in the place of h is, to
first order, (h' - h) · d metric / d h, taken in the run that is changed. One backward pass gives every cell
of a map. With `steps` > 1 the gradient is the mean over inputs between the two runs (integrated gradients in
the inputs: Hanna et al. 2024, EAP-IG), which is less misled where the metric saturates.

Gradients are those of the unmodified Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import hooks
from .hooks import Edit
from .metrics import METRICS, Measured, Readings, check_foil, completed, joined
from .sites import HEAD_KINDS, Cell, Site, check_count, check_names
from .task import Task

Progress = Callable[[float], None]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class Attribution:
    """First-order estimates of all cells; `steps`: inputs at which the gradient is taken."""

    steps: int = 1

    def __post_init__(self) -> None:
        check_count("steps", self.steps)


@dataclass(frozen=True)
class Screen:
    """Estimates of all cells, of which the `top` with the largest effects (mean over samples, by the first
    metric) are then done exactly. `check`: do all of them, to tell how well the estimates rank."""

    top: int = 50
    steps: int = 1
    check: bool = False

    def __post_init__(self) -> None:
        check_count("top", self.top)
        check_count("steps", self.steps)


Method = Attribution | Screen
METHODS: dict[str, Method | None] = {
    "exact": None,
    "attribution": Attribution(),
    "integrated_gradients": Attribution(steps=16),
    "screen": Screen(),
}


def check_method(
    method: str | Method, metrics: Sequence[str], window: int, sever: Sequence[str]
) -> Method | None:
    """A method of this name, None for the exact one.

    Raises ValueError for an unknown name, and for what a first-order estimate cannot say: a rank, several
    layers restored at once, and severed paths.
    """
    if isinstance(method, str):
        check_names("method", [method], METHODS)
        chosen = METHODS[method]
    elif isinstance(method, Attribution | Screen):
        chosen = method
    else:
        raise TypeError(f"a method is a name, an Attribution or a Screen, not {type(method).__name__}")
    if chosen is not None:
        if "rank" in metrics:
            raise ValueError("a rank has no gradient: it needs method='exact'")
        if window != 1 or sever:
            raise ValueError(
                "gradients see one layer at a time: windows and severed paths need method='exact'"
            )
    return chosen


def estimate(
    model: Any, task: Task, metrics: Sequence[str], steps: int, progress: Progress | None = None
) -> tuple[Tensor, dict[str, Measured]]:
    """The answer [A], and each metric with every cell's effect estimated; see the module.

    The estimate is of each token of the answer; jointly, it is joined from those.
    """
    modules = _modules(model, task.cells)
    with torch.inference_mode(False), torch.enable_grad(), _frozen(model):
        with torch.no_grad():
            clean_logits = hooks.run(model, _clean(model, task.part(0, 1)))
        answer = completed(task.answer_ids, clean_logits[0, -1])
        foil = None if task.foil_ids is None else check_foil(answer, task.foil_ids)

        def read(logits: Tensor) -> Readings:
            return hooks.readings(logits, answer, foil, clean_logits, task.reads)

        parts = []
        for sample in range(task.samples):
            parts.append(
                _estimate_sample(model, task.part(sample, sample + 1), modules, read, metrics, steps)
            )
            if progress is not None:
                progress((sample + 1) / task.samples)
    measured = {}
    for metric in metrics:
        low, effects = (torch.cat([part[metric][i] for part in parts]) for i in (0, 1))
        high = METRICS[metric].of_token(read(clean_logits))[0].float().cpu()
        start = low[:, None] if task.direction == "denoise" else high
        measured[metric] = Measured(start + effects, low, high)
    return answer, measured


def _estimate_sample(
    model: Any,
    task: Task,
    modules: Mapping[nn.Module, _Sites],
    read: Callable[[Tensor], Readings],
    metrics: Sequence[str],
    steps: int,
) -> dict[str, tuple[Tensor, Tensor]]:
    """For each metric, of one sample: the corrupted run's [1, A], and the effects of all cells [1, cells,
    A]."""
    clean, corrupted = _clean(model, task), _given(task)
    base, other = (corrupted, clean) if task.direction == "denoise" else (clean, corrupted)
    with torch.no_grad():
        low = read(hooks.run(model, corrupted))
        here, there = (_outputs(model, run, modules)[0] for run in (base, other))
    changes = {module: (there[module] - here[module]).float() for module in modules}  # [1, T, C]
    effects = {metric: torch.zeros(1, len(task.cells), low["logit"].shape[-1]) for metric in metrics}
    for step in range(steps):
        outputs, logits = _outputs(model, _between(base, other, step / steps), modules)
        for metric in metrics:
            for place, value in enumerate(METRICS[metric].of_token(read(logits))[0]):
                gradients = torch.autograd.grad(
                    value, list(outputs.values()), retain_graph=True, allow_unused=True
                )
                for module, gradient in zip(outputs, gradients, strict=True):
                    if gradient is None:  # what is read does not hang on it
                        continue
                    products = changes[module] * gradient.float() / steps
                    sites = modules[module]
                    effects[metric][0, :, place].index_add_(0, sites.cells, sites.sums(products[0]).cpu())
    return {metric: (METRICS[metric].of_token(low).float().cpu(), effects[metric]) for metric in metrics}


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """Without gradients of the weights: only those of the states are wanted."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


def _given(task: Task) -> Task:
    """The task with tensors that gradients can pass: what was made in inference mode cannot be."""
    corrupted, words = (None if x is None else x.clone() for x in (task.corrupted, task.words))
    return replace(task, clean=task.clean.clone(), corrupted=corrupted, words=words)


def _clean(model: Any, task: Task) -> Task:
    """The task of one sample with its clean input in the place of the corrupted one."""
    task = _given(task)
    words = None if task.words is None else hooks.clean_words(model, task.text_ids)[None]
    return replace(task, corrupted=None if task.corrupted is None else task.clean[None], words=words)


def _between(base: Task, other: Task, share: float) -> Task:
    """The base run's input, moved by a share towards the other's."""

    def mixed(one: Tensor | None, two: Tensor | None) -> Tensor | None:
        return None if one is None or two is None else torch.lerp(one, two, share)

    return replace(
        base,
        corrupted=mixed(base.corrupted, other.corrupted),
        words=mixed(base.words, other.words),
    )


@dataclass(frozen=True)
class _Sites:
    """The sites at one module's output: which cell each belongs to (on the CPU), its token and its head, [n]
    each. `heads`: into how many parts the channels fall, one where whole states are restored."""

    cells: Tensor
    tokens: Tensor
    parts: Tensor
    heads: int

    def sums(self, values: Tensor) -> Tensor:
        """Of values [T, C] over the channels of each site: [n]."""
        sums: Tensor = values.unflatten(1, (self.heads, -1)).sum(-1)[self.tokens, self.parts]
        return sums


def _modules(model: Any, cells: Sequence[Cell]) -> dict[nn.Module, _Sites]:
    """The modules whose outputs are changed, with what is changed there."""
    found: dict[nn.Module, list[tuple[int, Site]]] = {}
    for number, cell in enumerate(cells):
        for site in cell.sites:
            module = hooks.site_module(model, site.stack, site.layer, site.kind)
            found.setdefault(module, []).append((number, site))
    heads = hooks.text_heads(model)
    return {
        module: _Sites(
            torch.tensor([number for number, _ in own]),
            torch.tensor([site.token for _, site in own], device=model.device),
            torch.tensor([site.head or 0 for _, site in own], device=model.device),
            heads if own[0][1].kind in HEAD_KINDS else 1,
        )
        for module, own in found.items()
    }


def _outputs(model: Any, task: Task, modules: Iterable[nn.Module]) -> tuple[dict[nn.Module, Tensor], Tensor]:
    """What modules put out [1, T, C] in the run of a task's one corrupted input, and its logits."""
    outputs: dict[nn.Module, Tensor] = {}

    def keeping(module: nn.Module) -> Edit:
        def keep(output: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not output.requires_grad:
                output.requires_grad_()  # nothing that is watched lies before it
            outputs[module] = output
            return output

        return keep

    with hooks.editing({module: keeping(module) for module in modules}):
        logits = hooks.run(model, task)
    return outputs, logits


@dataclass(frozen=True)
class Screened:
    """A map of which the cells `exact` [cells] were done exactly. Where all were, to check the estimates:
    `rank_correlation` of estimated and exact effects, and which share of the `top` largest effects is
    `missed` among the largest estimates."""

    answer_ids: Tensor
    measured: dict[str, Measured]
    exact: Tensor
    rank_correlation: float | None = None
    missed: float | None = None


def screen(
    model: Any,
    task: Task,
    metrics: Sequence[str],
    method: Screen,
    exactly: Callable[[Task], tuple[Tensor, dict[str, Measured]]],
) -> Screened:
    """Estimate all cells, then do those with the largest effects exactly."""
    answer, estimated = estimate(model, task, metrics, method.steps)
    guessed = _effects(estimated, metrics[0], task.direction)
    top = min(method.top, len(guessed))
    best = guessed.abs().topk(top).indices.sort().values
    numbers = range(len(guessed)) if method.check else best.tolist()
    _, done = exactly(replace(task, answer_ids=answer, cells=tuple(task.cells[number] for number in numbers)))
    exact = torch.zeros(len(guessed), dtype=torch.bool)
    exact[best] = True
    measured = {}
    for metric in metrics:
        cells = estimated[metric].cells.clone()
        cells[:, best] = done[metric].cells[:, best] if method.check else done[metric].cells
        measured[metric] = Measured(cells, done[metric].low, done[metric].high)
    if not method.check:
        return Screened(answer, measured, exact)
    truth = _effects(done, metrics[0], task.direction)
    largest = truth.abs().topk(top).indices
    missed = 1 - float(exact[largest].double().mean())
    return Screened(answer, measured, exact, rank_correlation(guessed, truth), missed)


def _effects(measured: Mapping[str, Measured], metric: str, direction: str) -> Tensor:
    """Mean indirect effect of each cell [cells], of the whole answer."""
    cells, low, high = joined(measured, metric, None)
    return (cells - low[:, None] if direction == "denoise" else high - cells).mean(0)


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's, of [n] and [n]; ties have the mean of their ranks. 0 where all of either are equal."""

    def ranks(values: Tensor) -> Tensor:
        _, group, counts = values.unique(return_inverse=True, return_counts=True)
        ends = counts.cumsum(0).double()
        mean: Tensor = ends - (counts.double() - 1) / 2
        return mean[group]

    pair = torch.stack((ranks(one), ranks(two)))
    return float(torch.corrcoef(pair)[0, 1].nan_to_num(0.0))
