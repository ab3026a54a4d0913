"""Compilers for the CUDA sources: nvcc where it is, and a C++ compiler with the emulation header everywhere."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = sorted((REPOSITORY / "csrc" / "cuda").glob("*.cu"))
EMULATION = REPOSITORY / "tests" / "csrc" / "emulation"
ARCHITECTURES = ("sm_80", "sm_90a")


def run_compiler(*command: str | Path) -> str:
    """Run a compiler; its complaints are the test's failure."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stderr}"
    return done.stdout + done.stderr


def nvcc() -> str:
    """Path of nvcc; skips the test where there is none."""
    return shutil.which("nvcc") or pytest.skip("nvcc is not on the PATH")


def assert_compiles_without_spills(source: Path, architecture: str, build_folder: Path) -> None:
    """By nvcc, without torch's headers, warnings being errors."""
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", "-fmad=false", "-Xptxas", "-v"]
    report = run_compiler(nvcc(), *flags, "-cubin", source, "-o", build_folder / f"{source.stem}.cubin")
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and set(spills) == {("0", "0")}, report


def _cpp_compiler() -> str:
    compiler = os.environ.get("CXX", "c++")
    return compiler if shutil.which(compiler) else pytest.skip(f"the C++ compiler {compiler} is not on the PATH")


def _compile(driver: str, output: Path, *flags: str) -> Path:
    warnings = ["-Wall", "-Wextra", "-Werror"]
    fixed = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-fno-sanitize-recover=all", *warnings]
    run_compiler(_cpp_compiler(), *fixed, *flags, EMULATION / f"{driver}.cpp", "-o", output)
    return output


def emulate(driver: str, build_folder: Path) -> ctypes.CDLL:
    """tests/csrc/emulation/<driver>.cpp, which includes a .cu file, as a library whose kernels run on the CPU.

    Undefined behaviour (misaligned vectors, overflow, bad shifts) ends the program. Skips without a C++ compiler.
    """
    library = _compile(driver, build_folder / f"{driver}.so", "-fPIC", "-shared", "-fsanitize=undefined")
    return ctypes.CDLL(str(library))


def emulate_sanitised(driver: str, sanitiser: str, build_folder: Path) -> Path:
    """The same as a program, with sanitiser "address" or "thread": Python cannot load such a library.

    Skips where the sanitiser is not installed, or cannot run an empty program: some kernels' address layout stops it.
    """
    empty = build_folder / f"empty_{sanitiser}"
    build = [_cpp_compiler(), f"-fsanitize={sanitiser}", "-x", "c++", "-", "-o", str(empty)]
    for command in (build, [str(empty)]):
        done = subprocess.run(command, input="int main() {}", capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"the {sanitiser} sanitiser does not work here: {done.stderr.strip()}")
    flags = f"-fsanitize={sanitiser}", f"-DVF_{sanitiser.upper()}_SANITIZER"
    return _compile(driver, build_folder / f"{driver}_{sanitiser}", *flags)


def run_sanitised(program: Path, *arguments: str, drop_barrier: str = "") -> subprocess.CompletedProcess[str]:
    """Run it; `drop_barrier`, as "depthwise_swish.cu:12", makes the barrier on that line vanish."""
    options = {"TSAN_OPTIONS": "halt_on_error=1:exitcode=66", "ASAN_OPTIONS": "exitcode=66"}
    environment = {**os.environ, **options, "VF_DROP_BARRIER": drop_barrier}
    command = [str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def barriers(source: Path) -> list[str]:
    """Every __syncthreads() of a file, as `drop_barrier` names them."""
    lines = source.read_text(encoding="utf-8").splitlines()
    return [f"{source.name}:{number}" for number, line in enumerate(lines, 1) if "__syncthreads()" in line]
