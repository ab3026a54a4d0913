"""Inverse autoregressive flows of the encoder: volume-preserving maps z <- z - m(z) with masked convolutions.

Source: NVAE (arXiv:2007.03898), section 3.4; inverse autoregressive flow (arXiv:1606.04934). Masks depend only on the
shapes and are not in the state dictionary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.models.layers import WNConv2d
from vaebm_fast.runtime.errors import UserError

HIDDEN_PER_LATENT = 6


def channel_mask(out_channels: int, in_channels: int, *, zero_diagonal: bool) -> Tensor:
    """[Cout, Cin] mask at the kernel's centre: output block i sees input blocks 0..i, or 0..i-1 with a zero diagonal.

    Inputs and outputs are each split into min(Cout, Cin) blocks of consecutive channels.
    """
    blocks = min(out_channels, in_channels)
    if out_channels % blocks or in_channels % blocks:
        raise UserError(f"A masked convolution needs one channel count to divide the other; they are "
                         f"{in_channels} and {out_channels}.")  # fmt: skip
    out_block = torch.arange(out_channels)[:, None] // (out_channels // blocks)
    in_block = torch.arange(in_channels)[None, :] // (in_channels // blocks)
    return (in_block < out_block if zero_diagonal else in_block <= out_block).float()


def masked_conv(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    depthwise: bool = False,
    bias: bool = False,
    zero_diagonal: bool = False,
    mirror: bool = False,
    init_scale: float = 1.0,
) -> WNConv2d:
    """A weight-normalised convolution, autoregressive in raster order over pixels, then over channels.

    `mirror` flips the mask in H and W only: it reverses the pixel order and keeps the channel order.
    """
    centre = kernel_size // 2
    mask = torch.zeros(out_channels, 1 if depthwise else in_channels, kernel_size, kernel_size)
    mask[:, :, :centre, :] = 1
    mask[:, :, centre, :centre] = 1
    if depthwise:
        mask[:, :, centre, centre] = 0.0 if zero_diagonal else 1.0
    else:
        mask[:, :, centre, centre] = channel_mask(out_channels, in_channels, zero_diagonal=zero_diagonal)
    return WNConv2d(
        in_channels,
        out_channels,
        kernel_size,
        groups=in_channels if depthwise else 1,
        bias=bias,
        mask=mask.flip(2, 3) if mirror else mask,
        init_scale=init_scale,
    )


class FlowNetwork(nn.Module):
    """The two hidden layers of m(z): masked 3x3 (L -> 6L, zero diagonal), ELU, masked depthwise 5x5, ELU."""

    def __init__(self, latents: int, *, mirror: bool) -> None:
        super().__init__()
        hidden = HIDDEN_PER_LATENT * latents
        self.convz = nn.Sequential(
            masked_conv(latents, hidden, 3, zero_diagonal=True, mirror=mirror),
            nn.ELU(),
            masked_conv(hidden, hidden, 5, depthwise=True, mirror=mirror),
            nn.ELU(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.convz(z)


class FlowMean(nn.Module):
    """The last layer of m(z): ELU, masked 1x1 (6L -> L)."""

    def __init__(self, latents: int, *, mirror: bool) -> None:
        super().__init__()
        self.conv_0 = masked_conv(HIDDEN_PER_LATENT * latents, latents, 1, bias=True, mirror=mirror, init_scale=0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.conv_0(F.elu(hidden))


class FlowCell(nn.Module):
    """z - m(z); log-determinant 0."""

    def __init__(self, latents: int, *, mirror: bool) -> None:
        super().__init__()
        self.conv = FlowNetwork(latents, mirror=mirror)
        self.mu = FlowMean(latents, mirror=mirror)

    def forward(self, z: Tensor) -> Tensor:
        return z - self.mu(self.conv(z))


class PairedFlow(nn.Module):
    """A flow cell, then its mirror image, so that every element can depend on every other."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.cell1 = FlowCell(latents, mirror=False)
        self.cell2 = FlowCell(latents, mirror=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.cell2(self.cell1(z))
