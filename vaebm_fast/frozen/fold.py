"""The algebra of freezing: pure functions that turn trained layers into fewer, cheaper linear maps with equal results.

Every rewrite is exact; only rounding differs. Images are [N, C, H, W], kernels [Cout, Cin / groups, K, K]. How a part
of a network strings these rewrites together is in `cells`, `decoder` and `energy`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.models.layers import DownSkip, effective_weight


class Affine(NamedTuple):
    """x -> scale * x + shift per channel; both [C]."""

    scale: Tensor
    shift: Tensor


class Conv(NamedTuple):
    """A convolution's kernel and bias [Cout] (None: no bias); stride, padding and groups belong to whoever runs it."""

    weight: Tensor
    bias: Tensor | None


def batch_norm(norm: nn.BatchNorm2d) -> Affine:
    """BN in evaluation mode: scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return Affine(scale, norm.bias - norm.running_mean * scale)


def convolution(conv: nn.Conv2d) -> Conv:
    """The kernel that `conv` applies, its weight norm carried out."""
    return Conv(effective_weight(conv), conv.bias)


def scaled(conv: Conv, factor: float) -> Conv:
    """factor * conv(x)."""
    return Conv(conv.weight * factor, None if conv.bias is None else conv.bias * factor)


def of_scaled(conv: Conv, factor: float) -> Conv:
    """conv(factor * x)."""
    return Conv(conv.weight * factor, conv.bias)


def then_affine(conv: Conv, affine: Affine) -> Conv:
    """affine(conv(x)) as one convolution, of any kernel size and grouping."""
    bias = affine.shift if conv.bias is None else conv.bias * affine.scale + affine.shift
    return Conv(conv.weight * affine.scale[:, None, None, None], bias)


def of_affine(conv: Conv, affine: Affine) -> Conv:
    """conv(affine(x)) as one convolution, for an ungrouped 1x1.

    A larger kernel would see zeros, not shifts, outside the frame, and could not take the shift into its bias.
    """
    assert conv.weight.shape[2:] == (1, 1)
    shift = conv.weight[:, :, 0, 0] @ affine.shift
    return Conv(conv.weight * affine.scale[:, None, None], shift if conv.bias is None else conv.bias + shift)


def nearest_phases(weight: Tensor) -> Tensor:
    """The four kernels [4, Cout, Cin / groups, J, J] by which low-resolution x gives conv(nearest_x2(x)).

    For odd K and padding P = (K - 1) / 2. Output pixel (2 i + p, 2 j + q) is phase 2 p + q at (i, j). Its tap t reads
    upsampled pixel 2 i + p + t, which is source pixel i + floor((p + t) / 2): taps that share a source pixel are
    summed, into J = 2 R + 1 with R = floor((P + 1) / 2): 3, 3, 7 for K = 3, 5, 11. floor(o / 2) is inside the source
    just when o is inside the upsampled image, so padding x with R zeros is padding the upsampled image with P.
    """
    size = weight.shape[-1]
    if size % 2 == 0:
        raise ValueError(f"Phases of a nearest x2 need a kernel of odd size, not {size}.")
    padding = size // 2
    reach = (padding + 1) // 2
    gather = weight.new_zeros(2, 2 * reach + 1, size)  # [phase, source tap, tap]
    for phase in range(2):
        for tap in range(size):
            gather[phase, (phase + tap - padding) // 2 + reach, tap] = 1
    return torch.einsum("pit,qju,octu->pqocij", gather, gather, weight).flatten(0, 1)


def pooled(weight: Tensor) -> Tensor:
    """The (K+1)x(K+1) kernel that at stride 2 gives average_pool_2x2(conv(x)), with the same padding.

    The mean of the kernel's four shifts by 0 or 1, which is to pool the kernel in a frame of zeros: for K = 3, 16 taps
    per output pixel in place of 36.
    """
    return F.avg_pool2d(weight, 2, stride=1, padding=1)


def nearest_transposed(weight: Tensor) -> Tensor:
    """The kernel [Cin, Cout, K+1, K+1] whose transposed convolution at stride 2 gives conv(nearest_x2(x)).

    Ungrouped, odd K, padding (K - 1) / 2 on both sides. Nearest x2 is 4 times the adjoint of 2x2 average pooling, so
    this is the adjoint of `pooled`: for K = 3, 4 taps per output pixel in place of 9.
    """
    return 4 * pooled(weight.flip(2, 3)).transpose(0, 1)


def down_skip(skip: DownSkip) -> Conv:
    """The four 1x1 stride-2 convolutions of a "down" cell's skip, one per pixel phase, as one 2x2 at stride 2."""
    quarters = ((skip.conv_1, 0, 0), (skip.conv_2, 1, 1), (skip.conv_3, 0, 1), (skip.conv_4, 1, 0))
    weights = [F.pad(effective_weight(conv), (j, 1 - j, i, 1 - i)) for conv, i, j in quarters]
    biases = [conv.bias for conv, _, _ in quarters if conv.bias is not None]
    return Conv(torch.cat(weights), torch.cat(biases))


def split_input(conv: Conv, channels: int) -> tuple[Conv, Conv]:
    """conv(cat(x, z)) = first(x) + second(z), x having `channels` channels; the first part keeps the bias."""
    return Conv(conv.weight[:, :channels], conv.bias), Conv(conv.weight[:, channels:], None)
