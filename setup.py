"""Builds vaebm_fast._C: always the C++ part, the CUDA part if possible. Static metadata is in pyproject.toml.

VAEBM_CUDA=auto (default) builds the CUDA part if torch has CUDA and nvcc is found; 1 requires it, 0 skips it.
TORCH_CUDA_ARCH_LIST sets GPU architectures; the default is those of the installed GPUs, or 8.0 and 9.0 without a GPU.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import setuptools
from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    raise SystemExit(
        f"Building vaebm-fast needs torch, but importing it failed ({error}). "
        "Install torch first, then run `pip install --no-build-isolation -e .`."
    ) from error

# No implicit fma: same bits on every machine. No errno, no traps: loops vectorise.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-fopenmp"]
NVCC_FLAGS = ["-O3", "-fmad=false", "-Xcompiler=-ffp-contract=off,-fvisibility=hidden"]


def require_setuptools() -> None:
    """Require setuptools 77: older versions fail on pyproject.toml's license field with a misleading error."""
    if int(setuptools.__version__.split(".")[0]) < 77:
        raise SystemExit(
            f"Building vaebm-fast needs setuptools 77.0.3 or newer, but found {setuptools.__version__}; "
            "run `pip install --upgrade setuptools`."
        )


def require_cpp_compiler() -> None:
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler.split()[0]):
        raise SystemExit(
            f"Building vaebm-fast needs a C++ compiler, but {compiler!r} is not on the PATH. "
            "Install one (on Debian or Ubuntu: `apt-get install g++`), or set CXX to yours."
        )


def why_no_cuda() -> str | None:
    """Why the CUDA part cannot be built, as the end of a sentence; None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch."
    if CUDA_HOME is None or not shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")):
        return f"nvcc was not found; install the CUDA toolkit {torch.version.cuda} and set CUDA_HOME to its path."
    if not Path(CUDA_HOME, "include", "cuda_runtime.h").exists():
        return f"{CUDA_HOME} has nvcc but no include/cuda_runtime.h; set CUDA_HOME to a whole CUDA toolkit."
    return None


def builds_cuda() -> bool:
    choice = os.environ.get("VAEBM_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"VAEBM_CUDA is {choice!r}; it must be auto, 0 or 1.")
    missing = why_no_cuda()
    if choice == "1" and missing:
        raise SystemExit(f"VAEBM_CUDA=1 requires the CUDA part, but {missing}")
    return choice != "0" and missing is None


def extension(with_cuda: bool) -> Extension:
    csrc = Path("csrc")
    sources = [csrc / "module.cpp", *csrc.glob("cpu/*.cpp")]
    if with_cuda:
        sources += [*csrc.glob("cuda/*.cpp"), *csrc.glob("cuda/*.cu")]
        if not torch.cuda.is_available():
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    kind = CUDAExtension if with_cuda else CppExtension
    return kind(
        "vaebm_fast._C",
        sorted(map(str, sources)),
        depends=sorted(map(str, csrc.glob("**/*.h"))),
        define_macros=[("VAEBM_WITH_CUDA", str(int(with_cuda)))],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp"],
    )


require_setuptools()
require_cpp_compiler()
setup(ext_modules=[extension(builds_cuda())], cmdclass={"build_ext": BuildExtension})
