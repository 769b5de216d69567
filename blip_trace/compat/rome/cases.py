"""ROME's files of results, one npz a question and kind: written whole or not at all, read without pickle.

Of ROME's own files those can be read that hold numbers and texts alone, as its present version writes them;
older ones, whose `kind` is a pickled None, are refused.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...files import write_whole


class TornError(ValueError):
    """A file that is no whole npz: half of one, or broken on the disk."""


def case_path(folder: str | Path, known_id: object, kind: str | None = None) -> Path:
    """Where a result is kept: `knowledge_{id}{_kind}.npz`. Raises ValueError for an id that cannot be part of
    a file's name."""
    name = f"knowledge_{known_id}{f'_{kind}' if kind else ''}.npz"
    if name != Path(name).name or "\0" in name:
        raise ValueError(f"{known_id!r} cannot be part of a file's name")
    return Path(folder) / name


def write_case(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write what `calculate_hidden_flow` returned. Raises ValueError for values that are no numbers, texts or
    lists of such, OSError where the file cannot be written."""
    arrays = {name: _array(name, value) for name, value in result.items()}
    data = BytesIO()
    np.savez(data, allow_pickle=False, **arrays)
    write_whole(Path(path), data.getvalue())


def _array(name: str, value: object) -> npt.NDArray[Any]:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.hasobject:
        raise ValueError(f"the result's {name} is no number, no text and no list of such")
    return array


def read_case(path: str | Path) -> dict[str, npt.NDArray[Any]]:
    """A result as arrays, single numbers and texts as arrays of no dimension: what `plot_trace_heatmap`
    takes.

    Raises TornError where the file is no whole npz, ValueError where it holds pickled objects, and OSError
    where it cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            broken = archive.testzip()
    except Exception as error:  # zipfile raises nearly anything for broken bytes
        raise TornError(f"{path} is no whole npz file: {error}") from error
    if broken is not None:
        raise TornError(f"{path} is no whole npz file: its {broken} is broken")
    with np.load(BytesIO(data), allow_pickle=False) as file:
        return {name: _checked(path, file, name) for name in file.files}


def _checked(path: str | Path, file: Any, name: str) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = file[name]
    except ValueError:
        raise ValueError(
            f"{path} holds a pickled {name}, which could run code when it is read: it is refused"
        ) from None
    return array
