"""Layers of NVAE and the energy networks: weight-normalised convolutions, normalisation, residual cells.

Attribute names (`_ops`, `conv_0`, `bn_act`, `se.se`, ...) match the keys of published state dictionaries, so a
published checkpoint loads without a key map. Source: NVAE (arXiv:2007.03898), section 3 and appendix A.

N batch, C channels, H W pixels. All tensors are [N, C, H, W].
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.runtime.errors import UserError

BN_EPS = 1e-5
BN_MOMENTUM = 0.05
WEIGHT_NORM_EPS = 1e-5
RESIDUAL_SCALE = 0.1

Module = TypeVar("Module", bound=nn.Module)


def channels_last(module: Module) -> Module:
    """The module with its weights in NHWC order, the fastest layout for every convolution here."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return F.silu(x)


class WNConv2d(nn.Conv2d):
    """Weight-normalised convolution: effective weight exp(log_weight_norm) * w / (|w| + 1e-5), norm per output channel.

    `mask`, shaped like the weight, is applied before the norm; it depends only on the architecture and is not in the
    state dictionary. Unlike `torch.nn.utils.weight_norm`, the scale is a logarithm and 1e-5 is added to the norm.
    """

    mask: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        mask: Tensor | None = None,
        init_scale: float = 1.0,
    ) -> None:
        padding = dilation * (kernel_size - 1) // 2
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.register_buffer("mask", mask, persistent=False)
        _, norm = self._masked_weight()
        self.log_weight_norm = nn.Parameter((torch.log(norm + 1e-2) + math.log(init_scale)).detach())

    def _masked_weight(self) -> tuple[Tensor, Tensor]:
        """The masked weight w [Cout, Cin / groups, K, K] and its norm |w| [Cout, 1, 1, 1]."""
        weight = self.weight if self.mask is None else self.weight * self.mask
        return weight, torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)

    def effective_weight(self) -> Tensor:
        """The weight the convolution applies, [Cout, Cin / groups, K, K]."""
        weight, norm = self._masked_weight()
        return weight * (torch.exp(self.log_weight_norm) / (norm + WEIGHT_NORM_EPS))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.effective_weight(), self.bias)

    @torch.no_grad()
    def initialize_from(self, x: Tensor) -> None:
        """Set scale and bias so that on `x` every output channel has mean 0 and standard deviation 1/5.

        Salimans and Kingma, arXiv:1602.07868, section 3, dividing by five standard deviations instead of one.
        """
        weight, norm = self._masked_weight()
        y = self._conv_forward(x, weight / (norm + WEIGHT_NORM_EPS), None)
        mean = y.mean(dim=(0, 2, 3))
        std5 = 5 * y.std(dim=(0, 2, 3), unbiased=True)
        if self.bias is not None:
            self.bias.copy_(-mean / (std5 + WEIGHT_NORM_EPS))
        self.log_weight_norm.copy_(-torch.log(std5 + WEIGHT_NORM_EPS).reshape(-1, 1, 1, 1))


def effective_weight(conv: nn.Conv2d) -> Tensor:
    """The weight that `conv` applies, weight-normalised or plain."""
    return conv.effective_weight() if isinstance(conv, WNConv2d) else conv.weight


