"""The emulation that the CUDA kernels are tested with: it computes as a GPU does, and it finds what it is for."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.cuda_build import (
    ARCHITECTURES,
    EMULATION,
    assert_compiles_without_spills,
    barriers,
    emulate,
    emulate_sanitised,
    run_sanitised,
)


@pytest.fixture(scope="module")
def build_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulation")


@pytest.fixture(scope="module")
def emulated(build_folder: Path) -> ctypes.CDLL:
    return emulate("warp_matrix", build_folder)


@pytest.fixture(scope="module")
def faults(build_folder: Path) -> dict[str, Path]:
    return {sanitiser: emulate_sanitised("faults", sanitiser, build_folder) for sanitiser in ("address", "thread")}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_warp_kernels_are_cuda_too(architecture: str, tmp_path: Path) -> None:
    assert_compiles_without_spills(EMULATION / "warp_matrix.cu", architecture, tmp_path)


@pytest.mark.parametrize("K", [16, 48])
def test_warp_matrix_product_equals_numpy(emulated: ctypes.CDLL, K: int) -> None:
    blocks = 3
    a, b = torch.randn(2 * blocks, 16, K).bfloat16(), torch.randn(2 * blocks, K, 8).bfloat16()
    c = np.full((2 * blocks, 16, 8), np.nan, dtype=np.float32)
    bits = [matrix.view(torch.int16).numpy() for matrix in (a, b)]
    emulated.warp_matrix(pointer(bits[0]), pointer(bits[1]), ctypes.c_int(blocks), ctypes.c_int(K), pointer(c))
    torch.testing.assert_close(torch.from_numpy(c).double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [32, 96, 256])
def test_shuffles_move_values_between_the_lanes_of_a_warp(emulated: ctypes.CDLL, threads: int) -> None:
    blocks = 4
    values = np.arange(blocks * threads, dtype=np.float32).reshape(blocks, threads) ** 2 % 1009  # whole: exact sums
    out = np.full((blocks, 4), np.nan, dtype=np.float32)
    emulated.warp_sums(pointer(values), ctypes.c_int(blocks), ctypes.c_int(threads), pointer(out))
    last = values[:, -32:]
    expected = np.stack([last.sum(1), last.sum(1), last[:, 5], values.sum(1)], axis=1)
    assert (out == expected).all()


def test_bf16_rounding_equals_torch(emulated: ctypes.CDLL) -> None:
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.3895314e38, 3.4e38, torch.inf, -torch.inf, torch.nan, 1e-40]
    x = torch.cat((torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,)), torch.tensor(special)))
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    emulated.round_to_bf16(ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(len(x)), ctypes.c_void_p(y.data_ptr()))
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_swish_and_its_slope_are_as_near_as_their_header_says(emulated: ctypes.CDLL) -> None:
    """Without the error of the GPU's own exponential and reciprocal, for which the header adds 2^-22 + 2^-23."""
    x = np.concatenate((np.linspace(-87, 87, 400_001), np.linspace(-1e-3, 1e-3, 1001))).astype(np.float32)
    y, slope = np.empty_like(x), np.empty_like(x)
    emulated.swish(pointer(x), ctypes.c_int64(len(x)), pointer(y), pointer(slope))
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    assert (np.abs(y - wide * sigmoid) <= (2.0**-22.5 + 2.0**-23 * np.abs(wide)) * np.abs(wide * sigmoid)).all()
    assert np.abs(slope - sigmoid * (1 + wide * (1 - sigmoid))).max() <= 2.0**-21


