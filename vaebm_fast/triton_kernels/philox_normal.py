"""philox_words and philox_normal: the arithmetic of csrc/philox.h and csrc/math.h, one operation at a time.

Launched with enable_fp_fusion=False: no product and sum are fused, so the bits equal those of every other backend.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

QUADS = 256  # Philox counters per program, four elements each; with 4 warps, two counters per thread

LN2_HI, LN2_LO = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)
RADIANS_PER_TURN = tl.constexpr(1.46291808e-9)  # 2 pi / 2^32


@triton.jit
def block_of(numel, QUADS: tl.constexpr):
    """This program's part of [N, numel]: image n, QUADS of its Philox counters, and their elements [QUADS, 4].

    Grid: one-dimensional, all blocks of the first image, then those of the next.
    """
    blocks = tl.cdiv(numel, 4 * QUADS)
    n = tl.program_id(0) // blocks
    quad = (tl.program_id(0) % blocks).to(tl.int64) * QUADS + tl.arange(0, QUADS)
    return n.to(tl.int64), quad, 4 * quad[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def words_of(seeds, draw, stream, n, quad):
    """Four blocks of uint32: the words of counters (quad, draw, stream, 0) under the seed of image n."""
    zeros = tl.zeros_like(quad).to(tl.uint32)
    k, stream = tl.load(draw).to(tl.uint32), stream.to(tl.uint32)
    return tl.philox(tl.load(seeds + n), quad.to(tl.uint32), zeros + k, zeros + stream, zeros)


@triton.jit
def in_order(a, b, c, d):
    """Four blocks as [QUADS, 4]; a thread holds four adjacent elements."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def log_of_unit(u):
    """log u for u in (0, 1]."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    t = (bits - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    q = t * -0.0763640329 + 0.127622008
    q = q * t + -0.131596133
    q = q * t + 0.142015815
    q = q * t + -0.166234091
    q = q * t + 0.200012416
    q = q * t + -0.250008196
    q = q * t + 0.333333313
    q = q * t + -0.5
    log_m = t + (t * t) * q
    exponent = e.to(tl.float32)
    return exponent * LN2_HI + (exponent * LN2_LO + log_m)


@triton.jit
def cos_sin_of_turns(turns):
    """Cosine and sine of 2 pi turns / 2^32, turns uint32."""
    quarter = (turns + 0x20000000) >> 30
    x = (turns - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * RADIANS_PER_TURN
    x2 = x * x
    s = x2 * -1.95182904e-4 + 8.33218917e-3
    s = s * x2 + -0.166666552
    sine = x + (x * x2) * s
    c = x2 * 2.44323273e-5 + -1.38873095e-3
    c = c * x2 + 4.16666456e-2
    c = c * x2 + -0.5
    cosine = 1.0 + x2 * c
    swap = (quarter & 1) == 1
    return (
        _with_sign(tl.where(swap, sine, cosine), ((quarter + 1) & 2) << 30),
        _with_sign(tl.where(swap, cosine, sine), (quarter & 2) << 30),
    )


@triton.jit
def _with_sign(x, sign):
    """x with its sign flipped if the sign bit of `sign` is set; 0 - x would lose the sign of zero."""
    return (x.to(tl.uint32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def box_muller(a, b):
    """Two standard normals from two words."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32, 2^-33
    r = tl.sqrt_rn(log_of_unit(u) * -2.0)
    cosine, sine = cos_sin_of_turns(b)
    return r * cosine, r * sine


@triton.jit
def normals_of(seeds, draw, stream, n, quad):
    """Normals [QUADS, 4] of these counters' elements."""
    w0, w1, w2, w3 = words_of(seeds, draw, stream, n, quad)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return in_order(z0, z1, z2, z3)


@triton.jit(do_not_specialize=["stream"])
def philox_words_kernel(seeds, draw, out, stream, numel, QUADS: tl.constexpr):
    n, quad, e = block_of(numel, QUADS)
    w0, w1, w2, w3 = words_of(seeds, draw, stream, n, quad)
    words = in_order(w0, w1, w2, w3).to(tl.int32, bitcast=True)
    tl.store(out + n * numel + e, words, mask=e < numel)


@triton.jit(do_not_specialize=["stream"])
def philox_normal_kernel(seeds, draw, out, stream, numel, QUADS: tl.constexpr):
    n, quad, e = block_of(numel, QUADS)
    tl.store(out + n * numel + e, normals_of(seeds, draw, stream, n, quad), mask=e < numel)


def grid_over(N: int, numel: int) -> tuple[int]:
    """The grid of `block_of`."""
    return (N * triton.cdiv(numel, 4 * QUADS),)


def _launch(kernel: Any, seeds: Tensor, draw: Tensor, stream: int, numel: int, dtype: torch.dtype) -> Tensor:
    N = seeds.shape[0]
    out = torch.empty((N, numel), dtype=dtype, device=seeds.device)
    if out.numel() > 0:
        kernel[grid_over(N, numel)](
            seeds.contiguous(), draw, out, stream, numel, QUADS=QUADS, num_warps=4, enable_fp_fusion=False
        )
    return out


def philox_words(seeds: Tensor, draw: Tensor, stream: int, numel: int) -> Tensor:
    """The words of `vaebm_fast.ops.philox_normal.philox_words`, int32 [N, numel]."""
    return _launch(philox_words_kernel, seeds, draw, stream, numel, torch.int32)


def philox_normal(seeds: Tensor, draw: Tensor, stream: int, numel: int) -> Tensor:
    """The normals of `vaebm_fast.ops.philox_normal.philox_normal`, float32 [N, numel]."""
    return _launch(philox_normal_kernel, seeds, draw, stream, numel, torch.float32)
