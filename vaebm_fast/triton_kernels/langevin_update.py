"""langevin_update: one launch updates the whole state; the arithmetic of csrc/langevin.h, one operation at a time."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.philox_normal import QUADS, block_of, grid_over, normals_of

INFINITY = tl.constexpr(0x7F800000)  # bits of infinity; the bits of every finite |a| are smaller


@triton.jit(do_not_specialize=["stream"])
def update_kernel(
    eps, gradient, seeds, draw, nonfinite_at, stream, half, root, numel, PRIOR: tl.constexpr, QUADS: tl.constexpr
):  # fmt: skip
    """eps <- eps - half (gradient [+ eps]) + root noise; grid as in `block_of`.

    A thread that finds a non-finite element writes the draw into its image's flag if that is still -1. All such threads
    of a launch write the same number, so no atomics are needed.
    """
    n, quad, e = block_of(numel, QUADS)
    offset, inside = n * numel + e, e < numel
    state = tl.load(eps + offset, mask=inside, other=0.0)
    slope = tl.load(gradient + offset, mask=inside, other=0.0)
    if PRIOR:
        slope += state
    state = (state - half * slope) + root * normals_of(seeds, draw, stream, n, quad)
    tl.store(eps + offset, state, mask=inside)
    magnitude = tl.max(state.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    flag = nonfinite_at + n + tl.zeros_like(quad)
    is_first = (magnitude >= INFINITY) & (tl.load(nonfinite_at + n) < 0)
    tl.store(flag, tl.zeros_like(quad) + (tl.load(draw) & 0xFFFFFFFF), mask=is_first)


def langevin_update(
    eps: Tensor,
    gradient: Tensor,
    seeds: Tensor,
    draw: Tensor,
    nonfinite_at: Tensor,
    stream: int,
    step_size: float,
    prior: bool,
) -> None:
    """`vaebm_fast.ops.langevin_update.langevin_update`: writes eps and nonfinite_at."""
    N, D = eps.shape
    if eps.numel() > 0:
        update_kernel[grid_over(N, D)](
            eps, gradient.contiguous(), seeds.contiguous(), draw, nonfinite_at, stream, step_size / 2,
            math.sqrt(step_size), D, PRIOR=prior, QUADS=QUADS, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
