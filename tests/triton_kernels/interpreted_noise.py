"""The kernels of noise and update in Triton's interpreter; `test_triton.py` runs this file.

There the tests of both ops run too, on backend "triton"; here is what they do not show.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.helpers import philox_numpy
from tests.triton_kernels.interpreted_triton import OPS, banded_empty, bands, normal
from vaebm_fast import reference
from vaebm_fast.chain.noise import draw_tensor, seed_tensor
from vaebm_fast.triton_kernels.philox_normal import box_muller

__all__ = ["bands"]  # a fixture that surrounds every test

SEEDS = [0, 2**63, 2**64 - 1]


@triton.jit
def box_muller_kernel(a, b, z0, z1, numel, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    words = tl.load(a + e, mask=inside).to(tl.uint32), tl.load(b + e, mask=inside).to(tl.uint32)
    first, second = box_muller(*words)
    tl.store(z0 + e, first, mask=inside)
    tl.store(z1 + e, second, mask=inside)


def test_normals_equal_numpy_bit_for_bit_at_the_edges_of_the_words() -> None:
    """Bits, so that a zero has its sign."""
    a, b = (grid.ravel() for grid in np.meshgrid(philox_numpy.edge_words(), philox_numpy.edge_words()))
    words = [torch.from_numpy(word.astype(np.int64)) for word in (a, b)]
    normals = [banded_empty(a.size) for _ in range(2)]
    box_muller_kernel[(triton.cdiv(a.size, 2**16),)](*words, *normals, a.size, BLOCK=2**16)
    for z, expected in zip(normals, philox_numpy.box_muller(a, b), strict=True):
        assert np.array_equal(z.numpy().view(np.int32), expected.view(np.int32))


@pytest.mark.parametrize("numel", [1, 6, 1021, 1030])
def test_nothing_is_written_beside_words_and_normals(numel: int) -> None:
    seeds, draw = seed_tensor(SEEDS), draw_tensor(5)
    words = OPS.philox_words(seeds, draw, 1, numel)
    assert torch.equal(words, reference.philox_words(seeds, draw, stream=1, numel=numel))
    normals = OPS.philox_normal(seeds, draw, 1, numel)
    assert torch.equal(normals, reference.philox_normal(seeds, draw, stream=1, numel=numel))


def given(D: int) -> tuple[Tensor, ...]:
    """eps, gradient, seeds, draw and flags; the second image is not finite in the end."""
    eps, gradient = normal(3, D), normal(3, D)
    gradient[1, D - 1] = torch.inf
    return eps, gradient, seed_tensor(SEEDS), draw_tensor(5), banded_empty(3, dtype=torch.int64).fill_(-1)


@pytest.mark.parametrize("D", [1, 6, 1021, 1030])
def test_nothing_is_read_or_written_beside_the_state(D: int) -> None:
    eps, gradient, seeds, draw, flags = given(D)
    expected, expected_flags = eps.clone(), flags.clone()
    reference.langevin_update(expected, gradient, seeds, draw, expected_flags, stream=1, step_size=0.3, prior=True)
    OPS.langevin_update(eps, gradient, seeds, draw, flags, 1, 0.3, True)
    assert torch.equal(eps, expected) and flags.tolist() == expected_flags.tolist() == [-1, 5, -1]


def test_ops_pass_opcheck(bands: pytest.MonkeyPatch) -> None:
    bands.undo()  # fake tensors are made by the real torch.empty
    for op in (OPS.philox_words, OPS.philox_normal):
        torch.library.opcheck(op.default, (seed_tensor(SEEDS), draw_tensor(1), 2**32 - 1, 10))
    torch.library.opcheck(OPS.langevin_update.default, (*given(10), 0, 0.3, True))
