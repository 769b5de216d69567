"""Where nvcc is, with or without a GPU and a torch that knows of it: the CUDA library compiles, for all
architectures, and links."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_build import built

if shutil.which("nvcc") is None:
    pytest.skip("there is no nvcc", allow_module_level=True)


@pytest.fixture(scope="module")
def library() -> Path:
    return built("_cuda") / "_cuda.so"


def test_every_kernel_is_there_for_every_architecture(library: Path) -> None:
    """As machine code for Ampere and Hopper, and as PTX for what comes after."""
    code = library.read_bytes()
    for kernel in (b"add_norm", b"attention", b"attend_states", b"bias_gelu", b"fold_logits"):
        assert kernel in code
    tool = shutil.which("cuobjdump")
    if tool is None:  # not every toolkit brings it: the flags that nvcc was given then
        commands = (library.parent / "compile_commands.json").read_text()
        assert "sm_80" in commands
        assert "sm_90" in commands
        return
    listed = subprocess.run([tool, "--list-elf", "--list-ptx", library], capture_output=True, text=True)
    assert {"sm_80", "sm_90"} <= set(re.findall(r"sm_\d+", listed.stdout))


def test_it_needs_nothing_that_torch_does_not_have(library: Path) -> None:
    """All symbols are found beside a torch without CUDA but the one that its CUDA part has."""
    found = subprocess.run(["ldd", "-r", library], capture_output=True, text=True)
    missing = set(re.findall(r"undefined symbol: (\w+)", found.stdout + found.stderr))
    assert missing == (set() if torch.version.cuda else {"aoti_torch_get_current_cuda_stream"})
