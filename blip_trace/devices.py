"""Where tensors are: devices by name, and numbers that go to one and come back while it works on.

All that goes to a GPU goes by `send`, and all that comes back by `fetch`: torch's own `to` waits until the
GPU has done everything that it was given before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def parse_device(name: str) -> torch.device:
    """A device on which models can be traced: "cpu", "cuda", "cuda:1".

    Raises ValueError, in one sentence, for any other and for one that this machine does not have.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: choose cpu or cuda")
    if device.type == "cuda":
        found = torch.cuda.device_count()
        if not found:
            why = "finds no GPU" if torch.version.cuda else "is a build without CUDA"
            raise ValueError(f"there is no device {name!r}: this torch ({torch.__version__}) {why}")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if device.index >= found:
            raise ValueError(f"there is no device {name!r}: this machine has {found}, counted from 0")
    return device


def send(values: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. Nothing is waited for, unless it is on another GPU."""
    if values.device == device:
        return values
    return send_all([values], device) if values.device.type == "cpu" else values.to(device)


def send_all(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of the CPU, one behind the other, on a device. Nothing is waited for."""
    if device.type != "cuda":
        return parts[0] if len(parts) == 1 else torch.cat(list(parts))
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    # what a GPU reads while this process goes on must be pinned; torch keeps it until it was read
    pinned = torch.empty(shape, dtype=parts[0].dtype, pin_memory=True)
    torch.cat(list(parts), out=pinned)
    return pinned.to(device, non_blocking=True)


def fetch(values: Tensor) -> Callable[[], Tensor]:
    """Begin to bring a tensor to the CPU; what is returned waits for it. What is put on the device's stream
    later is not waited for."""
    if values.device.type != "cuda":
        return lambda: values
    host = values.to("cpu", non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return host

    return wait
