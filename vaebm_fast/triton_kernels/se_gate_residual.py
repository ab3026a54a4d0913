"""se_gate_residual and its backward: sums over pixels, the gate of each image, then all pixels again.

The sums are taken in a fixed order, chunk by chunk, so results have the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc

CHUNK = 512  # pixels that one program sums
BLOCK_P, BLOCK_C = 32, 64  # pixels and channels that a program holds at once


@triton.jit
def sum_kernel(
    s, dy, sums, pixels, C, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: chunks of pixels, blocks of channels, images. sums [N, chunks, C] of s, or of dy s where there is a dy."""
    chunk, n = tl.program_id(0), tl.program_id(2)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, CHUNK, BLOCK_P):
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
def _sum_chunks(sums, n, c, C, CHUNKS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr):
    """The sums over all chunks of image n for the channels c [1, BLOCK_C]."""
    total = tl.zeros_like(c).to(tl.float32)
    for start in range(0, CHUNKS, BLOCK_CHUNKS):
        chunk = start + tl.arange(0, BLOCK_CHUNKS)[:, None]
        part = tl.load(sums + (n * CHUNKS + chunk) * C + c, mask=(chunk < CHUNKS) & (c < C), other=0.0)
        total += tl.sum(part, axis=0, keep_dims=True)
    return total


@triton.jit
def gate_kernel(
    sums, weight_in, bias_in, weight_out, bias_out, hidden, gate, pixels, C: tl.constexpr, HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: images. hidden = relu(W_in mean + b_in), gate = sigmoid(W_out hidden + b_out); reads each weight once."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_H)[:, None]
    total = tl.load(bias_in + j, mask=j < HIDDEN, other=0.0).to(tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        mean = _sum_chunks(sums, n, c, C, CHUNKS, BLOCK_CHUNKS) / pixels
        w = tl.load(weight_in + j * C + c, mask=(j < HIDDEN) & (c < C), other=0.0).to(tl.float32)
        total += tl.sum(w * mean, axis=1, keep_dims=True)
    activated = tl.maximum(total, 0.0)
    tl.store(hidden + n * HIDDEN + j, activated.to(hidden.dtype.element_ty), mask=j < HIDDEN)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        w = tl.load(weight_out + c * HIDDEN + j, mask=(j < HIDDEN) & (c < C), other=0.0).to(tl.float32)
        before = tl.sum(w * activated, axis=0, keep_dims=True)
        before += tl.load(bias_out + c, mask=c < C, other=0.0).to(tl.float32)
        tl.store(gate + n * C + c, tl.sigmoid(before).to(gate.dtype.element_ty), mask=c < C)


@triton.jit
def gate_backward_kernel(
    sums, hidden, gate, weight_in, weight_out, shift, pixels, C: tl.constexpr, HIDDEN: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """Grid: images. shift = W_in' [hidden > 0] W_out' (gate (1 - gate) sum_hw dy s) / pixels, float32 [N, C]."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK_H)[:, None]
    total = tl.zeros((BLOCK_H, 1), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        g = tl.load(gate + n * C + c, mask=c < C, other=0.0).to(tl.float32)
        dbefore = _sum_chunks(sums, n, c, C, CHUNKS, BLOCK_CHUNKS) * g * (1 - g)
        w = tl.load(weight_out + c * HIDDEN + j, mask=(j < HIDDEN) & (c < C), other=0.0).to(tl.float32)
        total += tl.sum(w * dbefore, axis=1, keep_dims=True)
    activated = tl.load(hidden + n * HIDDEN + j, mask=j < HIDDEN, other=0.0)
    dhidden = tl.where(activated > 0, total, 0.0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)[None, :]
        w = tl.load(weight_in + j * C + c, mask=(j < HIDDEN) & (c < C), other=0.0).to(tl.float32)
        tl.store(shift + n * C + c, tl.sum(w * dhidden, axis=0, keep_dims=True) / pixels, mask=c < C)


@triton.jit
def apply_kernel(
    x, gate, skip, shift, y, pixels, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Grid: blocks of pixels, blocks of channels, images. y = gate x + skip, or gate x + shift of its image."""
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


def sums_of(s: Tensor, dy: Tensor | None) -> Tensor:
    """Sums of s over chunks of pixels, or of dy s; float32 [N, chunks, C]."""
    N, C, H, W = s.shape
    sums = torch.empty((N, triton.cdiv(H * W, CHUNK), C), dtype=torch.float32, device=s.device)
    grid = (sums.shape[1], triton.cdiv(C, BLOCK_C), N)
    sum_kernel[grid](s, dy, sums, H * W, C, CHUNK=CHUNK, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4)
    return sums


def gate_of(sums: Tensor, pixels: int, weights: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hidden [N, hidden] and gate [N, C] from any partial sums of s [N, chunks, C]."""
    N, _, C = sums.shape
    hidden, gate = (torch.empty((N, size), dtype=dtype, device=sums.device) for size in (weights[0].shape[0], C))
    if N > 0:
        weights = [weight.contiguous() for weight in weights]
        gate_kernel[(N,)](sums, *weights, hidden, gate, pixels, **_gate_constants(sums, hidden))
    return hidden, gate


def shift_of(sums: Tensor, pixels: int, hidden: Tensor, gate: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """What the gate adds to every pixel of ds, float32 [N, C], from any partial sums of dy s."""
    shift = torch.empty(gate.shape, dtype=torch.float32, device=sums.device)
    if shift.numel() > 0:
        given = (part.contiguous() for part in (hidden, gate, weight_in, weight_out))
        gate_backward_kernel[(sums.shape[0],)](sums, *given, shift, pixels, **_gate_constants(sums, hidden))
    return shift


def _gate_constants(sums: Tensor, hidden: Tensor) -> dict[str, int]:
    _, chunks, C = sums.shape
    return {
        "C": C,
        "HIDDEN": hidden.shape[1],
        "CHUNKS": chunks,
        "BLOCK_H": triton.next_power_of_2(max(hidden.shape[1], 1)),
        "BLOCK_C": BLOCK_C,
        "BLOCK_CHUNKS": min(triton.next_power_of_2(chunks), 32),
        "num_warps": 8,
    }


def apply(x: Tensor, gate: Tensor, skip: Tensor | None, shift: Tensor | None) -> Tensor:
    """gate x + skip, or gate x + shift, channels_last."""
    N, C, H, W = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    if y.numel() > 0:
        grid = (triton.cdiv(H * W, BLOCK_P), triton.cdiv(C, BLOCK_C), N)
        apply_kernel[grid](x, gate, skip, shift, y, H * W, C, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C, num_warps=4)
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