def test_swish_by_tanh_is_as_near_as_its_header_says_and_no_nearer(emulated: ctypes.CDLL) -> None:
    """The emulated tanh is as wrong as the instruction may be, so that tests of kernels see it."""
    x = np.concatenate((np.linspace(-40, 40, 400_001), np.linspace(-1e-3, 1e-3, 1001))).astype(np.float32)
    y, slope = np.empty_like(x), np.empty_like(x)
    emulated.swish_by_tanh(pointer(x), ctypes.c_int64(len(x)), pointer(y), pointer(slope))
    wide = x.astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-wide))
    error = np.abs(y - wide * sigmoid)
    slope_error = np.abs(slope - sigmoid * (1 + wide * (1 - sigmoid)))
    assert (error <= 1.001 * 2.0**-12 * np.abs(wide)).all() and error.max() > 0.99 * 2.0**-12 * 40
    assert (slope_error <= 1.001 * 2.0**-12 * (1 + np.abs(wide))).all() and slope_error.max() > 0.9 * 2.0**-12 * 41


def test_halves_of_bf16_pairs_equal_torch(emulated: ctypes.CDLL) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    pairs, halves = torch.stack((every, every.flip(0)), 1), torch.empty(2**16, 2, dtype=torch.bfloat16)
    given = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (pairs, halves)]
    emulated.halves(given[0], ctypes.c_int64(2**16), given[1])
    torch.testing.assert_close(halves, pairs / 2, rtol=0, atol=0, equal_nan=True)


def test_swish_far_out(emulated: ctypes.CDLL) -> None:
    x = np.array([-np.inf, -1e30, -1e3, -90.0, -0.0, 90.0, 1e3, 1e30, np.inf, np.nan], dtype=np.float32)
    y, slope = np.empty_like(x), np.empty_like(x)
    emulated.swish(pointer(x), ctypes.c_int64(len(x)), pointer(y), pointer(slope))
    assert np.abs(y[1:4]).max() < 1e-7 and y[4] == 0 and (y[5:9] == x[5:9]).all() and np.isnan(y[9])
    assert np.allclose(slope[1:8], [0, 0, 0, 0.5, 1, 1, 1], atol=1e-7) and np.isnan(slope[9])


@pytest.mark.parametrize("sanitiser", ["address", "thread"])
def test_a_kernel_without_fault_passes(faults: dict[str, Path], sanitiser: str) -> None:
    done = run_sanitised(faults[sanitiser], "none")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "fault",
    [
        "reads beyond",
        "writes beyond shared memory",
        "writes before shared memory",
        "writes beyond dynamic shared memory",
    ],
)
def test_address_sanitizer_finds_a_step_beside_the_memory(faults: dict[str, Path], fault: str) -> None:
    done = run_sanitised(faults["address"], fault)
    assert done.returncode == 66 and "heap-buffer-overflow" in done.stderr


def test_address_sanitizer_finds_a_step_beside_an_array_on_a_threads_stack(faults: dict[str, Path]) -> None:
    done = run_sanitised(faults["address"], "writes beyond an array of its own")
    assert done.returncode == 66 and "stack-buffer-overflow" in done.stderr


def test_thread_sanitizer_finds_a_missing_barrier(faults: dict[str, Path]) -> None:
    (barrier,) = barriers(EMULATION / "faults.cpp")
    done = run_sanitised(faults["thread"], "none", drop_barrier=barrier)
    assert done.returncode == 66 and "data race" in done.stderr and "reverse_kernel" in done.stderr


def test_shared_memory_is_nan_when_a_block_begins(faults: dict[str, Path]) -> None:
    done = run_sanitised(faults["address"], "leaves shared memory unwritten")
    assert done.returncode == 1 and done.stderr.startswith("out[64] is ") and "nan" in done.stderr


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("lane returned", "a warp function is called after a lane returned"),
        ("half mask", "a warp function's mask is not 0xffffffff"),
        ("half a warp waits twice", "threads wait for each other for ever"),
        ("small warp", "a warp function is called by a warp of less than 32 threads"),
        ("shared memory", "a block has more shared memory than a GPU"),
        ("threads", "a block has more than 1024 threads, or none"),
    ],
)
def test_what_a_gpu_would_refuse_ends_the_program(faults: dict[str, Path], fault: str, sentence: str) -> None:
    done = run_sanitised(faults["address"], fault)
    assert done.returncode < 0 and sentence in done.stderr
