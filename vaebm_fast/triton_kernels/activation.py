"""Activations of float32 blocks that the kernels share, and the NHWC layout helpers of their launchers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

NEGLIGIBLE = tl.constexpr(2.0**-100)  # x * NEGLIGIBLE is below half an ulp of x


@triton.jit
def swish(x):
    """x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def swish_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def elu(x):
    """x for x > 0, otherwise exp(x) - 1; small |x|, where that cancels, uses a Taylor polynomial (2^-24)."""
    p = 1.38888889e-3
    p = p * x + 8.33333333e-3
    p = p * x + 4.16666667e-2
    p = p * x + 0.166666667
    p = p * x + 0.5
    near = x + x * x * p
    return tl.where(x <= 0, tl.where(x > -0.25, near, tl.exp(x) - 1.0), x)


@triton.jit
def elu_slope(x):
    return tl.where(x > 0, 1.0, tl.exp(x))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of x, "swish" or "elu"."""
    return swish(x) if ACTIVATION == "swish" else elu(x)


@triton.jit
def activation_slope(x, ACTIVATION: tl.constexpr):
    return swish_slope(x) if ACTIVATION == "swish" else elu_slope(x)


@triton.jit
def soft_clamp5(x):
    """5 tanh(x / 5) and its slope 1 - tanh^2(x / 5), as in csrc/cpu/vector.h.

    With e = exp(-2 |x| / 5), tanh is 1 - 2 e / (1 + e). That cancels for small x, where a polynomial replaces it. The
    slope 4 e / (1 + e)^2 never cancels.
    """
    e = tl.exp(-0.4 * tl.abs(x))
    inverse = 1.0 / (1.0 + e)
    x2 = x * x
    p = 9.12168778e-12
    p = p * x2 - 8.46105075e-10
    p = p * x2 + 5.56357662e-8
    p = p * x2 - 3.4529387e-6
    p = p * x2 + 2.13331921e-4
    p = p * x2 - 1.33333327e-2
    near, far = x + x * x2 * p, 5.0 - 10.0 * e * inverse
    return tl.where(tl.abs(x) < 3.0, near, tl.where(x < 0, -far, far)), 4.0 * e * inverse * inverse


@triton.jit
def round_to_tf32(x):
    """Round float32 x to 10 mantissa bits, to nearest, ties away from zero, as PTX's cvt.rna.tf32.

    For operands of tl.dot: it passes float32 to the tensor cores unrounded, and they drop the last 13 bits.
    Infinities stay; values that round beyond the largest finite number become infinite. Integer arithmetic alone would
    turn a GPU's NaN, 0x7fffffff, into -0; the last term keeps every NaN and changes no other value.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000  # sign and magnitude: both signs grow in magnitude
    return bits.to(tl.float32, bitcast=True) + x * NEGLIGIBLE


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] in channels_last layout; copies only if x has another layout."""
    return x.contiguous(memory_format=torch.channels_last)


def nhwc_images(x: Tensor) -> Tensor:
    """x with NHWC memory within each image; any stride between images, so views of the flat noise are not copied."""
    return x if x[:1].is_contiguous(memory_format=torch.channels_last) else nhwc(x)
