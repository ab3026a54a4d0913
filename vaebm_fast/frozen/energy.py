"""The frozen energy network: weight norm applied, act's 1/1.1 folded into the next weights, pooling into the kernels.

A block computes act(pool(conv2(act(conv1(x))) + skip(x))), act = swish / 1.1. Frozen blocks pass on u = 1.1 x, a plain
swish; 3x3 and average pool become one 4x4 at stride 2, and the skip pools before its 1x1.

On every backend the activation adds the bias of the preceding convolution: on a GPU cuDNN would add it in a separate
pass, and the activation reads the whole result anyway.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.frozen import fold
from vaebm_fast.frozen.fold import Conv
from vaebm_fast.frozen.part import Part, slots
from vaebm_fast.frozen.units import Pointwise
from vaebm_fast.models.energy import EnergyNetwork, EnergyResidualBlock
from vaebm_fast.models.layers import WNConv2d
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.energy_epilogue import energy_epilogue
from vaebm_fast.ops.energy_head import energy_head

ACTIVATION_SCALE = 1 / 1.1


class StemWeights(NamedTuple):
    """The first convolution."""

    conv: Conv


class BlockWeights(NamedTuple):
    """Both convolutions of a block and its skip's (None: identity; a Conv if it includes the pool)."""

    conv1: Conv
    conv2: Conv
    skip: Pointwise | Conv | None


class HeadWeights(NamedTuple):
    """The linear layer, [C] and [1]."""

    weight: Tensor
    bias: Tensor


class Terms(NamedTuple):
    """y + shift + skip_scale * skip: arguments of the op after a block's last convolution."""

    y: Tensor
    skip: Tensor
    skip_scale: float
    shift: Tensor | None


def pools_in_convolution(device: torch.device) -> bool:
    """Whether a skip's 2x2 average pool and 1x1 run as one 2x2 convolution at stride 2.

    This takes 4 times the multiplications and one pass less. On an H200 in bfloat16, forward and backward, it takes
    0.17 ms instead of 1.64 at 256x256 and 0.12 instead of 0.41 at 128x128, because PyTorch's pool is slow in NHWC. On a
    CPU the arithmetic dominates.
    """
    return device.type == "cuda"


class FrozenStem(Part[StemWeights]):
    """u = swish(conv1(x)) of images x in [0, 1]."""

    def __init__(self, conv: WNConv2d, dtype: torch.dtype, backends: OpBackends) -> None:
        super().__init__("energy.conv1", slots(conv), dtype, partial(_fold_stem, conv))
        self._backends = backends

    def __call__(self, x: Tensor) -> Tensor:
        conv, backend = self.weights.conv, self._backends["energy_epilogue"]
        return energy_epilogue(F.conv2d(x, conv.weight, padding=1), shift=conv.bias, backend=backend)


def _fold_stem(conv: WNConv2d) -> StemWeights:
    return StemWeights(fold.convolution(conv))


class FrozenBlock(Part[BlockWeights]):
    """u -> swish([pool] (conv2(swish(conv1 u)) + skip(u))); every 1/1.1 is in a weight or in the skip's scale."""

    def __init__(self, name: str, block: EnergyResidualBlock, dtype: torch.dtype, backends: OpBackends) -> None:
        super().__init__(name, slots(block), dtype, partial(_fold_block, block, backends))
        self._downsample, self._backends = block.downsample, backends

    def before_activation(self, u: Tensor) -> Terms:
        """The terms whose sum the block's last swish activates."""
        w, backend = self.weights, self._backends["energy_epilogue"]
        h = energy_epilogue(F.conv2d(u, w.conv1.weight, padding=1), shift=w.conv1.bias, backend=backend)
        y = F.conv2d(h, w.conv2.weight, stride=2 if self._downsample else 1, padding=1)
        if w.skip is None:
            return Terms(y, u, ACTIVATION_SCALE, w.conv2.bias)
        if isinstance(w.skip, Conv):
            return Terms(y, F.conv2d(u, w.skip.weight, stride=2), 1.0, w.conv2.bias)
        return Terms(y, w.skip(F.avg_pool2d(u, 2) if self._downsample else u, self._backends), 1.0, w.conv2.bias)

    def __call__(self, u: Tensor) -> Tensor:
        return energy_epilogue(*self.before_activation(u), backend=self._backends["energy_epilogue"])


def _fold_block(block: EnergyResidualBlock, backends: OpBackends) -> BlockWeights:
    conv1, conv2 = (fold.of_scaled(fold.convolution(c), ACTIVATION_SCALE) for c in (block.conv1, block.conv2))
    if block.downsample:
        conv2 = Conv(fold.pooled(conv2.weight), conv2.bias)
    if len(block.skip) == 0:
        return BlockWeights(conv1, conv2, None)
    assert isinstance(block.skip[0], WNConv2d)
    skip = fold.of_scaled(fold.convolution(block.skip[0]), ACTIVATION_SCALE)
    if block.downsample and pools_in_convolution(skip.weight.device):
        return BlockWeights(conv1, conv2, Conv(fold.pooled(skip.weight), skip.bias))
    return BlockWeights(conv1, conv2, Pointwise.of(skip, backends))


class FrozenHead(Part[HeadWeights]):
    """E [N] = linear(sum_hw swish(t) / 1.1), t the last block's pre-activation; in float32 or float64."""

    def __init__(self, energy: EnergyNetwork, dtype: torch.dtype, backends: OpBackends) -> None:
        linear, dtype = energy.linear, torch.promote_types(dtype, torch.float32)
        super().__init__("energy.linear", slots(linear), dtype, partial(_fold_head, linear))
        self._backends = backends

    def __call__(self, terms: Terms) -> Tensor:
        return energy_head(*terms, *self.weights, backend=self._backends["energy_head"])


def _fold_head(linear: nn.Linear) -> HeadWeights:
    return HeadWeights(linear.weight[0] * ACTIVATION_SCALE, linear.bias)


class FrozenEnergy:
    """E(x) [N] for images x [N, C, H, W] in [0, 1]; differentiable only in x."""

    def __init__(self, energy: EnergyNetwork, dtype: torch.dtype, backends: OpBackends) -> None:
        self._dtype = dtype
        self._stem = FrozenStem(energy.conv1, dtype, backends)
        self._blocks = [
            FrozenBlock(f"energy.blocks.{index}", block, dtype, backends)
            for index, block in enumerate(energy.blocks)
            if isinstance(block, EnergyResidualBlock)
        ]
        self._head = FrozenHead(energy, dtype, backends)

    @property
    def parts(self) -> list[Part[Any]]:
        """Every part that holds weights."""
        return [self._stem, *self._blocks, self._head]

    def __call__(self, x: Tensor) -> Tensor:
        u = self._stem(x.to(self._dtype))
        for block in self._blocks[:-1]:
            u = block(u)
        return self._head(self._blocks[-1].before_activation(u))
