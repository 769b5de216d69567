"""Starts the native build. CMakeLists.txt describes it, pyproject.toml everything else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CUDA = "_cuda.so"
"""The library with the CUDA kernels; no Python module, so setuptools does not know of it."""


def tool(name: str) -> str:
    """A build tool: the one installed with this Python before the system's, which may be too old."""
    places = [os.path.dirname(sys.executable), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        sys.exit(f"blip-trace cannot be built without {name}: run `pip install {name}`.")
    return found


def check_requirements() -> None:
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except ImportError:
            sys.exit(
                f"blip-trace is built against the installed {module}, and there is none: run `make`, or "
                "`pip install -r requirements.txt` and `pip install --no-build-isolation -e .`."
            )
    compiler = os.environ.get("CXX", "c++").split()
    probe = [*compiler, "-std=c++20", "-fsyntax-only", "-x", "c++", os.devnull]
    if shutil.which(compiler[0]) is None or subprocess.run(probe, capture_output=True).returncode:
        sys.exit(
            "blip-trace needs a C++20 compiler such as g++ 11; BLIP_TRACE_SKIP_NATIVE=1 installs without."
        )


def torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


class CMakeBuild(build_ext):
    """Builds in the persistent folder build/native, so that the next build redoes only what changed."""

    def build_extension(self, ext: Extension) -> None:
        check_requirements()
        build = ROOT / "build" / "native"
        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja"]
        options = {"CMAKE_MAKE_PROGRAM": ninja, "Python_EXECUTABLE": sys.executable}
        subprocess.run([*configure, *(f"-D{k}={v}" for k, v in options.items())], check=True)
        subprocess.run([cmake, "--build", build], check=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / target.name, target)
        if torch_has_cuda() and (build / CUDA).exists():  # without, it is built as a check only
            shutil.copy2(build / CUDA, target.parent)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        built = Path(self.build_lib) / "blip_trace" / CUDA
        if built.exists():
            shutil.copy2(built, ROOT / "blip_trace")


native = os.environ.get("BLIP_TRACE_SKIP_NATIVE", "0") in ("", "0")
setup(
    ext_modules=[Extension("blip_trace._C", sources=[])] if native else [],
    cmdclass={"build_ext": CMakeBuild},
)
