"""The noise kernels of CUDA without a GPU: emulated on the CPU they give the bits of numpy."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.helpers import philox_numpy
from tests.helpers.cuda_build import emulate

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
