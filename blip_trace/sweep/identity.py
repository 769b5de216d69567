"""What a run is: everything that its numbers depend on, and what differs when it is not the same any more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..lowering.load import PROCESSOR_FILES, SHIPPED, local_folder, shipped_model
from .store import file_sha256

RUN_ID_LENGTH = 32


def model_folder(model: str) -> Path:
    """Where a model's files are: of one that ships by its name, of one on the hub after a download.

    Raises as `load_model` does where there is no such model.
    """
    return shipped_model(model) if model in SHIPPED else local_folder(model)


def model_identity(folder: Path) -> dict[str, str]:
    """Digests of a model's weights, its configuration and its processor.

    Raises FileNotFoundError where there are no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{folder} holds no weights in safetensors")
    return {
        "weights": _digest(weights),
        "config": _digest([folder / "config.json"]),
        "processor": _digest(folder / name for name in PROCESSOR_FILES),
    }


def run_id(identity: Mapping[str, Any]) -> str:
    """The name of what a run is."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:RUN_ID_LENGTH]


def differences(planned: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one line for each."""
    before, after = dict(_flat(planned)), dict(_flat(now))
    return [
        f"{name}: planned {_shown(before.get(name))}, now {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def _digest(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    for path in files:
        if path.is_file():
            whole.update(f"{path.name} {file_sha256(path)}\n".encode())
    return whole.hexdigest()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:20]}…{text[-20:]}"
