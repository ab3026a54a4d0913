"""pointwise and its backward: one GEMM over all pixels; activation in the prologue, bias and residual at the end."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import activated, activation_slope, nhwc, round_to_tf32


class Config(NamedTuple):
    """A program owns BLOCK_M pixels by BLOCK_N output channels and takes BLOCK_K input channels at a time."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# Key: `shape_class`, `precision_of`.
CONFIGS: dict[tuple[str, str], Config] = {
    # tune_triton: begin CONFIGS
    # Not timed yet: chosen by what ptxas reports.
    ("narrow", "half"): Config(128, 32, 64, 4, 3),
    ("small", "half"): Config(64, 64, 64, 4, 4),
    ("large", "half"): Config(128, 128, 64, 8, 3),
    ("narrow", "tf32"): Config(128, 32, 32, 4, 3),
    ("small", "tf32"): Config(64, 64, 32, 4, 3),
    ("large", "tf32"): Config(128, 128, 32, 8, 3),
    ("narrow", "ieee"): Config(64, 32, 16, 4, 3),
    ("small", "ieee"): Config(64, 64, 16, 4, 3),
    ("large", "ieee"): Config(64, 64, 16, 4, 3),
    # tune_triton: end CONFIGS
}
GROUP = 8  # blocks of pixels scheduled together, so that they share the weight in the L2 cache


@triton.jit(do_not_specialize=["images", "pixels"])  # otherwise recompiled for 1 and for multiples of 16
def pointwise_kernel(
    x, weight, bias, residual, slope_of, gate, shift, y, sums, images, pixels, outer, stride_outer, stride_inner,
    INNER: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid: one program per BLOCK_M x BLOCK_N of y [M, outer] = f(x) W' + bias + residual, or x W' f'(slope_of).

    x [M, INNER], M = images * pixels; no block spans two images. W [outer, INNER], given by its strides. f: ACTIVATION,
    "none", "swish" or "elu". gate and shift [images, INNER] replace x by gate x + shift. Tensor arguments may be None.
    sums: float32 [images, blocks of an image, outer], y summed over each block before rounding.
    Reads x once per BLOCK_N channels of y and W once per BLOCK_M pixels, mostly from the L2 cache; writes y once.
    """
    tiles, blocks_n = tl.cdiv(pixels, BLOCK_M), tl.cdiv(outer, BLOCK_N)
    group, in_group = tl.program_id(0) // (GROUP * blocks_n), tl.program_id(0) % (GROUP * blocks_n)
    group_rows = tl.minimum(images * tiles - group * GROUP, GROUP)
    block_m, block_n = group * GROUP + in_group % group_rows, in_group // group_rows
    image = (block_m // tiles).to(tl.int64)
    pixel = (block_m % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m = image * pixels + pixel
    n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k = tl.arange(0, BLOCK_K)

    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INNER, BLOCK_K):
        a_inner, b_inner = start + k[None, :], start + k[:, None]
        a = tl.load(x + m * INNER + a_inner, mask=(pixel < pixels) & (a_inner < INNER), other=0.0)
        b = tl.load(
            weight + n.to(tl.int64) * stride_outer + b_inner.to(tl.int64) * stride_inner,
            mask=(n < outer) & (b_inner < INNER), other=0.0,
        )  # fmt: skip
        if slope_of is None and ACTIVATION != "none":
            a = activated(a.to(tl.float32), ACTIVATION).to(a.dtype)
        if gate is not None:
            scale = tl.load(gate + image * INNER + a_inner, mask=a_inner < INNER, other=0.0).to(tl.float32)
            added = tl.load(shift + image * INNER + a_inner, mask=a_inner < INNER, other=0.0)
            a = (a.to(tl.float32) * scale + added).to(a.dtype)
        if PRECISION == "tf32":
            a, b = round_to_tf32(a), round_to_tf32(b)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    inside = (pixel < pixels) & (n < outer)
    offset = m * outer + n
    if bias is not None:
        total += tl.load(bias + n, mask=n < outer, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    if slope_of is not None:
        of = tl.load(slope_of + offset, mask=inside, other=0.0).to(tl.float32)
        total *= activation_slope(of, ACTIVATION)
    tl.store(y + offset, total.to(y.dtype.element_ty), mask=inside)
    if sums is not None:
        of_block = tl.sum(tl.where(pixel < pixels, total, 0.0), axis=0, keep_dims=True)
        tl.store(sums + block_m.to(tl.int64) * outer + n, of_block, mask=n < outer)


def shape_class(M: int, inner: int, outer: int) -> str:
    """narrow: heads of latents and pixels. small: their gradients, and grids too small to fill the GPU with large."""
    if outer <= 32:
        return "narrow"
    return "small" if outer <= 64 or inner <= 32 or M * outer < 256 * 128 * 128 else "large"


def precision_of(dtype: torch.dtype) -> str:
    """How operands are multiplied: float32 as "ieee" or "tf32", following torch's CUDA setting; others as "half"."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def config_of(x: Tensor, outer: int) -> Config:
    """The configuration for a product of x [N, inner, H, W] with `outer` output channels."""
    N, inner, H, W = x.shape
    return CONFIGS[shape_class(N * H * W, inner, outer), precision_of(x.dtype)]


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    slope_of: Tensor | None = None,
    *,
    activation: str = "none",
    gate: tuple[Tensor, Tensor] | None = None,
    with_sums: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(y, sums) of `pointwise_kernel`; x [N, inner, H, W], weight [outer, inner] with any strides, gate: (gate, shift).

    `activation` applies to x; given `slope_of`, its derivative there multiplies the result instead.

    With a gate or sums each block stays within one image; otherwise blocks span all pixels.
    """
    N, inner, H, W = x.shape
    outer = weight.shape[0]
    y = torch.empty((N, outer, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    images, pixels = (N, H * W) if with_sums or gate is not None else (1, N * H * W)
    config = config_of(x, outer)
    config = config._replace(BLOCK_M=min(config.BLOCK_M, max(16, triton.next_power_of_2(pixels))))
    tiles, sums = triton.cdiv(pixels, config.BLOCK_M), None
    if with_sums:
        sums = torch.empty((N, tiles, outer), dtype=torch.float32, device=x.device)
    if y.numel() == 0:
        return y, sums
    grid = (images * tiles * triton.cdiv(outer, config.BLOCK_N),)
    pointwise_kernel[grid](
        nhwc(x), weight, bias, _optional(residual), _optional(slope_of), *(gate or (None, None)), y, sums,
        images, pixels, outer, *weight.stride(),
        INNER=inner, ACTIVATION=activation, PRECISION="tf32" if precision_of(x.dtype) == "tf32" else "ieee",
        GROUP=GROUP, **config._asdict(),
    )  # fmt: skip
    return y, sums


def pointwise(
    x: Tensor, weight: Tensor, weight_t: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """y of `vaebm_fast.ops.pointwise.pointwise`, channels_last."""
    return product(x, weight, None if bias is None else bias.contiguous(), residual, activation=activation)[0]


def pointwise_backward(dy: Tensor, weight_t: Tensor, Cin: int, x: Tensor | None, activation: str) -> Tensor:
    """dx of `vaebm_fast.ops.pointwise.pointwise_backward`, channels_last."""
    return product(dy, weight_t, slope_of=x, activation=activation)[0]


def _optional(x: Tensor | None) -> Tensor | None:
    return None if x is None else nhwc(x)
