"""Energy networks E(x): weight-normalised residual networks over images in [0, 1] (VAEBM, arXiv:2010.00654, appendix).

Keys of the state dictionary are those of the published files: `conv1.*`, `blocks.<i>.*`, `linear.*`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.config import EnergyConfig
from vaebm_fast.models.layers import WNConv2d, initialize_from_data, swish


def activation(x: Tensor) -> Tensor:
    """swish(x) / 1.1: Lipschitz constant 1."""
    return swish(x) / 1.1


class EnergyResidualBlock(nn.Module):
    """act(pool(conv2(act(conv1(x))) + skip(x))); pool is a 2x2 average if the block downsamples, else the identity."""

    def __init__(self, in_channels: int, out_channels: int, *, downsample: bool) -> None:
        super().__init__()
        self.downsample = downsample
        self.conv1 = WNConv2d(in_channels, out_channels, 3)
        self.conv2 = WNConv2d(out_channels, out_channels, 3)
        needs_conv = downsample or in_channels != out_channels
        self.skip = nn.Sequential(WNConv2d(in_channels, out_channels, 1, bias=False)) if needs_conv else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(activation(self.conv1(x))) + self.skip(x)
        return activation(F.avg_pool2d(y, 2) if self.downsample else y)


class EnergyNetwork(nn.Module):
    """E(x) [N] for images x [N, C, H, W] in [0, 1]."""

    def __init__(self, config: EnergyConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = WNConv2d(config.image_channels, width, 3)
        self.blocks = nn.ModuleList(
            EnergyResidualBlock(width * block.in_channels, width * block.out_channels, downsample=block.downsample)
            for block in config.blocks
        )
        self.linear = nn.Linear(width * config.blocks[-1].out_channels, 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.config.image_shape

    def forward(self, x: Tensor) -> Tensor:
        """Energies [N]; raises ValueError when x is not [N, C, H, W] of this network's images."""
        if tuple(x.shape[1:]) != self.image_shape:
            taken = ", ".join(map(str, self.image_shape))
            raise ValueError(f"x has shape {list(x.shape)}; this energy network takes [N, {taken}].")
        x = activation(self.conv1(x))
        for block in self.blocks:
            x = block(x)
        return self.linear(x.sum(dim=(2, 3))).squeeze(1)

    def initialize_from_data(self, x: Tensor) -> None:
        """Data-dependent initialisation of every convolution on a batch x in [0, 1]; not of the linear layer."""
        convs = [module for module in self.modules() if isinstance(module, WNConv2d)]
        initialize_from_data(convs, lambda: self(x))
