"""Causal tracing of BLIP: the whole map of layers x tokens in one pass whose batch grows as runs fork."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attribution import Attribution, Screen
    from .corruption import (
        GaussianNoise,
        ImageAblation,
        ImageRegion,
        ImageSwap,
        PatchNoise,
        PixelNoise,
        Together,
        TokenNoise,
        TokenSwap,
    )
    from .lowering.load import shipped_model
    from .ops import BackendUnavailableError
    from .result import Logits, Restored, TraceResult
    from .sites import Cell, Cut, Site
    from .sweep.results import Run, load_run
    from .tracer import Tracer

__all__ = [
    "Attribution",
    "BackendUnavailableError",
    "Cell",
    "Cut",
    "GaussianNoise",
    "ImageAblation",
    "ImageRegion",
    "ImageSwap",
    "Logits",
    "PatchNoise",
    "PixelNoise",
    "Restored",
    "Run",
    "Screen",
    "Site",
    "Together",
    "TokenNoise",
    "TokenSwap",
    "TraceResult",
    "Tracer",
    "__version__",
    "load_run",
    "shipped_model",
]

try:
    __version__ = version("blip-trace")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# Imported when first asked for: torch and transformers take seconds, and `--help` needs neither.
_HOMES = {
    "Attribution": "attribution",
    "BackendUnavailableError": "ops",
    "Cell": "sites",
    "Cut": "sites",
    "GaussianNoise": "corruption",
    "ImageAblation": "corruption",
    "ImageRegion": "corruption",
    "ImageSwap": "corruption",
    "PatchNoise": "corruption",
    "PixelNoise": "corruption",
    "TokenNoise": "corruption",
    "Together": "corruption",
    "TokenSwap": "corruption",
    "Logits": "result",
    "Restored": "result",
    "Run": "sweep.results",
    "Screen": "attribution",
    "Site": "sites",
    "TraceResult": "result",
    "Tracer": "tracer",
    "load_run": "sweep.results",
    "shipped_model": "lowering.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
