"""Functions of float32 blocks that kernels share, and the layout that their launchers ask for."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def swish(x):
    """x sigmoid(x)."""
    return x * tl.sigmoid(x)


@triton.jit
def swish_slope(x):
    sigmoid = tl.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


@triton.jit
def tanh(x):
    """Through exp; near zero, where 1 - exp cancels, by its series: the next term is below 2^-24 of the sum."""
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    x2 = x * x
    near = x + x * x2 * (-1.0 / 3 + x2 * (2.0 / 15 - x2 * (17.0 / 315)))
    return tl.where(tl.abs(x) < 0.2, near, tl.where(x < 0, -far, far))


def nhwc(x: Tensor) -> Tensor:
    """x [N, C, H, W] with channels innermost in memory, copied only where they are not."""
    return x.contiguous(memory_format=torch.channels_last)


def nhwc_images(x: Tensor) -> Tensor:
    """x with NHWC memory inside each image, images at any distance: a view into the flat noise is not copied."""
    return x if x[:1].is_contiguous(memory_format=torch.channels_last) else nhwc(x)
