"""A run's maps as labelled arrays: `to_xarray`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ...sites import HEAD_KINDS
from .profiles import CHUNK, Ragged, decode

if TYPE_CHECKING:
    import xarray as xr

    from .run import Run

LABELS = ("tokens", "roles")
SCALARS = ("status", "image", "question", "type", "answer", "correct", "total_effect_vanishes")


def to_xarray(run: Run) -> xr.Dataset:
    """All maps of a run in memory, samples padded to the longest.

    A variable for each map, {stack}_{kind}_{metric}, and its standard errors, with _se behind: float32
    [sample, {stack}_token, {stack}_layer], of kinds of heads [sample, head, {stack}_token, {stack}_layer],
    NaN beyond a sample's tokens. How many it has says {stack}_length [sample], 0 without a map; what they are
    {stack}_tokens and {stack}_roles [sample, {stack}_token], "" beyond them. Scores and texts are [sample],
    "" where there is none; the coordinate of `sample` is sample_id.

    Raises ValueError without xarray, and for a broken run.
    """
    wanted("xarray")
    import xarray as xr

    scores = [name for name in run.columns.names if name.endswith(("_high", "_low", "_low_se"))]
    table = run.table(["sample_id", *SCALARS, *scores])
    data: dict[str, Any] = {name: ("sample", table[name].to_numpy()) for name in scores}
    for name in SCALARS:
        # as text: arrays in files know no truth value that is not there
        texts = pc.fill_null(table[name].cast("string"), "")
        data[name] = ("sample", np.array(texts.to_pylist(), dtype=str))
    for stack in run.layout.stacks:
        longest = _add_labels(run, stack.name, data)
        for kind in run.layout.kinds:
            for metric in run.layout.metrics:
                name = run.layout.map_column(stack.name, kind, metric)
                for column in (name, f"{name}_se") if run.layout.spread else (name,):
                    cells = (f"{stack.name}_token", f"{stack.name}_layer")
                    maps = _padded(run, column, kind in HEAD_KINDS, longest, stack.layers)
                    if kind in HEAD_KINDS:
                        data[column] = (("sample", "head", *cells), maps)
                    else:
                        data[column] = (("sample", *cells), maps[:, 0])
    attributes = {"layout": run.layout.to_json()}
    return xr.Dataset(data, {"sample": table["sample_id"].to_pylist()}, attributes)


def _add_labels(run: Run, stack: str, data: dict[str, Any]) -> int:
    """What the tokens of a stack are, and how many of them the longest sample has."""
    table = run.table([f"{stack}_{what}" for what in LABELS])
    lists = {what: table[f"{stack}_{what}"].to_pylist() for what in LABELS}
    lengths = np.array([len(tokens or ()) for tokens in lists["tokens"]])
    longest = int(lengths.max(initial=0))
    data[f"{stack}_length"] = ("sample", lengths)
    for what in LABELS:
        padded = [[*(texts or ()), *[""] * (longest - length)] for texts, length in
                  zip(lists[what], lengths.tolist(), strict=True)]  # fmt: skip
        data[f"{stack}_{what}"] = (("sample", f"{stack}_token"), np.array(padded, dtype=str))
    return longest


def _padded(run: Run, column: str, heads: bool, longest: int, layers: int) -> npt.NDArray[np.float32]:
    """A column's maps, float32 [samples, heads, tokens, layers]."""
    parts: list[Ragged] = []
    for group in run.groups([column]):
        parts += [decode(group[column].slice(start, CHUNK), heads) for start in range(0, len(group), CHUNK)]
    count = max(part.values.shape[1] for part in parts)
    padded = np.full((sum(len(part.lengths) for part in parts), longest, count, layers), np.nan, np.float32)
    start = 0
    for values, lengths in parts:
        inside = np.arange(longest) < lengths[:, None]
        padded[start : start + len(lengths)][inside] = values
        start += len(lengths)
    return padded.swapaxes(1, 2)


def wanted(package: str) -> None:
    """Raises ValueError, saying what to install, where a package that nothing else needs is missing."""
    if not is_installed(package):
        raise ValueError(f"this format takes the package {package}: pip install {package}")


def is_installed(package: str) -> bool:
    """Whether it can be imported."""
    return find_spec(package) is not None
