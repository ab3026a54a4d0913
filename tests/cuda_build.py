"""Compilers for the CUDA sources: nvcc where it is, and g++ with the emulation header everywhere."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
KERNELS = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
SANITISED = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]


def run_compiler(*command: str | Path) -> str:
    """Run a compiler; its complaints are the test's failure."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout + done.stderr


def nvcc() -> str:
    """Path of nvcc; skips the test where there is none."""
    return shutil.which("nvcc") or pytest.skip("nvcc is not on the PATH")


def emulate(op: str, build_folder: Path) -> ctypes.CDLL:
    """tests/cuda_emulation/<op>.cpp, which includes csrc/cuda/<op>.cu, as a library whose kernels run on the CPU.

    Undefined behaviour (misaligned vectors, overflow, bad shifts) ends the program. Skips without a C++ compiler.
    """
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        pytest.skip(f"the C++ compiler {compiler} is not on the PATH")
    library = build_folder / f"{op}.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", *SANITISED]
    folder = REPOSITORY / "tests" / "cuda_emulation"
    run_compiler(compiler, *flags, "-include", folder / "cuda_emulation.h", folder / f"{op}.cpp", "-o", library)
    return ctypes.CDLL(str(library))