@torch.no_grad()
def initialize_from_data(convs: Sequence[WNConv2d], run: Callable[[], object]) -> None:
    """Data-dependent initialisation: one call of `run` initialises each of `convs` from its input before it computes.

    Later convolutions therefore see the outputs of initialised earlier ones.
    """

    def initialize(conv: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(conv, WNConv2d)
        conv.initialize_from(inputs[0])

    hooks = [conv.register_forward_pre_hook(initialize) for conv in convs]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


class BatchNorm(nn.Module):
    """Batch normalisation, eps 1e-5, momentum 0.05, wrapped to match published keys (`<name>.bn.weight`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class BNSwish(nn.BatchNorm2d):
    """swish(BN(x)); its state-dictionary entries are directly under its name."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=BN_EPS, momentum=BN_MOMENTUM)

    def forward(self, x: Tensor) -> Tensor:
        return swish(super().forward(x))


class NearestUpsample(nn.Module):
    """Nearest-neighbour x2."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class BilinearUpsample(nn.Module):
    """Bilinear x2 with aligned corners."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class SE(nn.Module):
    """Squeeze and excitation: x * sigmoid(MLP(mean_hw x)), the hidden layer max(C // 16, 4) wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean(dim=(2, 3)))[:, :, None, None]


class ActivatedConv(nn.Module):
    """`res_elu`, `res_bnelu`, `res_bnswish`, `res_bnswish5`: [BN,] activation, [nearest x2,] WN 3x3.

    `res_bnswish5` spans 5 pixels: 3x3 with dilation 2.
    """

    def __init__(self, primitive: str, in_channels: int, out_channels: int, resample: str) -> None:
        super().__init__()
        if primitive == "res_bnelu":
            self.bn = BatchNorm(in_channels)
        elif primitive in ("res_bnswish", "res_bnswish5"):
            self.bn_act = BNSwish(in_channels)
        elif primitive != "res_elu":
            raise ValueError(f"Primitive {primitive!r} is not known.")
        self.primitive = primitive
        self.upsample = NearestUpsample() if resample == "up" else nn.Identity()
        self.conv_0 = WNConv2d(
            in_channels,
            out_channels,
            3,
            stride=2 if resample == "down" else 1,
            dilation=2 if primitive == "res_bnswish5" else 1,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.primitive == "res_elu":
            x = F.elu(x)
        elif self.primitive == "res_bnelu":
            x = F.elu(self.bn(x))
        else:
            x = self.bn_act(x)
        return self.conv_0(self.upsample(x))


class ConvBNSwish(nn.Module):
    """swish(BN(conv(x))); the convolution has neither bias nor weight norm."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, groups: int) -> None:
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False),
            BNSwish(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class InvertedResidual(nn.Module):
    """`mconv_e{X}k{K}g{g}`: [nearest x2,] BN, 1x1 to round(X * Cin), depthwise KxK, 1x1 to Cout, BN; swish between.

    g = 0 means depthwise, otherwise g groups. The depthwise pads its *activated* input with zeros.
    """

    def __init__(self, primitive: str, in_channels: int, out_channels: int, resample: str) -> None:
        super().__init__()
        match = re.fullmatch(r"mconv_e([0-9.]+)k(\d+)g(\d+)", primitive)
        if match is None:
            raise ValueError(f"Primitive {primitive!r} is not known.")
        expansion, kernel_size, groups = float(match[1]), int(match[2]), int(match[3])
        hidden = round(in_channels * expansion)
        if groups and hidden % groups:
            raise UserError(
                f"Primitive {primitive} needs {in_channels} channels x {expansion:g} to be a multiple of {groups}."
            )
        layers: list[nn.Module] = [NearestUpsample()] if resample == "up" else []
        layers += [
            BatchNorm(in_channels),
            ConvBNSwish(in_channels, hidden, 1, stride=1, groups=1),
            ConvBNSwish(hidden, hidden, kernel_size, stride=2 if resample == "down" else 1, groups=groups or hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            BatchNorm(out_channels),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class DownSkip(nn.Module):
    """Halve the resolution of swish(x) by four stride-2 1x1 convolutions, one per pixel phase, concatenated."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        quarter = out_channels // 4
        if quarter == 0:
            raise UserError(f"A cell that halves the resolution needs at least 4 output channels, not {out_channels}.")
        self.conv_1 = WNConv2d(in_channels, quarter, 1, stride=2)
        self.conv_2 = WNConv2d(in_channels, quarter, 1, stride=2)
        self.conv_3 = WNConv2d(in_channels, quarter, 1, stride=2)
        self.conv_4 = WNConv2d(in_channels, out_channels - 3 * quarter, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = swish(x)
        phases = [
            self.conv_1(x),
            self.conv_2(x[:, :, 1:, 1:]),
            self.conv_3(x[:, :, :, 1:]),
            self.conv_4(x[:, :, 1:, :]),
        ]
        return torch.cat(phases, dim=1)


class Cell(nn.Module):
    """Residual cell: skip(x) + 0.1 * SE(ops(x)). `resample` is "none", "down" or "up"; only the first op resamples."""

    def __init__(
        self, primitives: Sequence[str], in_channels: int, out_channels: int, *, resample: str = "none", use_se: bool
    ) -> None:
        super().__init__()
        if resample == "down":
            self.skip: nn.Module = DownSkip(in_channels, out_channels)
        elif resample == "up":
            self.skip = nn.Sequential(BilinearUpsample(), WNConv2d(in_channels, out_channels, 1, bias=False))
        else:
            self.skip = nn.Identity()
        self._ops = nn.ModuleList()
        for index, primitive in enumerate(primitives):
            kind = InvertedResidual if primitive.startswith("mconv") else ActivatedConv
            source, resampled = (in_channels, resample) if index == 0 else (out_channels, "none")
            self._ops.append(kind(primitive, source, out_channels, resampled))
        self.se: nn.Module = SE(out_channels) if use_se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for op in self._ops:
            y = op(y)
        return self.skip(x) + RESIDUAL_SCALE * self.se(y)


class EncoderCombiner(nn.Module):
    """Encoder feature + 1x1(decoder feature). In the bottom-up pass it only marks which encoder feature to store."""

    def __init__(self, decoder_channels: int, encoder_channels: int) -> None:
        super().__init__()
        self.conv = WNConv2d(decoder_channels, encoder_channels, 1)

    def forward(self, encoder_feature: Tensor, decoder_feature: Tensor) -> Tensor:
        return encoder_feature + self.conv(decoder_feature)


class DecoderCombiner(nn.Module):
    """1x1 of cat(decoder feature, z)."""

    def __init__(self, channels: int, latents: int) -> None:
        super().__init__()
        self.conv = WNConv2d(channels + latents, channels, 1)

    def forward(self, decoder_feature: Tensor, z: Tensor) -> Tensor:
        return self.conv(torch.cat([decoder_feature, z], dim=1))
