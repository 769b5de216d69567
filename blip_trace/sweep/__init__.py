"""Whole data sets: planned once, traced shard by shard, resumed where they stopped, verified at the end.

from blip_trace.sweep import Order, Settings, open_data, sweep

order = Order(open_data("color_coco_qa.csv", images="train2017"), settings=Settings(only_correct=True))
sweep(order, "runs/colors")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver import Outcome, Reporter, sweep
    from .executors import Executor, Local, make_executor
    from .planning import Changed, Order, estimate
    from .results import Run, load_run
    from .sample import Sample
    from .settings import Settings
    from .sources import DataSet, open_data
    from .store import Busy

_HOMES = {
    "Busy": "store",
    "Changed": "planning",
    "DataSet": "sources",
    "Executor": "executors",
    "Local": "executors",
    "Order": "planning",
    "Outcome": "driver",
    "Reporter": "driver",
    "Run": "results",
    "Sample": "sample",
    "Settings": "settings",
    "estimate": "planning",
    "load_run": "results",
    "make_executor": "executors",
    "open_data": "sources",
    "sweep": "driver",
}

__all__ = [
    "Busy",
    "Changed",
    "DataSet",
    "Executor",
    "Local",
    "Order",
    "Outcome",
    "Reporter",
    "Run",
    "Sample",
    "Settings",
    "estimate",
    "load_run",
    "make_executor",
    "open_data",
    "sweep",
]


def __getattr__(name: str) -> Any:
    # when first asked for: reading results needs no torch
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
