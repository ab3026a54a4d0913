"""pixel_head and its backward: element by element, log p as partial sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, nhwc_images, soft_clamp5

BLOCK = 1024
SIGMA_MIN = tl.constexpr(1e-2)
LOG_SIGMA_FLOOR = tl.constexpr(-2.0)
LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _read(logits, eps_x, image_stride, n, e, inside, numel, C):
    """mu, its slope, log sigma, its slope and eps_x of element e, NHWC within image n; m's offset (r's is C more)."""
    mean = n * 2 * numel + e // C * 2 * C + e % C
    mu, mu_slope = soft_clamp5(tl.load(logits + mean, mask=inside, other=0.0).to(tl.float32))
    log_sigma, slope = soft_clamp5(tl.load(logits + mean + C, mask=inside, other=0.0).to(tl.float32))
    noise = tl.load(eps_x + n * image_stride + e, mask=inside, other=0.0).to(tl.float32)
    return mu, mu_slope, log_sigma, slope, noise, mean


@triton.jit
def pixel_kernel(
    logits, eps_x, x, log_p, image_stride, numel, C, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's elements, images. Writes x and, if given, log_p [N, blocks], the sum of each block."""
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    mu, _, log_sigma, _, noise, _ = _read(logits, eps_x, image_stride, n, e, inside, numel, C)
    clamped = tl.minimum(tl.maximum(mu + (tl.exp(log_sigma) + SIGMA_MIN) * noise, -1.0), 1.0)
    tl.store(x + n * numel + e, (clamped * 0.5 + 0.5).to(x.dtype.element_ty), mask=inside)
    if log_p is not None:
        sigma = tl.exp(tl.maximum(log_sigma, LOG_SIGMA_FLOOR)) + SIGMA_MIN
        normalised = (clamped - mu) / sigma
        terms = tl.where(inside, -0.5 * (normalised * normalised + LOG_2PI) - tl.log(sigma), 0.0)
        tl.store(log_p + n * tl.num_programs(0) + block, tl.sum(terms, axis=0))


@triton.jit
def pixel_backward_kernel(
    dx, dlog_p, logits, eps_x, dlogits, deps_x, image_stride, numel, C, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's elements, images."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    mu, mu_slope, log_sigma, slope, noise, mean = _read(logits, eps_x, image_stride, n, e, inside, numel, C)
    exponential = tl.exp(log_sigma)
    unclamped = mu + (exponential + SIGMA_MIN) * noise
    gradient = 0.5 * tl.load(dx + n * numel + e, mask=inside, other=0.0).to(tl.float32)
    pull, dsigma_of_p = 0.0, 0.0
    if dlog_p is not None:
        weight = tl.load(dlog_p + n).to(tl.float32)
        sigma = tl.exp(tl.maximum(log_sigma, LOG_SIGMA_FLOOR)) + SIGMA_MIN
        normalised = (tl.minimum(tl.maximum(unclamped, -1.0), 1.0) - mu) / sigma
        pull = weight * normalised / sigma
        floored = weight * (normalised * normalised - 1) / sigma
        dsigma_of_p = tl.where(log_sigma >= LOG_SIGMA_FLOOR, floored, 0.0)
    dunclamped = tl.where((unclamped >= -1) & (unclamped <= 1), gradient - pull, 0.0)
    dmean = (dunclamped + pull) * mu_slope
    dspread = (dunclamped * noise + dsigma_of_p) * exponential * slope
    tl.store(dlogits + mean, dmean.to(dlogits.dtype.element_ty), mask=inside)
    tl.store(dlogits + mean + C, dspread.to(dlogits.dtype.element_ty), mask=inside)
    dnoise = dunclamped * (exponential + SIGMA_MIN)
    tl.store(deps_x + n * numel + e, dnoise.to(deps_x.dtype.element_ty), mask=inside)


def pixel_head(logits: Tensor, eps_x: Tensor, with_log_p: bool) -> tuple[Tensor, Tensor]:
    """(x, log_p) of `vaebm_fast.ops.pixel_head.pixel_head`; log_p is [0] without `with_log_p`."""
    N, C, H, W = eps_x.shape
    x = torch.empty_like(eps_x, memory_format=torch.channels_last)
    blocks = triton.cdiv(C * H * W, BLOCK)
    partial = torch.empty((N, blocks), dtype=torch.float32, device=x.device) if with_log_p else None
    if x.numel() > 0:
        eps_x = nhwc_images(eps_x)
        pixel_kernel[(blocks, N)](
            nhwc(logits), eps_x, x, partial, eps_x.stride(0), C * H * W, C, BLOCK=BLOCK, num_warps=4
        )
    return x, eps_x.new_empty(0) if partial is None else partial.sum(1).to(eps_x.dtype)


def pixel_head_backward(dx: Tensor, dlog_p: Tensor | None, logits: Tensor, eps_x: Tensor) -> tuple[Tensor, Tensor]:
    """(dlogits, deps_x) of `vaebm_fast.ops.pixel_head.pixel_head_backward`, channels_last."""
    N, C, H, W = eps_x.shape
    logits = nhwc(logits)
    dlogits = torch.empty_like(logits, memory_format=torch.channels_last)
    deps_x = torch.empty_like(eps_x, memory_format=torch.channels_last)
    if deps_x.numel() > 0:
        eps_x, dlog_p = nhwc_images(eps_x), None if dlog_p is None else dlog_p.contiguous()
        pixel_backward_kernel[(triton.cdiv(C * H * W, BLOCK), N)](
            nhwc(dx), dlog_p, logits, eps_x, dlogits, deps_x, eps_x.stride(0), C * H * W, C, BLOCK=BLOCK, num_warps=4
        )
    return dlogits, deps_x
