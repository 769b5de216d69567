"""Causal tracing of BLIP: the whole map of layers x tokens in one forward pass whose batch grows as runs fork."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("blip-trace")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

from .corruption import GaussianNoise
from .ops import BackendUnavailableError
from .result import TraceResult
from .sites import Cell, Site
from .tracer import Tracer

__all__ = ["BackendUnavailableError", "Cell", "GaussianNoise", "Site", "TraceResult", "Tracer", "__version__"]
