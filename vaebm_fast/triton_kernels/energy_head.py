"""energy_head and its backward: partial sums in a fixed order, then one program per image; backward element by element.

Elements are NHWC within an image; C is a compile-time constant, so finding an element's channel needs no division.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, swish, swish_slope

BLOCK = 1024  # elements per program


@triton.jit
def _read(y, skip, shift, weight, n, e, numel, skip_scale, C: tl.constexpr):
    """t of elements e of image n, and their weights; weight 0 past the end of the image."""
    inside = e < numel
    t = tl.load(y + n * numel + e, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        t += tl.load(shift + e % C, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        t += skip_scale * tl.load(skip + n * numel + e, mask=inside, other=0.0).to(tl.float32)
    return t, tl.load(weight + e % C, mask=inside, other=0.0)


@triton.jit
def head_kernel(
    y, skip, shift, weight, partial, numel, skip_scale, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's elements, images. partial [N, blocks], the sum of weight swish(t) over each block."""
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    t, w = _read(y, skip, shift, weight, n, block * BLOCK + tl.arange(0, BLOCK), numel, skip_scale, C)
    tl.store(partial + n * tl.num_programs(0) + block, tl.sum(w * swish(t), axis=0))


@triton.jit
def total_kernel(partial, bias, energy, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """Grid: images. energy [N]: the bias plus the image's partial sums, at most a few thousand, added in float64."""
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.float64)
    for start in range(0, BLOCKS, WIDTH):
        block = start + tl.arange(0, WIDTH)
        total += tl.load(partial + n * BLOCKS + block, mask=block < BLOCKS, other=0.0).to(tl.float64)
    tl.store(energy + n, (tl.sum(total, axis=0) + tl.load(bias).to(tl.float64)).to(tl.float32))


@triton.jit
def head_backward_kernel(
    denergy, y, skip, shift, weight, dt, numel, skip_scale, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's elements, images. dt = denergy weight swish'(t)."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t, w = _read(y, skip, shift, weight, n, e, numel, skip_scale, C)
    value = tl.load(denergy + n) * w * swish_slope(t)
    tl.store(dt + n * numel + e, value.to(dt.dtype.element_ty), mask=e < numel)


def energy_head(
    y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """E of `vaebm_fast.ops.energy_head.energy_head`, float32 [N]."""
    N, C, H, W = y.shape
    if y.numel() == 0:
        return bias.expand(N).clone()
    blocks = triton.cdiv(C * H * W, BLOCK)
    partial = torch.empty((N, blocks), dtype=torch.float32, device=y.device)
    energy = torch.empty((N,), dtype=torch.float32, device=y.device)
    skip, shift = _dense(skip, shift)
    head_kernel[(blocks, N)](
        nhwc(y), skip, shift, weight.contiguous(), partial, C * H * W, float(skip_scale), C=C, BLOCK=BLOCK, num_warps=4
    )
    width = min(triton.next_power_of_2(blocks), BLOCK)
    total_kernel[(N,)](partial, bias, energy, BLOCKS=blocks, WIDTH=width, num_warps=1)
    return energy


def energy_head_backward(
    denergy: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, weight: Tensor
) -> Tensor:
    """dt of `vaebm_fast.ops.energy_head.energy_head_backward`, channels_last."""
    N, C, H, W = y.shape
    dt = torch.empty_like(y, memory_format=torch.channels_last)
    if dt.numel() > 0:
        skip, shift = _dense(skip, shift)
        head_backward_kernel[(triton.cdiv(C * H * W, BLOCK), N)](
            denergy.contiguous(), nhwc(y), skip, shift, weight.contiguous(), dt, C * H * W, float(skip_scale), C=C,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return dt


def _dense(skip: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    return None if skip is None else nhwc(skip), None if shift is None else shift.contiguous()
