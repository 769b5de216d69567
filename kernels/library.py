"""Registration of the launchers with torch, as ops of the namespace `blip_trace_triton`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("blip_trace_triton", "FRAGMENT")


def register(schema: str, launch: Callable[..., Any]) -> Any:
    """Define an op by its schema, `launch` being what it does. What its results look like without being
    computed is for who loads it to say.

    Returns the op's only overload: calling it goes through torch's dispatcher, as with a compiled op.
    """
    name = schema.partition("(")[0]

    def on_its_device(*args: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(args[0]):
            return launch(*args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):  # on a CPU in Triton's interpreter; the checks refuse it otherwise
        _library.impl(name, on_its_device, key)
    return getattr(torch.ops.blip_trace_triton, name).default
