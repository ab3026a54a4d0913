"""Building blocks of a frozen pair around its ops, in plain PyTorch; autograd differentiates them in their inputs.

Weights require no gradients. All images are [N, C, H, W], NHWC in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vaebm_fast.frozen.fold import Conv
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.depthwise_swish import depthwise_swish
from vaebm_fast.ops.energy_epilogue import energy_epilogue
from vaebm_fast.ops.pointwise import PointwiseWeight, pack_pointwise, pointwise
from vaebm_fast.ops.residual_tail import residual_tail
from vaebm_fast.ops.se_gate_residual import se_gate_residual
from vaebm_fast.reference import Activation


class SqueezeExcite(NamedTuple):
    """The two linear layers of a gate: [hidden, C], [hidden], [C, hidden], [C]."""

    weight_in: Tensor
    bias_in: Tensor
    weight_out: Tensor
    bias_out: Tensor


class Depthwise(NamedTuple):
    """A depthwise convolution as `ops.depthwise_swish` takes it: [K, K, C] and [C]."""

    weight: Tensor
    bias: Tensor


class Pointwise(NamedTuple):
    """A 1x1 convolution in the layout of the backend that runs it."""

    weight: PointwiseWeight
    bias: Tensor | None

    @classmethod
    def of(cls, conv: Conv, backends: OpBackends) -> Pointwise:
        """`conv`, a 1x1, for the backend of `pointwise`."""
        return cls(pack_pointwise(conv.weight, backends["pointwise"]), conv.bias)

    def __call__(
        self, x: Tensor, backends: OpBackends, residual: Tensor | None = None, *, activation: Activation = "none"
    ) -> Tensor:
        """W f(x) + b + residual, f the activation."""
        backend = backends["pointwise"]
        if backend == "cuda" and not self._suits_cublas(activation):
            backend = "triton"
        return pointwise(x, self.weight, self.bias, residual, activation=activation, backend=backend)

    def _suits_cublas(self, activation: Activation) -> bool:
        """Whether cuBLAS beats Triton (1.3 to 2.5 times): no activation to fuse, rows in whole words of 16 bytes."""
        return activation == "none" and all(channels >= 32 and channels % 8 == 0 for channels in self.weight.shape)


def swish_group_conv(h: Tensor, conv: Conv, stride: int = 1) -> Tensor:
    """KxK (group) convolution of swish(h) plus bias; padding is 0 after the activation."""
    groups = h.shape[1] // conv.weight.shape[1]
    return F.conv2d(F.silu(h), conv.weight, conv.bias, stride, (conv.weight.shape[-1] - 1) // 2, groups=groups)


def swish_group_conv_phases(h: Tensor, conv: Conv) -> list[Tensor]:
    """The four phases, 2 p + q, of a (group) convolution of swish(nearest_x2(h)); kernels of `fold.nearest_phases`.

    h [N, C, H, W]; returns four [N, C, H, W], pixels (2 i + p, 2 j + q) of the result. They stay separate because the
    following 1x1 does not mix pixels: `interleave` then joins its narrower outputs.
    """
    activated = F.silu(h)
    groups, padding = h.shape[1] // conv.weight.shape[2], conv.weight.shape[-1] // 2
    return [F.conv2d(activated, phase, conv.bias, 1, padding, groups=groups) for phase in conv.weight]


def interleave(phases: list[Tensor]) -> Tensor:
    """[N, C, 2 H, 2 W] whose pixel (2 i + p, 2 j + q) is pixel (i, j) of phase 2 p + q."""
    nhwc = [phase.permute(0, 2, 3, 1) for phase in phases]
    rows = [torch.stack(pair, dim=3).flatten(2, 3) for pair in (nhwc[:2], nhwc[2:])]  # [N, H, 2 W, C] each
    return torch.stack(rows, dim=2).flatten(1, 2).permute(0, 3, 1, 2)


def gate_and_add(s: Tensor, skip: Tensor, se: SqueezeExcite | None, backends: OpBackends) -> Tensor:
    """skip + gate(s) * s, or skip + s without a gate. s includes the cell's 0.1; the gate's weights divide by it."""
    if se is None:
        return s.add_(skip)
    return se_gate_residual(s, skip, *se, backend=backends["se_gate_residual"])


def depthwise_project_and_add(
    h: Tensor,
    skip: Tensor,
    depthwise: Depthwise,
    project: Pointwise,
    se: SqueezeExcite | None,
    backends: OpBackends,
    *,
    upsample: bool,
) -> Tensor:
    """skip + gate(s) * s, s = W2 swish(Wd * swish(h) + bd) + b2: one op if the pair runs it, otherwise its parts."""
    if se is not None and "residual_tail" in backends:
        project_weight, project_bias = project.weight.forward, project.bias
        assert project_bias is not None
        weights = (*depthwise, project_weight, project_bias, *se)
        return residual_tail(h, skip, *weights, upsample=upsample, backend=backends["residual_tail"])
    h = depthwise_swish(h, *depthwise, upsample=upsample, backend=backends["depthwise_swish"])
    activation: Activation = "swish"
    if backends["pointwise"] == "cuda":  # cuBLAS cannot fuse the activation
        h, activation = energy_epilogue(h, backend=backends["energy_epilogue"]), "none"
    if se is None:
        return project(h, backends, skip, activation=activation)
    return gate_and_add(project(h, backends, activation=activation), skip, se, backends)
