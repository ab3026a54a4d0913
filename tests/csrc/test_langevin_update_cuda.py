"""The update kernel of CUDA without a GPU: emulated on the CPU it gives the bits of the reference."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from torch import Tensor

from tests.helpers.cuda_build import emulate
from vaebm_fast import reference
from vaebm_fast.chain.noise import seed_tensor

SEEDS = [0, 1, 2**63, 2**64 - 1]
GUARD = 32  # elements on either side of the state that no kernel may touch


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return emulate("langevin_update", tmp_path_factory.mktemp("emulation"))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def run_kernel(
    library: ctypes.CDLL,
    eps: Tensor,
    gradient: Tensor,
    seeds: Tensor,
    draw: int,
    *,
    prior: bool = False,
    offset: int = 0,
    flags: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """State and flags, after checking that nothing beside the state was written; it begins `offset` elements late."""
    memory = torch.full((eps.numel() + 2 * GUARD + 4,), 7.0)
    start = GUARD + (-(memory.data_ptr() // 4 + GUARD)) % 4 + offset
    state = memory[start : start + eps.numel()].view_as(eps).copy_(eps)
    flags, k = torch.full_like(seeds, -1) if flags is None else flags.clone(), torch.tensor(draw)
    library.langevin_update(
        pointer(gradient), pointer(seeds), pointer(k), ctypes.c_uint32(3), ctypes.c_double(0.3),
        ctypes.c_bool(prior), ctypes.c_int64(eps.shape[0]), ctypes.c_int64(eps.shape[1]), pointer(state),
        pointer(flags),
    )  # fmt: skip
    assert (memory[:start] == 7).all() and (memory[start + eps.numel() :] == 7).all()
    return state, flags


def expected_of(eps: Tensor, gradient: Tensor, seeds: Tensor, draw: int, prior: bool = False) -> tuple[Tensor, Tensor]:
    state, flags = eps.clone(), torch.full_like(seeds, -1)
    reference.langevin_update(state, gradient, seeds, torch.tensor(draw), flags, stream=3, step_size=0.3, prior=prior)
    return state, flags


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("D", [1, 3, 4, 6, 1023, 1024, 1025, 2052])
def test_emulated_kernel_equals_the_reference_bit_for_bit(emulated: ctypes.CDLL, D: int, prior: bool) -> None:
    seeds = seed_tensor(SEEDS)
    eps, gradient = 3 * torch.randn(4, D), 10 * torch.randn(4, D)
    for draw in (1, 2**32 - 1, 2**32 + 5):
        for offset in (0, 1):  # an offset takes rows of whole quads off their alignment
            state, flags = run_kernel(emulated, eps, gradient, seeds, draw, prior=prior, offset=offset)
            expected, _ = expected_of(eps, gradient, seeds, draw, prior)
            assert torch.equal(state, expected) and flags.tolist() == [-1] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("D", [1, 6, 2052])
def test_emulated_kernel_flags_what_is_not_finite_and_keeps_the_first_draw(
    emulated: ctypes.CDLL, D: int, bad: float
) -> None:
    seeds, draw = seed_tensor(SEEDS), 2**32 + 6
    for where in sorted({0, D // 2, D - 1}):
        eps, gradient = torch.randn(4, D), torch.randn(4, D)
        gradient[1, where] = eps[3, where] = bad
        state, flags = run_kernel(emulated, eps, gradient, seeds, draw)
        expected, expected_flags = expected_of(eps, gradient, seeds, draw)
        assert flags.tolist() == expected_flags.tolist() == [-1, 6, -1, 6]
        torch.testing.assert_close(state, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(run_kernel(emulated, state, gradient, seeds, 7, flags=flags)[1], flags)


@pytest.mark.parametrize(("N", "D"), [(0, 5), (3, 0)])
def test_emulated_kernel_accepts_empty_states(emulated: ctypes.CDLL, N: int, D: int) -> None:
    run_kernel(emulated, torch.zeros(N, D), torch.zeros(N, D), seed_tensor(range(N)), 1)


def test_emulated_kernel_covers_more_images_than_a_grid_is_high(emulated: ctypes.CDLL) -> None:
    seeds = seed_tensor(range(65_537))
    eps, gradient = torch.randn(65_537, 1), torch.randn(65_537, 1)
    eps[65_536] = math.nan
    state, flags = run_kernel(emulated, eps, gradient, seeds, 1)
    expected, expected_flags = expected_of(eps, gradient, seeds, 1)
    assert torch.equal(state[:-1], expected[:-1]) and torch.equal(flags, expected_flags) and flags[-1] == 1
