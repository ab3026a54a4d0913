"""The CUDA sources compile for A100 and H100 without a GPU: kernels without torch, bindings with it."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.helpers.cuda_build import (
    ARCHITECTURES,
    KERNELS,
    REPOSITORY,
    assert_compiles_without_spills,
    nvcc,
    run_compiler,
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_compiles_without_torch_warnings_and_spills(
    kernel: Path, architecture: str, tmp_path: Path
) -> None:
    assert_compiles_without_spills(kernel, architecture, tmp_path)


@pytest.mark.slow
def test_bindings_compile_against_torch(tmp_path: Path) -> None:
    compiler, folders = nvcc(), [Path(folder) for folder in include_paths()]
    generated = Path("c10/cuda/impl/cuda_cmake_macros.h")
    if not any((folder / generated).exists() for folder in folders):  # torch without CUDA lacks this one header
        (tmp_path / generated).parent.mkdir(parents=True)
        (tmp_path / generated).touch()
    includes: list[str | Path] = [flag for folder in (*folders, tmp_path) for flag in ("-isystem", folder)]
    run_compiler(
        compiler, "-std=c++20", "-Xcompiler=-fsyntax-only,-Wall,-Werror", *includes, "-c",
        REPOSITORY / "csrc" / "cuda" / "bindings.cpp", "-o", tmp_path / "bindings.o",
    )  # fmt: skip
