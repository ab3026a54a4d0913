"""What follows a convolution of the energy network, swish(y + skip_scale * skip), and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _triton
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_image, check_tensor, choose_for


def energy_epilogue(
    y: Tensor, skip: Tensor | None = None, skip_scale: float = 1.0, *, backend: Backend = "auto"
) -> Tensor:
    """u = t sigmoid(t) with t = y + skip_scale * skip, or t = y without a skip.

    y, skip: [N, C, H, W] of one floating dtype, best in channels_last (others are copied into it). Returns u
    [N, C, H, W], channels_last.
    Moves 12 bytes per element, 8 without a skip. Saves y and skip instead of t: 4 bytes less than to write t here,
    4 more to read it again backward.
    Differentiable once, in y and skip.
    Raises ValueError for arguments that do not fit, RuntimeError for a backend that is missing.
    """
    _check(y, skip)
    chosen = choose_for("energy_epilogue", backend, y)
    if chosen == "reference":
        return reference.energy_epilogue(y, skip, skip_scale)
    u: Tensor = _triton.ops_of(chosen).energy_epilogue(y, skip, skip_scale)
    return u


def energy_epilogue_backward(
    du: Tensor, y: Tensor, skip: Tensor | None = None, skip_scale: float = 1.0, *, backend: Backend = "auto"
) -> Tensor:
    """dt = du swish'(t), swish' = s (1 + t (1 - s)) with s = sigmoid(t): the gradient for y; for skip, skip_scale * dt.

    du: [N, C, H, W]; other arguments and errors as in `energy_epilogue`. Returns dt [N, C, H, W], channels_last.
    Moves 16 bytes per element, 12 without a skip.
    """
    _check(y, skip)
    check_tensor("du", du, y.shape, y.device, y.dtype)
    chosen = choose_for("energy_epilogue_backward", backend, y)
    if chosen == "reference":
        return reference.energy_epilogue_backward(du, y, skip, skip_scale)
    dt: Tensor = _triton.ops_of(chosen).energy_epilogue_backward(du, y, skip, skip_scale)
    return dt


def _check(y: Tensor, skip: Tensor | None) -> None:
    check_image("y", y)
    if skip is not None:
        check_tensor("skip", skip, y.shape, y.device, y.dtype)


_triton.define(
    "energy_epilogue",
    "(Tensor y, Tensor? skip, float skip_scale) -> Tensor",
    "(Tensor du, Tensor y, Tensor? skip, float skip_scale) -> Tensor",
)


def _fake(y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _fake_backward(du: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    return torch.empty_like(y, memory_format=torch.channels_last)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    y, skip, ctx.skip_scale = inputs
    ctx.save_for_backward(y, skip)


def _backward(ops: Any, ctx: Any, du: Tensor) -> tuple[Tensor, Tensor | None, None]:
    y, skip = ctx.saved_tensors
    dt = ops.energy_epilogue_backward(du, y, skip, ctx.skip_scale)
    if not ctx.needs_input_grad[1]:
        return dt, None, None
    return dt, dt if ctx.skip_scale == 1.0 else dt * ctx.skip_scale, None


_triton.register("energy_epilogue", fake=_fake, fake_backward=_fake_backward, save=_save, backward=_backward)
