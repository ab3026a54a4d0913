"""The algebra of freezing: pure functions that turn trained layers into fewer, cheaper linear maps with equal results.

Every rewrite is exact; only rounding differs. Images are [N, C, H, W], kernels [Cout, Cin / groups, K, K]. `cells`,
`decoder` and `energy` combine these rewrites.
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
    """A convolution's kernel and bias [Cout] (None: no bias); the caller supplies stride, padding and groups."""

    weight: Tensor
    bias: Tensor | None


def batch_norm(norm: nn.BatchNorm2d) -> Affine:
    """BN in evaluation mode: scale = gamma / sqrt(var + eps), shift = beta - mean * scale."""
    assert norm.running_var is not None and norm.running_mean is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return Affine(scale, norm.bias - norm.running_mean * scale)


def convolution(conv: nn.Conv2d) -> Conv:
    """The kernel that `conv` applies, after weight normalisation."""
    return Conv(effective_weight(conv), conv.bias)


def scaled(conv: Conv, factor: float) -> Conv:
    """factor * conv(x)."""
    return Conv(conv.weight * factor, None if conv.bias is None else conv.bias * factor)


def of_scaled(conv: Conv, factor: float) -> Conv:
    """conv(factor * x)."""
    return Conv(conv.weight * factor, conv.bias)


def then_affine(conv: Conv, affine: Affine) -> Conv:
    """affine(conv(x)) as one convolution, for any kernel size and grouping."""
    bias = affine.shift if conv.bias is None else conv.bias * affine.scale + affine.shift
    return Conv(conv.weight * affine.scale[:, None, None, None], bias)


def of_affine(conv: Conv, affine: Affine) -> Conv:
    """conv(affine(x)) as one convolution, for an ungrouped 1x1.

    A larger kernel pads with zeros, not with the shift, so its bias cannot absorb the shift.
    """
    assert conv.weight.shape[2:] == (1, 1)
    shift = conv.weight[:, :, 0, 0] @ affine.shift
    return Conv(conv.weight * affine.scale[:, None, None], shift if conv.bias is None else conv.bias + shift)


def nearest_phases(weight: Tensor) -> Tensor:
    """Four kernels [4, Cout, Cin / groups, J, J] that compute the phases of conv(nearest_x2(x)) from x.

    For odd K and padding P = (K - 1) / 2. Output pixel (2 i + p, 2 j + q) is phase 2 p + q at (i, j). Its tap t reads
    upsampled pixel 2 i + p + t, which is source pixel i + floor((p + t) / 2). Taps that share a source pixel are
    summed, which leaves J = 2 R + 1 taps with R = floor((P + 1) / 2): 3, 3, 7 for K = 3, 5, 11. floor(o / 2) is inside
    the source exactly when o is inside the upsampled image, so padding x by R equals padding the upsampled image by P.
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

    It is the mean of the kernel's four shifts by 0 or 1, that is, the zero-padded kernel average-pooled at stride 1.
    For K = 3 it has 16 taps per output pixel instead of 36.
    """
    return F.avg_pool2d(weight, 2, stride=1, padding=1)


def nearest_transposed(weight: Tensor) -> Tensor:
    """The kernel [Cin, Cout, K+1, K+1] whose transposed convolution at stride 2 gives conv(nearest_x2(x)).

    Ungrouped, odd K, padding (K - 1) / 2 on both sides. Nearest x2 is 4 times the adjoint of 2x2 average pooling, so
    this is 4 times the adjoint of `pooled`. For K = 3 it has 4 taps per output pixel instead of 9.
    """
    return 4 * pooled(weight.flip(2, 3)).transpose(0, 1)


def down_skip(skip: DownSkip) -> Conv:
    """The four 1x1 stride-2 convolutions of a "down" cell's skip, one per pixel phase, as one 2x2 at stride 2."""
    quarters = ((skip.conv_1, 0, 0), (skip.conv_2, 1, 1), (skip.conv_3, 0, 1), (skip.conv_4, 1, 0))
    weights = [F.pad(effective_weight(conv), (j, 1 - j, i, 1 - i)) for conv, i, j in quarters]
    biases = [conv.bias for conv, _, _ in quarters if conv.bias is not None]
    return Conv(torch.cat(weights), torch.cat(biases))


def split_input(conv: Conv, channels: int) -> tuple[Conv, Conv]:
    """(first, second) with conv(cat(x, z)) = first(x) + second(z), x of `channels` channels; first keeps the bias."""
    return Conv(conv.weight[:, :channels], conv.bias), Conv(conv.weight[:, channels:], None)
