"""energy_epilogue and its backward: element by element over NHWC memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, swish, swish_slope

BLOCK = 1024  # with 4 warps 16 bytes of bfloat16 for each thread


@triton.jit
def epilogue_kernel(y, skip, du, result, numel, skip_scale, BLOCK: tl.constexpr):
    """Grid: BLOCK elements each. result = swish(t), or du swish'(t) where there is a du; t = y + skip_scale skip."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    t = tl.load(y + e, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        t += skip_scale * tl.load(skip + e, mask=inside, other=0.0).to(tl.float32)
    value = swish(t)
    if du is not None:
        value = swish_slope(t) * tl.load(du + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + e, value.to(result.dtype.element_ty), mask=inside)


def _launch(y: Tensor, skip: Tensor | None, du: Tensor | None, skip_scale: float) -> Tensor:
    result = torch.empty_like(y, memory_format=torch.channels_last)
    if result.numel() > 0:
        grid = (triton.cdiv(y.numel(), BLOCK),)
        others = [None if other is None else nhwc(other) for other in (skip, du)]
        epilogue_kernel[grid](nhwc(y), *others, result, y.numel(), float(skip_scale), BLOCK=BLOCK, num_warps=4)
    return result


def energy_epilogue(y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    """u of `vaebm_fast.ops.energy_epilogue.energy_epilogue`, channels_last."""
    return _launch(y, skip, None, skip_scale)


def energy_epilogue_backward(du: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    """dt of `vaebm_fast.ops.energy_epilogue.energy_epilogue_backward`, channels_last."""
    return _launch(y, skip, du, skip_scale)
