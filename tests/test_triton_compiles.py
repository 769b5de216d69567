"""The Triton kernels compile for an H200 and an A100, as their launchers ask for them; no GPU is needed."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def launch_all(dtype: torch.dtype) -> None:
    """Every launcher on shapes that occur: tensors on the meta device have all that decides on a kernel."""
    names = ["linear_gelu", "linear_add_norm", "token_logits", "self_attention", "cross_attention"]
    modules = {name: importlib.import_module(f"blip_trace.kernels.{name}") for name in names}
    gelu, add_norm, logits, attend, cross = (getattr(modules[name], f"_{name}") for name in names)
    gelu = modules["linear_gelu"]._fused

    def make(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def numbers(*shape: int) -> torch.Tensor:
        return make(*shape, dtype=torch.int32)

    for rows in (9, 60, 3000):
        gelu(make(rows, 768), make(3072, 768), make(3072))
        logits(make(rows, 768), make(30522, 768), make(30522), make(rows, 1, dtype=torch.int64))
    gelu(make(7, 33), make(45, 33), make(45))
    gelu(make(99, 1), make(1, 1), make(1))
    norm = [make(768)] * 2
    add_norm(make(9, 64), make(768, 64), make(768), make(9, 768), None, None, *norm, 1e-12, False)
    add_norm(make(9, 64), make(768, 64), None, make(7, 768), numbers(5), numbers(5), *norm, 1e-5, True)
    add_norm(make(4, 20), make(35, 20), make(35), make(4, 35), None, None, make(35), make(35), 1e-5, True)
    for head in (5, 64):
        attend(make(36, 36 * head), numbers(5), None, 12, False)
        attend(make(36, 36 * head), numbers(5), numbers(4, 2), 12, True)
        cross(make(9, 12 * head), make(577, 48), *[make(12 * head, 48)] * 2, numbers(2), numbers(2), 12)
    for head in (32, 64, 128):
        for rows in (577, 5770):
            attend(make(rows, 36 * head), numbers(2), None, 12, False)
    attend(make(5770, 36 * 64), numbers(11), numbers(10, 2), 12, True)


class NoGpu:
    """What Triton asks a driver for on the way to a compiled kernel."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def spilled(ptx: str, capability: int) -> int:
    """Bytes of registers that the assembler has to put into memory."""
    import triton

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        name = f"--gpu-name=sm_{capability}{'a' if capability == 90 else ''}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", name, file.name, "-o", os.devnull]
        told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores", told)
    assert found is not None
    return int(found[1])


def compile_all(capability: int) -> None:
    """Compile what the launchers ask for, and print a line of facts on each kernel."""
    import triton
    from triton.runtime.jit import JITFunction

    dtype = ""
    seen = set()

    def compile_instead(kernel: Any, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            compiled = kernel.warmup(*args, grid=grid, **options)
            if compiled.hash in seen:
                return
            seen.add(compiled.hash)
            ptx = compiled.asm["ptx"]
            facts = {"kernel": kernel.__name__, "type": dtype, "rows": options.get("BLOCK_ROWS", 0)}
            facts |= {"wgmma": "wgmma.mma" in ptx, "tf32": "tf32" in ptx, "shared": compiled.metadata.shared}
            print(json.dumps(facts | {"spilled": spilled(ptx, capability)}), flush=True)

        return launch

    triton.runtime.driver.set_active(NoGpu(capability))
    JITFunction.__getitem__ = compile_instead
    for dtype, value in TYPES.items():  # noqa: B007 - read where a kernel is compiled
        launch_all(value)


@pytest.mark.parametrize("capability", [90, 80])
def test_every_kernel_compiles(capability: int) -> None:
    # In a process of its own: this one may interpret.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = [json.loads(line) for line in run.stdout.splitlines()]

    written = (ROOT / "kernels").glob("*.py")
    names = {name for file in written for name in re.findall(r"def (\w+_kernel)\(", file.read_text())}
    assert len(names) == 5
    for dtype in TYPES:
        assert {k["kernel"] for k in kernels if k["type"] == dtype} >= names
    # A register now and then is the assembler's choice; a tile that does not fit spills hundreds of bytes.
    assert max(k["spilled"] for k in kernels) <= 32
    assert not [k for k in kernels if k["tf32"]]
    # The largest that a program may have: 227 KiB on an H200, 163 KiB on an A100.
    assert max(k["shared"] for k in kernels) <= {90: 227, 80: 163}[capability] * 1024
    for name in ("_linear_gelu_kernel", "_blocks_kernel", "_attention_kernel"):
        large = [k for k in kernels if k["kernel"] == name and k["type"] == "bfloat16" and k["rows"] >= 64]
        assert large
        assert all(k["wgmma"] == (capability == 90) for k in large)


if __name__ == "__main__":
    compile_all(int(sys.argv[1]))
