"""bilinear_upsample and its backward: one pass over NHWC memory each; both gather, without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc

BLOCK = 1024  # low-resolution elements; with 4 warps, 16 bytes of bfloat16 per thread


@triton.jit
def _weight(i, h, size):
    """Weight of low-resolution pixel h (of `size`) in output pixel i: max(0, 1 - |i (size - 1) / (2 size - 1) - h|).

    The numerator is an integer, so rounding never decides whether a weight is zero.
    """
    span = 2 * size - 1
    return tl.maximum(span - tl.abs(i * (size - 1) - h * span), 0).to(tl.float32) / span


@triton.jit
def _load(image, h, w, c, H, W, C):
    """image[h, w, c] in float32, zeros outside."""
    inside = (h >= 0) & (h < H) & (w >= 0) & (w < W) & (c < C)
    return tl.load(image + (h.to(tl.int64) * W + w) * C + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def bilinear_upsample_kernel(
    x, y, H, W, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: blocks of pixels of x, blocks of channels, images. Each program writes the four pixels of y per pixel of x.

    Row 2h reads rows h - 1 and h, row 2h + 1 reads h and h + 1; columns likewise.
    """
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    n, h, w = tl.program_id(2).to(tl.int64), pixel // W, pixel % W
    source, target = x + n * H * W * C, y + n * 4 * H * W * C
    for p in tl.static_range(2):
        i, above = 2 * h + p, h - 1 + p
        upper, lower = _weight(i, above, H), _weight(i, above + 1, H)
        left = upper * _load(source, above, w - 1, c, H, W, C) + lower * _load(source, above + 1, w - 1, c, H, W, C)
        middle = upper * _load(source, above, w, c, H, W, C) + lower * _load(source, above + 1, w, c, H, W, C)
        right = upper * _load(source, above, w + 1, c, H, W, C) + lower * _load(source, above + 1, w + 1, c, H, W, C)
        even = _weight(2 * w, w - 1, W) * left + _weight(2 * w, w, W) * middle
        odd = _weight(2 * w + 1, w, W) * middle + _weight(2 * w + 1, w + 1, W) * right
        written = target + (i.to(tl.int64) * (2 * W) + 2 * w) * C + c
        inside = (h < H) & (c < C)
        tl.store(written, even.to(y.dtype.element_ty), mask=inside)
        tl.store(written + C, odd.to(y.dtype.element_ty), mask=inside)


@triton.jit
def bilinear_upsample_backward_kernel(
    dy, dx, H, W, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: blocks of pixels of dx, blocks of channels, images. Each sums rows 2h - 1 .. 2h + 2, columns likewise."""
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    n, h, w = tl.program_id(2).to(tl.int64), pixel // W, pixel % W
    source = dy + n * 4 * H * W * C
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for a in tl.static_range(4):
        i = 2 * h - 1 + a
        row = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for b in tl.static_range(4):
            j = 2 * w - 1 + b
            row += _weight(j, w, W) * _load(source, i, j, c, 2 * H, 2 * W, C)
        total += _weight(i, h, H) * row
    target = dx + (n * H * W + pixel) * C + c
    tl.store(target, total.to(dx.dtype.element_ty), mask=(h < H) & (c < C))


def _launch(kernel: triton.JITFunction, source: Tensor, result: Tensor, low: Tensor) -> Tensor:
    """Launch `kernel` from source to result, one program per block of `low`, the low-resolution tensor."""
    N, C, H, W = low.shape
    if result.numel() > 0:
        block_c = min(64, triton.next_power_of_2(C))
        block_p = BLOCK // block_c
        grid = (triton.cdiv(H * W, block_p), triton.cdiv(C, block_c), N)
        kernel[grid](nhwc(source), result, H, W, C, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
    return result


def bilinear_upsample(x: Tensor) -> Tensor:
    """y of `vaebm_fast.ops.bilinear_upsample.bilinear_upsample`, channels_last."""
    N, C, H, W = x.shape
    y = torch.empty((N, C, 2 * H, 2 * W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return _launch(bilinear_upsample_kernel, x, y, x)


def bilinear_upsample_backward(dy: Tensor) -> Tensor:
    """dx of `vaebm_fast.ops.bilinear_upsample.bilinear_upsample_backward`, channels_last."""
    N, C, H, W = dy.shape
    dx = torch.empty((N, C, H // 2, W // 2), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    return _launch(bilinear_upsample_backward_kernel, dy, dx, dx)
