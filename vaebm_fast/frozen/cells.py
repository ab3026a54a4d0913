"""Frozen residual cells: skip(x) + 0.1 * SE(ops(x)) with adjacent linear maps folded.

In both kinds the last convolution includes the factor 0.1 and the gate's first layer divides by it. The skip upsamples
after its 1x1: bilinear x2 mixes pixels and the 1x1 mixes channels, so they commute, and the 1x1 runs on a quarter of
the pixels.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.frozen import fold
from vaebm_fast.frozen.fold import Affine, Conv
from vaebm_fast.frozen.part import Part, slots
from vaebm_fast.frozen.units import (
    Depthwise,
    Pointwise,
    SqueezeExcite,
    depthwise_project_and_add,
    gate_and_add,
    interleave,
    swish_group_conv,
    swish_group_conv_phases,
)
from vaebm_fast.models.layers import (
    RESIDUAL_SCALE,
    SE,
    ActivatedConv,
    BatchNorm,
    Cell,
    ConvBNSwish,
    DownSkip,
    InvertedResidual,
)
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample
from vaebm_fast.ops.depthwise_swish import pack_depthwise
from vaebm_fast.ops.inverted_residual import (
    BlockWeights,
    PackedBlock,
    inverted_residual,
    is_taken,
    pack_inverted_residual,
)
from vaebm_fast.runtime.errors import UserError

# Images of at least this side run the block as one kernel; smaller ones run cuBLAS and the depthwise kernel. H200,
# bfloat16, N = 16, forward and backward: 0.85 ms against 1.06 with C = 64 at 128x128, 0.84 against 0.57 with C = 128 at
# 64x64.
FUSED_SIDE = 128


class InvertedResidualWeights(NamedTuple):
    """1x1 to the hidden channels, depthwise, 1x1 back.

    `depthwise` is a `Depthwise` for a compiled kernel, otherwise a Conv, which holds four phases in an "up" cell.
    `whole`: all three packed for the one-kernel branch, if it supports them.
    """

    expand: Pointwise
    depthwise: Depthwise | Conv
    project: Pointwise
    skip: Pointwise | Conv | None
    se: SqueezeExcite | None
    whole: PackedBlock | None


class ActivatedConvsWeights(NamedTuple):
    """The affine map before the first activation, and the 3x3 of every op."""

    norm: Affine | None
    convs: tuple[Conv, ...]
    skip: Pointwise | Conv | None
    se: SqueezeExcite | None


def freeze_cell(
    name: str, cell: Cell, dtype: torch.dtype, backends: OpBackends
) -> InvertedResidualCell | ActivatedConvsCell:
    """The frozen form of `cell`; `name` appears in error messages."""
    if isinstance(cell._ops[0], InvertedResidual):
        return InvertedResidualCell(name, cell, cell._ops[0], dtype, backends)
    return ActivatedConvsCell(name, cell, dtype, backends)


class InvertedResidualCell(Part[InvertedResidualWeights]):
    """s = W2 swish(Wd * swish(W1 x + b1) + bd) + b2; y = skip(x) + gate(s) s.

    An "up" cell expands at low resolution: nearest x2 commutes with BN, the 1x1 and swish. A pair that runs
    `inverted_residual` computes s by that one kernel if it supports this dtype and these channels and the image side is
    at least FUSED_SIDE.
    """

    def __init__(self, name: str, cell: Cell, op: InvertedResidual, dtype: torch.dtype, backends: OpBackends) -> None:
        super().__init__(name, slots(cell), dtype, partial(_fold_inverted_residual, cell, op, dtype, backends))
        self._resample, self._backends = _resample(cell), backends

    def __call__(self, x: Tensor) -> Tensor:
        w, skip = self.weights, _run_skip(x, self.weights.skip, self._backends)
        if w.whole is not None and x.shape[2] >= FUSED_SIDE:
            s, _ = inverted_residual(x, w.whole, backend=self._backends["inverted_residual"])
            return gate_and_add(s, skip, w.se, self._backends)
        h, up = w.expand(x, self._backends), self._resample == "up"
        if isinstance(w.depthwise, Depthwise):
            return depthwise_project_and_add(h, skip, w.depthwise, w.project, w.se, self._backends, upsample=up)
        if up:
            phases = swish_group_conv_phases(h, w.depthwise)
            s = interleave([w.project(phase, self._backends, activation="swish") for phase in phases])
        else:
            h = swish_group_conv(h, w.depthwise, stride=2 if self._resample == "down" else 1)
            s = w.project(h, self._backends, activation="swish")
        return gate_and_add(s, skip, w.se, self._backends)


def _fold_inverted_residual(
    cell: Cell, op: InvertedResidual, dtype: torch.dtype, backends: OpBackends
) -> InvertedResidualWeights:
    resample = _resample(cell)
    norm, expand, depthwise, project, last = list(op.conv)[-5:]
    assert isinstance(norm, BatchNorm) and isinstance(project, nn.Conv2d) and isinstance(last, BatchNorm)
    start = fold.of_affine(_fold_conv_norm(expand), fold.batch_norm(norm.bn))
    end = fold.scaled(fold.then_affine(fold.convolution(project), fold.batch_norm(last.bn)), RESIDUAL_SCALE)
    middle: Depthwise | Conv = _fold_conv_norm(depthwise)
    whole = None
    is_compiled = backends["depthwise_swish"] != "reference"
    if is_compiled and middle.weight.shape[1] == 1 and resample != "down":  # what compiled kernels run
        assert middle.bias is not None
        middle = Depthwise(pack_depthwise(middle.weight), middle.bias)
        if "inverted_residual" in backends and dtype == torch.bfloat16 and resample == "none":
            whole = _pack_whole(start, middle, end)
    elif resample == "up":
        middle = Conv(fold.nearest_phases(middle.weight), middle.bias)
    return InvertedResidualWeights(
        expand=Pointwise.of(start, backends),
        depthwise=middle,
        project=Pointwise.of(end, backends),
        skip=_fold_skip(cell, backends),
        se=_fold_se(cell),
        whole=whole,
    )


def _pack_whole(expand: Conv, middle: Depthwise, project: Conv) -> PackedBlock | None:
    """Weights of the one-kernel branch; None if it does not support these sizes."""
    if not is_taken(expand.weight.shape[1], middle.weight):
        return None
    assert expand.bias is not None and project.bias is not None
    weights = (expand.weight.flatten(1), expand.bias, *middle, project.weight.flatten(1), project.bias)
    return pack_inverted_residual(BlockWeights(*weights))


class ActivatedConvsCell(Part[ActivatedConvsWeights]):
    """`res_*` ops: activation, 3x3, activation, 3x3; every BN but the first is folded into the preceding convolution.

    The first BN stays separate, because the skip reads x without it. In an "up" cell the first 3x3 becomes a 4x4
    transposed convolution.
    """

    def __init__(self, name: str, cell: Cell, dtype: torch.dtype, backends: OpBackends) -> None:
        self._ops, self._resample, self._backends = _activated_convs(cell), _resample(cell), backends
        if self._resample == "up" and self._ops[0].primitive == "res_bnswish5":
            raise UserError(f"{name} upsamples before a dilated convolution; freezing does not support this.")
        self._activations = [F.elu if op.primitive in ("res_elu", "res_bnelu") else F.silu for op in self._ops]
        super().__init__(name, slots(cell), dtype, partial(_fold_activated_convs, cell, backends))

    def __call__(self, x: Tensor) -> Tensor:
        w, s = self.weights, x
        if w.norm is not None:
            s = s * w.norm.scale[:, None, None] + w.norm.shift[:, None, None]
        for op, activation, conv in zip(self._ops, self._activations, w.convs, strict=True):
            s = activation(s)
            if self._resample == "up" and conv is w.convs[0]:
                s = F.conv_transpose2d(s, conv.weight, conv.bias, stride=2, padding=1)
            else:
                live = op.conv_0
                s = F.conv2d(s, conv.weight, conv.bias, live.stride, live.padding, live.dilation)
        return gate_and_add(s, _run_skip(x, w.skip, self._backends), w.se, self._backends)


def _activated_convs(cell: Cell) -> list[ActivatedConv]:
    return [op for op in cell._ops if isinstance(op, ActivatedConv)]


def _fold_activated_convs(cell: Cell, backends: OpBackends) -> ActivatedConvsWeights:
    ops = _activated_convs(cell)
    norms, convs = [_fold_norm(op) for op in ops], [fold.convolution(op.conv_0) for op in ops]
    for index, norm in enumerate(norms[1:]):
        convs[index] = convs[index] if norm is None else fold.then_affine(convs[index], norm)
    convs[-1] = fold.scaled(convs[-1], RESIDUAL_SCALE)
    if _resample(cell) == "up":
        convs[0] = Conv(fold.nearest_transposed(convs[0].weight), convs[0].bias)
    return ActivatedConvsWeights(norms[0], tuple(convs), _fold_skip(cell, backends), _fold_se(cell))


def _resample(cell: Cell) -> str:
    if isinstance(cell.skip, nn.Identity):
        return "none"
    return "down" if isinstance(cell.skip, DownSkip) else "up"


def _fold_conv_norm(layer: nn.Module) -> Conv:
    """Convolution and BN of a ConvBNSwish as one; the next op applies its swish."""
    assert isinstance(layer, ConvBNSwish)
    conv, norm = layer.conv
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d)
    return fold.then_affine(fold.convolution(conv), fold.batch_norm(norm))


def _fold_norm(op: ActivatedConv) -> Affine | None:
    if op.primitive == "res_elu":
        return None
    return fold.batch_norm(op.bn.bn if op.primitive == "res_bnelu" else op.bn_act)


def _fold_skip(cell: Cell, backends: OpBackends) -> Pointwise | Conv | None:
    """The skip's 1x1 (a Conv if it has a stride); None for an identity."""
    if isinstance(cell.skip, nn.Identity):
        return None
    if isinstance(cell.skip, DownSkip):
        return fold.down_skip(cell.skip)
    assert isinstance(cell.skip, nn.Sequential)
    conv = cell.skip[1]
    assert isinstance(conv, nn.Conv2d)
    return Pointwise.of(fold.convolution(conv), backends)


def _run_skip(x: Tensor, skip: Pointwise | Conv | None, backends: OpBackends) -> Tensor:
    if skip is None:
        return x
    if isinstance(skip, Conv):
        return F.conv2d(F.silu(x), skip.weight, skip.bias, stride=2)
    return bilinear_upsample(skip(x, backends), backend=backends["bilinear_upsample"])


def _fold_se(cell: Cell) -> SqueezeExcite | None:
    """The gate's layers for a branch that already includes the cell's factor 0.1."""
    if not isinstance(cell.se, SE):
        return None
    first, _, second, _ = cell.se.se
    assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
    return SqueezeExcite(first.weight / RESIDUAL_SCALE, first.bias, second.weight, second.bias)
