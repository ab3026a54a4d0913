"""energy_epilogue and its backward: element by element over NHWC memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vaebm_fast.triton_kernels.activation import nhwc, swish, swish_slope

BLOCK = 1024  # with 4 warps, 16 bytes of bfloat16 per thread


@triton.jit
def epilogue_kernel(y, skip, shift, du, result, numel, skip_scale, C: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: one program per BLOCK elements. result = swish(t), or du swish'(t) if du is given.

    t = y + shift + skip_scale skip. C is a compile-time constant, so finding an element's channel needs no division.
    """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < numel
    t = tl.load(y + e, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        t += tl.load(shift + e % C, mask=inside, other=0.0).to(tl.float32)
    if skip is not None:
        t += skip_scale * tl.load(skip + e, mask=inside, other=0.0).to(tl.float32)
    value = swish(t)
    if du is not None:
        value = swish_slope(t) * tl.load(du + e, mask=inside, other=0.0).to(tl.float32)
    tl.store(result + e, value.to(result.dtype.element_ty), mask=inside)


def _launch(y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, du: Tensor | None) -> Tensor:
    result = torch.empty_like(y, memory_format=torch.channels_last)
    if result.numel() > 0:
        grid = (triton.cdiv(y.numel(), BLOCK),)
        skip, du = (None if other is None else nhwc(other) for other in (skip, du))
        shift = None if shift is None else shift.contiguous()
        epilogue_kernel[grid](
            nhwc(y), skip, shift, du, result, y.numel(), float(skip_scale), C=y.shape[1], BLOCK=BLOCK, num_warps=4
        )
    return result


def energy_epilogue(y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None) -> Tensor:
    """u of `vaebm_fast.ops.energy_epilogue.energy_epilogue`, channels_last."""
    return _launch(y, skip, skip_scale, shift, None)


def energy_epilogue_backward(
    du: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None
) -> Tensor:
    """dt of `vaebm_fast.ops.energy_epilogue.energy_epilogue_backward`, channels_last."""
    return _launch(y, skip, skip_scale, shift, du)
