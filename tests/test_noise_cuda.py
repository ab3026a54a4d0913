"""The CUDA sources without a GPU: they compile for A100 and H100, and the kernels run, emulated, on the CPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import philox_numpy
import pytest
from cuda_build import KERNELS, REPOSITORY, emulate, nvcc, run_compiler
from torch.utils.cpp_extension import include_paths

SEEDS = [0, 1, 2**63, 2**64 - 1]
GUARD = 32  # elements on either side of an output that no kernel may touch


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate("philox_normal", tmp_path_factory.mktemp("emulation"))


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def run_kernel(library: ctypes.CDLL, op: str, seeds: list[int], draw: int, stream: int, numel: int) -> np.ndarray:
    """uint32 [N, numel], the bits that the emulated kernel wrote, after checking that it wrote nothing beside them."""
    seed_array, draw_array = np.array(seeds, dtype=np.uint64), np.array([draw], dtype=np.int64)
    size = len(seeds) * numel
    memory = np.full(4 * (size // 4 + 1) + 2 * GUARD + 4, 0xDEADBEEF, dtype=np.uint32)
    start = GUARD + (-(memory.ctypes.data // 4 + GUARD)) % 4  # 16-byte aligned, as torch's memory is
    out = memory[start : start + size]
    getattr(library, op)(
        pointer(seed_array), pointer(draw_array), ctypes.c_uint32(stream), ctypes.c_int64(len(seeds)),
        ctypes.c_int64(numel), pointer(out),
    )  # fmt: skip
    assert (memory[:start] == 0xDEADBEEF).all() and (memory[start + size :] == 0xDEADBEEF).all()
    return out.reshape(len(seeds), numel)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_compiles_without_torch_and_without_warnings(
    kernel: Path, architecture: str, tmp_path: Path
) -> None:
    flags = ["-std=c++17", "-O3", f"-arch={architecture}", "-Werror", "all-warnings", "-fmad=false", "-Xptxas", "-v"]
    report = run_compiler(nvcc(), *flags, "-cubin", kernel, "-o", tmp_path / "kernel.cubin")
    assert "0 bytes spill stores" in report


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


@pytest.mark.parametrize("numel", [1, 4, 6, 1023, 1024, 1025, 2052])
def test_emulated_kernels_equal_numpy_bit_for_bit(emulated: ctypes.CDLL, numel: int) -> None:
    draw, stream = 2**32 - 1, 3
    words = np.stack([philox_numpy.words(seed, draw, stream, numel) for seed in SEEDS])
    normals = np.stack([philox_numpy.normals(seed, draw, stream, numel) for seed in SEEDS])
    assert (run_kernel(emulated, "philox_words", SEEDS, draw, stream, numel) == words).all()
    assert (run_kernel(emulated, "philox_normal", SEEDS, draw, stream, numel) == normals.view(np.uint32)).all()


@pytest.mark.parametrize(("images", "numel"), [(0, 5), (3, 0)])
def test_emulated_kernels_accept_empty_requests(emulated: ctypes.CDLL, images: int, numel: int) -> None:
    run_kernel(emulated, "philox_normal", list(range(images)), 0, 0, numel)


def test_emulated_kernel_covers_more_images_than_a_grid_is_high(emulated: ctypes.CDLL) -> None:
    images = 65_537
    out = run_kernel(emulated, "philox_words", list(range(images)), 0, 0, 1)
    for image in (0, 65_534, 65_535, 65_536):
        assert out[image] == philox_numpy.words(image, 0, 0, 1)


def test_box_muller_equals_numpy_bit_for_bit_at_the_edges_of_the_words(emulated: ctypes.CDLL) -> None:
    edges = philox_numpy.edge_words()
    words = np.stack([grid.ravel() for grid in np.meshgrid(edges, edges)], axis=-1)
    z = np.empty(words.shape, dtype=np.float32)
    emulated.box_muller(pointer(words), ctypes.c_int64(len(words)), pointer(z))
    expected = np.stack(philox_numpy.box_muller(words[:, 0], words[:, 1]), axis=-1)
    assert (z.view(np.uint32) == expected.view(np.uint32)).all()
