"""The tests of the Triton kernels where there is no GPU: in Triton's interpreter. And who imports them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

OPS = Path(__file__).with_name("test_triton_ops.py")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_triton_ops.py runs the compiled kernels")
def test_in_the_interpreter() -> None:
    # In a process of its own: Triton reads the variable when it is imported, which transformers does early.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "no:cacheprovider", str(OPS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) > 100


def run_in_the_repository(program: str) -> None:
    """Run it in the folder in which a package `kernels` of another kind seems to be there."""
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=OPS.parent.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_only_who_asks_for_the_kernels_needs_triton() -> None:
    run_in_the_repository("""
import sys
sys.modules["triton"] = None  # importing it fails
import blip_trace, kernels
from transformers import BlipForQuestionAnswering
assert "blip_trace.kernels" not in sys.modules
try:
    import blip_trace.kernels
except ImportError as error:
    assert error.name == "triton", error
else:
    raise AssertionError("the kernels cannot be there without triton")
""")


def test_a_package_by_the_name_of_the_folder_is_empty() -> None:
    run_in_the_repository("""
import kernels, blip_trace.kernels as ours
assert ours.linear is not None and not hasattr(kernels, "linear")
""")
