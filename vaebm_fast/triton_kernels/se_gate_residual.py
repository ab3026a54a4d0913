"""se_gate_residual and its backward: sums over pixels, the gate of each image, then all pixels again.

Sums are taken chunk by chunk in a fixed order, so results have the same bits on every run. Each program recomputes the
gate's small hidden layer, which costs less than a launch of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc

TILE = 2048  # elements of an image that a program holds at once
BLOCK_OUT = 128  # gate channels that a program computes
SUMS_TILE = 4096  # partial sums that it loads at once
WEIGHT_TILE = 16 << 10  # bytes of a weight that it loads at once


@triton.jit
def sum_kernel(
    s, dy, sums, pixels, C, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: chunks of pixels, blocks of channels, images. sums [N, chunks, C] of s, or of dy s if dy is given."""
    chunk, n = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in tl.static_range(0, CHUNK, BLOCK_P):  # unrolled to keep several loads in flight
        pixel = chunk * CHUNK + start + tl.arange(0, BLOCK_P)[:, None]
        offset = (n.to(tl.int64) * pixels + pixel) * C + c
        inside = (pixel < pixels) & (c < C)
        value = tl.load(s + offset, mask=inside, other=0.0).to(tl.float32)
        if dy is not None:
            value *= tl.load(dy + offset, mask=inside, other=0.0).to(tl.float32)
        total += value
    row = n.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(sums + row * C + c, tl.sum(total, axis=0, keep_dims=True), mask=c < C)


