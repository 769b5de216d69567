"""CUDA graphs: a pass whose shape comes again is recorded once and replayed, without a launch from Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]

KEPT = 64
"""Graphs. Each keeps its inputs and its output; what lies between is one pool for all."""


@dataclass
class _Recorded:
    """A graph, the tensors that it reads and writes, and whatever it points into besides."""

    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    function: Function


class Graphs:
    """Graphs of functions of tensors on one GPU, by key. A key stands for one function of inputs of one size.

    What is seen once is only run: recording costs more than it saves. The second time it is recorded, and
    from then on replayed.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[Hashable, Function] = OrderedDict()
        self._recorded: OrderedDict[Hashable, _Recorded] = OrderedDict()
        self._pool: Any = None

    def run(self, key: Hashable, function: Function, *inputs: Tensor) -> Tensor:
        """What the function makes of the inputs. It must not wait for the device, and what it makes is
        overwritten by the next run of any.

        The function is kept as long as the key is known: a key may hold the `id` of what the function holds.
        """
        recorded = self._recorded.get(key)
        if recorded is None:
            if key not in self._seen:
                self._seen[key] = function
                while len(self._seen) > KEPT:
                    self._seen.popitem(last=False)
                return function(*inputs)
            recorded = self._record(self._seen.pop(key), inputs)
            self._recorded[key] = recorded
            while len(self._recorded) > KEPT:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        for kept, given in zip(recorded.inputs, inputs, strict=True):
            kept.copy_(given)
        recorded.graph.replay()
        return recorded.output

    def clear(self) -> None:
        """Forget all graphs, and give back what they hold."""
        self._seen.clear()
        self._recorded.clear()
        self._pool = None

    def _record(self, function: Function, inputs: tuple[Tensor, ...]) -> _Recorded:
        kept = tuple(given.clone() for given in inputs)
        graph, output = self._capture(function, kept)
        return _Recorded(graph, kept, output, function)

    def _capture(self, function: Function, inputs: tuple[Tensor, ...]) -> tuple[Any, Tensor]:
        """A graph of the function on these tensors, and where it puts its output."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            output = function(*inputs)
        return graph, output
