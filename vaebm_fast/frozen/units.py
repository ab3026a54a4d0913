"""Building blocks of a frozen pair around its ops, in plain PyTorch; autograd differentiates them in their inputs.

Weights require no gradients. All images are [N, C, H, W], NHWC in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vaebm_fast.frozen.fold import Conv
from vaebm_fast.ops._backend import OP_BACKENDS, Backend, backend_for
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample
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
    def of(cls, conv: Conv, backend: Backend) -> Pointwise:
        """`conv`, a 1x1, for `backend`."""
        return cls(pack_pointwise(conv.weight, backend), conv.bias)

    def __call__(
        self, x: Tensor, backend: Backend, residual: Tensor | None = None, *, activation: Activation = "none"
    ) -> Tensor:
        """W f(x) + b + residual, f the activation."""
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


def upsample_skip(x: Tensor, backend: Backend) -> Tensor:
    """Bilinear x2, corners aligned; backend "cpp" uses PyTorch's, which is deterministic on a CPU."""
    backend = "reference" if backend == "cpp" else backend_for("bilinear_upsample", backend)
    return bilinear_upsample(x, backend=backend)


def gate_and_add(s: Tensor, skip: Tensor, se: SqueezeExcite | None, backend: Backend) -> Tensor:
    """skip + gate(s) * s, or skip + s without a gate. s includes the cell's 0.1; the gate's weights divide by it."""
    if se is None:
        return s.add_(skip)
    return se_gate_residual(s, skip, *se, backend=backend_for("se_gate_residual", backend))


def depthwise_project_and_add(
    h: Tensor,
    skip: Tensor,
    depthwise: Depthwise,
    project: Pointwise,
    se: SqueezeExcite | None,
    backend: Backend,
    *,
    upsample: bool,
) -> Tensor:
    """skip + gate(s) * s, s = W2 swish(Wd * swish(h) + bd) + b2: one op if the backend has it, otherwise its parts."""
    if backend == "cuda":
        h = depthwise_swish(h, *depthwise, upsample=upsample, backend=backend)
        activated = energy_epilogue(h, backend=backend_for("energy_epilogue", backend))  # swish: cuBLAS cannot fuse it
        if se is None:
            return project(activated, backend, skip)
        return gate_and_add(project(activated, backend), skip, se, backend)
    if se is not None and backend in OP_BACKENDS["residual_tail"]:
        project_weight, project_bias = project.weight.forward, project.bias
        assert project_bias is not None
        weights = (*depthwise, project_weight, project_bias, *se)
        return residual_tail(h, skip, *weights, upsample=upsample, backend=backend)
    h = depthwise_swish(h, *depthwise, upsample=upsample, backend=backend)
    if se is None:
        return project(h, backend, skip, activation="swish")
    return gate_and_add(project(h, backend, activation="swish"), skip, se, backend)