@triton.jit
def _sum_chunks(sums, n, c, C, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """The sums over all chunks of image n for the channels c [1, BLOCK_C]."""
    total = tl.zeros((BLOCK_CHUNKS, BLOCK_C), tl.float32)
    for start in range(0, CHUNKS, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        total += tl.load(sums + (n * CHUNKS + chunk) * C + c, mask=(chunk < CHUNKS) & (c < C), other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def gate_kernel(
    sums, weight_in, bias_in, weight_out, bias_out, hidden, gate, pixels, C: tl.constexpr, HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: images, blocks of channels. hidden = relu(W_in mean + b_in), gate = sigmoid(W_out hidden + b_out).

    Every program of an image computes the whole hidden layer; the first stores it. Everything that does not depend on
    that layer is loaded first.
    """
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, out = tl.arange(0, BLOCK_H)[:, None], block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    b_in = tl.load(bias_in + j, mask=j < HIDDEN, other=0.0).to(tl.float32)
    b_out = tl.load(bias_out + out, mask=out < C, other=0.0).to(tl.float32)
    w_out = tl.load(weight_out + out * HIDDEN + j, mask=(j < HIDDEN) & (out < C), other=0.0)
    products = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        w_in = tl.load(weight_in + j * C + c, mask=(j < HIDDEN) & (c < C), other=0.0)
        products += w_in.to(tl.float32) * _sum_chunks(sums, n, c, C, CHUNKS, BLOCK_C, BLOCK_CHUNKS)
    activated = tl.maximum(tl.sum(products, axis=1, keep_dims=True) / pixels + b_in, 0.0)
    tl.store(hidden + n * HIDDEN + j, activated.to(hidden.dtype.element_ty), mask=(j < HIDDEN) & (block == 0))
    before = tl.sum(w_out.to(tl.float32) * activated, axis=0, keep_dims=True) + b_out
    tl.store(gate + n * C + out, tl.sigmoid(before).to(gate.dtype.element_ty), mask=out < C)


@triton.jit
def gate_backward_kernel(
    sums, hidden, gate, weight_in, weight_out, shift, pixels, C: tl.constexpr, HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: images, blocks of channels. shift = W_in' [hidden > 0] W_out' (gate (1 - gate) sum_hw dy s) / pixels.

    float32 [N, C]. As in the forward, every program computes the gradient of the whole hidden layer.
    """
    n, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    j, out = tl.arange(0, BLOCK_H)[:, None], block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[None, :]
    activated = tl.load(hidden + n * HIDDEN + j, mask=j < HIDDEN, other=0.0)
    w_in = tl.load(weight_in + j * C + out, mask=(j < HIDDEN) & (out < C), other=0.0)
    products = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        w_out = tl.load(weight_out + c * HIDDEN + j, mask=(j < HIDDEN) & (c < C), other=0.0)
        g = tl.load(gate + n * C + c, mask=c < C, other=0.0).to(tl.float32)
        dbefore = _sum_chunks(sums, n, c, C, CHUNKS, BLOCK_C, BLOCK_CHUNKS) * g * (1 - g)
        products += w_out.to(tl.float32) * dbefore
    dhidden = tl.where(activated > 0, tl.sum(products, axis=1, keep_dims=True), 0.0)
    dmean = tl.sum(w_in.to(tl.float32) * dhidden, axis=0, keep_dims=True)
    tl.store(shift + n * C + out, dmean / pixels, mask=out < C)


@triton.jit
def apply_kernel(
    x, gate, skip, shift, y, pixels, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: blocks of pixels, blocks of channels, images. y = gate x + skip, or gate x + shift [N, C]."""
    n = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    offset = (n * pixels + pixel) * C + c
    inside = (pixel < pixels) & (c < C)
    value = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(gate + n * C + c, mask=c < C, other=0.0).to(tl.float32)
    if skip is not None:
        value += tl.load(skip + offset, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        value += tl.load(shift + n * C + c, mask=c < C, other=0.0)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=inside)


def chunk_of(pixels: int) -> int:
    """Pixels that a program sums, 64 to 256: a 32 x 32 image has 16 chunks, a 256 x 256 image 256."""
    return min(256, max(64, triton.next_power_of_2(pixels) // 32))


def sums_of(s: Tensor, dy: Tensor | None) -> Tensor:
    """Sums of s over chunks of pixels, or of dy s; float32 [N, chunks, C]."""
    N, C, H, W = s.shape
    chunk, block_c = chunk_of(H * W), _block_of(C)
    block_p = min(chunk, TILE // block_c)
    sums = torch.empty((N, triton.cdiv(H * W, chunk), C), dtype=torch.float32, device=s.device)
    grid = (sums.shape[1], triton.cdiv(C, block_c), N)
    sum_kernel[grid](s, dy, sums, H * W, C, CHUNK=chunk, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
    return sums


def _block_of(C: int) -> int:
    """Channels of a tile of pixels."""
    return min(64, triton.next_power_of_2(C))


def gate_of(sums: Tensor, pixels: int, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden] and gate [N, C] from any partial sums of s [N, chunks, C]."""
    N, _, C = sums.shape
    hidden, gate = (torch.empty((N, size), dtype=dtype, device=sums.device) for size in (weights[0].shape[0], C))
    weights = [weight.contiguous() for weight in weights]
    grid, constants = _gate_launch(sums, weights[0])
    if N > 0:
        gate_kernel[grid](sums, *weights, hidden, gate, pixels, **constants)
    return hidden, gate


def shift_of(sums: Tensor, pixels: int, hidden: Tensor, gate: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """The term that the gate's gradient adds to every pixel of ds, float32 [N, C], from any partial sums of dy s."""
    shift = torch.empty(gate.shape, dtype=torch.float32, device=sums.device)
    grid, constants = _gate_launch(sums, weight_in)
    if shift.numel() > 0:
        given = (part.contiguous() for part in (hidden, gate, weight_in, weight_out))
        gate_backward_kernel[grid](sums, *given, shift, pixels, **constants)
    return shift


def _gate_launch(sums: Tensor, weight_in: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and constants of the gate's kernels."""
    (N, chunks, C), hidden = sums.shape, weight_in.shape[0]
    all_c, block_h = triton.next_power_of_2(C), triton.next_power_of_2(max(hidden, 1))
    block_out, block_c = min(BLOCK_OUT, all_c), min(all_c, max(WEIGHT_TILE // weight_in.element_size() // block_h, 1))
    return (N, triton.cdiv(C, block_out)), {
        "C": C,
        "HIDDEN": hidden,
        "CHUNKS": chunks,
        "BLOCK_H": block_h,
        "BLOCK_C": block_c,
        "BLOCK_OUT": block_out,
        "BLOCK_CHUNKS": min(triton.next_power_of_2(chunks), max(SUMS_TILE // block_c, 1)),
        "num_warps": 8,
    }


def apply(x: Tensor, gate: Tensor, skip: Tensor | None, shift: Tensor | None) -> Tensor:
    """gate x + skip, or gate x + shift, channels_last."""
    N, C, H, W = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if y.numel() > 0:
        block_c = _block_of(C)
        block_p = TILE // block_c
        grid = (triton.cdiv(H * W, block_p), triton.cdiv(C, block_c), N)
        apply_kernel[grid](x, gate, skip, shift, y, H * W, C, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4)
    return y


def se_gate_residual(
    s: Tensor, skip: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """y of `vaebm_fast.ops.se_gate_residual.se_gate_residual`, channels_last; hidden [N, hidden]; gate [N, C]."""
    N, C, H, W = s.shape
    if s.numel() == 0:
        empty = torch.empty_like(s, memory_format=torch.channels_last)
        return empty, s.new_empty((N, weight_in.shape[0])), s.new_empty((N, C))
    s = nhwc(s)
    hidden, gate = gate_of(sums_of(s, None), H * W, (weight_in, bias_in, weight_out, bias_out), s.dtype)
    return apply(s, gate, nhwc(skip), None), hidden, gate


def se_gate_residual_backward(
    dy: Tensor, s: Tensor, hidden: Tensor, gate: Tensor, weight_in: Tensor, weight_out: Tensor
) -> Tensor:
    """ds of `vaebm_fast.ops.se_gate_residual.se_gate_residual_backward`, channels_last."""
    if s.numel() == 0:
        return torch.empty_like(s, memory_format=torch.channels_last)
    dy, pixels = nhwc(dy), s.shape[2] * s.shape[3]
    shift = shift_of(sums_of(nhwc(s), dy), pixels, hidden, gate, weight_in, weight_out)
    return apply(dy, gate.contiguous(), None, shift)
