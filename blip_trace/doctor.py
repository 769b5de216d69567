"""What this installation is and which backends work in it: `blip-trace doctor`."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from .devices import parse_device
from .ops import extension, native_unavailable_reason, triton_unavailable_reason

GPU = torch.device("cuda")

PRODUCTS = {
    "torch": "torch's",
    "own": "the extension's own",
    "widened": "the extension's own, through float32",
}


def report() -> dict[str, dict[str, str]]:
    """Facts by section: versions, build, processor, devices, backends."""
    return {
        "versions": _versions(),
        "build": _build(),
        "processor": _processor(),
        "devices": _gpus(),
        "backends": _backends(),
    }


def print_report(console: Console) -> None:
    """Print `report()` as a table."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, facts in report().items():
        for i, (name, fact) in enumerate(facts.items()):
            table.add_row("" if i else section, name, fact)
        table.add_section()
    console.print(table, markup=False)


def _versions() -> dict[str, str]:
    packages = {"blip-trace": "blip_trace", "torch": "torch", "transformers": "transformers"}
    return {
        "python": platform.python_version(),
        **{shown: _version(name) for shown, name in packages.items()},
    }


def _version(package: str) -> str:
    try:
        return str(torch.__version__) if package == "torch" else version(package)
    except PackageNotFoundError:
        return "not installed"


def _build() -> dict[str, str]:
    built = extension()
    if built is None:
        return {"extension": "none"}
    info = built.build_info()
    return {
        "extension": f"{info['compiler']}, for torch {info['torch']}",
        "instruction sets": ", ".join(info["cpu_capabilities"]),
    }


def _processor() -> dict[str, str]:
    built = extension()
    facts = {"machine": platform.machine(), "threads": str(torch.get_num_threads())}
    if built is not None:
        facts["instruction set in use"] = built.cpu_capability()
        for dtype, way in built.products().items():
            facts[f"{dtype} products"] = PRODUCTS[way]
    return facts


def _gpus() -> dict[str, str]:
    facts = {}
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        memory, capability = found.total_memory / 2**30, f"{found.major}.{found.minor}"
        facts[f"cuda:{number}"] = f"{found.name}, {memory:.0f} GiB, compute capability {capability}"
    return facts or {"GPU": _without_gpu() or "none"}


def _without_gpu() -> str | None:
    """Why there is no GPU; None where there is one."""
    try:
        parse_device("cuda")
    except ValueError as error:
        return str(error)
    return None


def _backends() -> dict[str, str]:
    return {
        "hooks": "works",
        "reference": "works",
        "native (CPU)": native_unavailable_reason() or "works",
        "native (GPU)": _without_gpu() or native_unavailable_reason(GPU) or "works",
        "triton (GPU)": _without_gpu() or triton_unavailable_reason(GPU) or "works",
    }
