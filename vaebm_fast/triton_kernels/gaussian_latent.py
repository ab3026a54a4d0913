"""gaussian_latent and its backward: element by element, log p as partial sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, nhwc_images, soft_clamp5

BLOCK = 1024
SIGMA_MIN = tl.constexpr(1e-2)
LOG_2PI = tl.constexpr(1.8378770664093453)


@triton.jit
def _parameter_offsets(n, e, numel, L):
    """Offsets in [N, 2 L, H, W] of m and r of latent e, NHWC within image n."""
    mean = n * 2 * numel + e // L * 2 * L + e % L
    return mean, mean + L


@triton.jit
def latent_kernel(
    parameters, eps, z, log_p, image_stride, numel, L, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's latents, images. Writes z and, if given, log_p [N, blocks], the sum of each block."""
    block, n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e = block * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    noise = tl.load(eps + n * image_stride + e, mask=inside, other=0.0).to(tl.float32)
    if parameters is None:
        value, sigma = tl.zeros_like(noise), tl.full((BLOCK,), 1 + SIGMA_MIN, tl.float32)
    else:
        mean, spread = _parameter_offsets(n, e, numel, L)
        value, _ = soft_clamp5(tl.load(parameters + mean, mask=inside, other=0.0).to(tl.float32))
        log_sigma, _ = soft_clamp5(tl.load(parameters + spread, mask=inside, other=0.0).to(tl.float32))
        sigma = tl.exp(log_sigma) + SIGMA_MIN
    sigma *= temperature
    value += sigma * noise
    tl.store(z + n * numel + e, value.to(z.dtype.element_ty), mask=inside)
    if log_p is not None:
        terms = tl.where(inside, -0.5 * (noise * noise + LOG_2PI) - tl.log(sigma), 0.0)
        tl.store(log_p + n * tl.num_programs(0) + block, tl.sum(terms, axis=0))


@triton.jit
def latent_backward_kernel(
    dz, dlog_p, parameters, eps, dparameters, deps, image_stride, numel, L, temperature, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid: blocks of an image's latents, images. Writes deps and, given parameters, dparameters."""
    n = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    noise = tl.load(eps + n * image_stride + e, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dz + n * numel + e, mask=inside, other=0.0).to(tl.float32)
    weight = 0.0
    if dlog_p is not None:
        weight = tl.load(dlog_p + n).to(tl.float32)
    sigma = tl.full((BLOCK,), 1 + SIGMA_MIN, tl.float32)
    if parameters is not None:
        mean, spread = _parameter_offsets(n, e, numel, L)
        _, mean_slope = soft_clamp5(tl.load(parameters + mean, mask=inside, other=0.0).to(tl.float32))
        log_sigma, spread_slope = soft_clamp5(tl.load(parameters + spread, mask=inside, other=0.0).to(tl.float32))
        exponential = tl.exp(log_sigma)
        sigma = exponential + SIGMA_MIN
        dmean = gradient * mean_slope
        dspread = (gradient * temperature * noise - weight / sigma) * exponential * spread_slope
        tl.store(dparameters + mean, dmean.to(dparameters.dtype.element_ty), mask=inside)
        tl.store(dparameters + spread, dspread.to(dparameters.dtype.element_ty), mask=inside)
    dnoise = gradient * (sigma * temperature) - weight * noise
    tl.store(deps + n * numel + e, dnoise.to(deps.dtype.element_ty), mask=inside)


def gaussian_latent(
    parameters: Tensor | None, eps: Tensor, temperature: float, with_log_p: bool
) -> tuple[Tensor, Tensor]:
    """(z, log_p) of `vaebm_fast.ops.gaussian_latent.gaussian_latent`; log_p is [0] without `with_log_p`."""
    N, L, H, W = eps.shape
    z = torch.empty_like(eps, memory_format=torch.channels_last)
    if not with_log_p:
        partial = None
    else:
        partial = torch.empty((N, triton.cdiv(L * H * W, BLOCK)), dtype=torch.float32, device=eps.device)
    if z.numel() > 0:
        parameters, eps = None if parameters is None else nhwc(parameters), nhwc_images(eps)
        latent_kernel[(triton.cdiv(L * H * W, BLOCK), N)](
            parameters, eps, z, partial, eps.stride(0), L * H * W, L, float(temperature), BLOCK=BLOCK, num_warps=4
        )
    return z, eps.new_empty(0) if partial is None else partial.sum(1).to(eps.dtype)


def gaussian_latent_backward(
    dz: Tensor, dlog_p: Tensor | None, parameters: Tensor | None, eps: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(dparameters, deps) of `vaebm_fast.ops.gaussian_latent.gaussian_latent_backward`; dparameters [0] without any."""
    N, L, H, W = eps.shape
    deps = torch.empty_like(eps, memory_format=torch.channels_last)
    dparameters = None
    if parameters is not None:
        parameters = nhwc(parameters)
        dparameters = torch.empty_like(parameters, memory_format=torch.channels_last)
    if deps.numel() > 0:
        eps, dlog_p = nhwc_images(eps), None if dlog_p is None else dlog_p.contiguous()
        latent_backward_kernel[(triton.cdiv(L * H * W, BLOCK), N)](
            nhwc(dz), dlog_p, parameters, eps, dparameters, deps, eps.stride(0), L * H * W, L, float(temperature),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return eps.new_empty(0) if dparameters is None else dparameters, deps
