"""residual_tail and its backward: four launches each, using the kernels of the three ops it fuses.

Fusing saves three things: the projection's blocks give the sums of s; the projection's gradient forms ds as it reads dy
and never stores it; and swish(h2) can be computed once instead of once per block of the projection's channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc
from vaebm_fast.triton_kernels.depthwise_swish import depthwise_activated, depthwise_swish_backward
from vaebm_fast.triton_kernels.pointwise import config_of, precision_of, product
from vaebm_fast.triton_kernels.se_gate_residual import apply, gate_of, shift_of, sums_of

# Whether the depthwise also stores swish(h2) for the projection to read. Key: the largest C of the cell,
# `precision_of`. The bits of the results are the same either way.
STORES_ACTIVATED: dict[tuple[int, str], bool] = {
    # tune_triton: begin STORES_ACTIVATED
    # Not timed yet: chosen by counting.
    (128, "half"): False,
    (256, "half"): False,
    (512, "half"): True,
    (1024, "half"): True,
    (128, "tf32"): False,
    (256, "tf32"): False,
    (512, "tf32"): True,
    (1024, "tf32"): True,
    (128, "ieee"): False,
    (256, "ieee"): True,
    (512, "ieee"): True,
    (1024, "ieee"): True,
    # tune_triton: end STORES_ACTIVATED
}


def stores_activated(C: int, dtype: torch.dtype) -> bool:
    """The table's entry for a cell of C channels; wider cells use the last entry."""
    widths = sorted({width for width, _ in STORES_ACTIVATED})
    return STORES_ACTIVATED[next((width for width in widths if width >= C), widths[-1]), precision_of(dtype)]


def residual_tail(
    h: Tensor,
    skip: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    upsample: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y of `vaebm_fast.ops.residual_tail.residual_tail`; also h2, s, hidden and gate for the backward."""
    stores = stores_activated(project_weight.shape[0], h.dtype)
    h2, activated = depthwise_activated(h, depthwise_weight, depthwise_bias, upsample, stores)
    read = h2 if activated is None else activated
    activation = "none" if stores else "swish"
    s, sums = product(read, project_weight, project_bias.contiguous(), activation=activation, with_sums=True)
    assert sums is not None
    weights = (weight_in, bias_in, weight_out, bias_out)
    hidden, gate = gate_of(sums, s.shape[2] * s.shape[3], weights, s.dtype)
    return apply(s, gate, nhwc(skip), None), h2, s, hidden, gate


def residual_tail_backward(
    dy: Tensor,
    h: Tensor,
    h2: Tensor,
    s: Tensor,
    hidden: Tensor,
    gate: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    upsample: bool,
) -> Tensor:
    """dh of `vaebm_fast.ops.residual_tail.residual_tail_backward`, channels_last."""
    if h.numel() == 0:
        return torch.empty_like(h, memory_format=torch.channels_last)
    dy, gate, pixels = nhwc(dy), gate.contiguous(), s.shape[2] * s.shape[3]
    shift = shift_of(sums_of(nhwc(s), dy), pixels, hidden, gate, weight_in, weight_out)
    if pixels >= config_of(dy, h.shape[1]).BLOCK_M:
        dh2, _ = product(dy, project_weight.T, slope_of=h2, activation="swish", gate=(gate, shift))
    else:  # blocks within one image would be so small that rereading the weight costs more than storing ds
        ds = apply(dy, gate, None, shift)
        dh2, _ = product(ds, project_weight.T, slope_of=h2, activation="swish")
    return depthwise_swish_backward(dh2, h, depthwise_weight, upsample)
