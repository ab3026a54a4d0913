"""Epilogue of the energy network's convolutions, swish(y + shift + skip_scale * skip), and its gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_energy_terms, check_tensor, choose_for


def energy_epilogue(
    y: Tensor,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
    shift: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """u = t sigmoid(t) with t = y + shift + skip_scale * skip; an omitted shift or skip adds nothing.

    y, skip: [N, C, H, W], best in channels_last (other layouts are copied); shift: [C], the bias of the preceding
    convolution, which would cost an extra pass there on a GPU and is free here. All share one floating dtype.
    Returns u [N, C, H, W], channels_last.
    Moves 12 bytes per element, 8 without a skip. Saves y and skip instead of t: this writes 4 bytes less here and
    reads 4 more in the backward.
    Differentiable once, in y and skip.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    check_energy_terms("energy_epilogue", y, skip, shift)
    chosen = choose_for("energy_epilogue", backend, y)
    if chosen == "reference":
        return reference.energy_epilogue(y, skip, skip_scale, shift)
    u: Tensor = _register.ops_of(chosen).energy_epilogue(y, skip, skip_scale, shift)
    return u


def energy_epilogue_backward(
    du: Tensor,
    y: Tensor,
    skip: Tensor | None = None,
    skip_scale: float = 1.0,
    shift: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """dt = du swish'(t), swish' = s (1 + t (1 - s)), s = sigmoid(t): the gradient for y; that for skip: skip_scale dt.

    du: [N, C, H, W]; other arguments and errors as in `energy_epilogue`. Returns dt [N, C, H, W], channels_last.
    Moves 16 bytes per element, 12 without a skip.
    """
    check_energy_terms("energy_epilogue", y, skip, shift)
    check_tensor("du", du, y.shape, y.device, y.dtype)
    chosen = choose_for("energy_epilogue_backward", backend, y)
    if chosen == "reference":
        return reference.energy_epilogue_backward(du, y, skip, skip_scale, shift)
    dt: Tensor = _register.ops_of(chosen).energy_epilogue_backward(du, y, skip, skip_scale, shift)
    return dt


_register.define(
    "energy_epilogue(Tensor y, Tensor? skip, float skip_scale, Tensor? shift) -> Tensor",
    lambda y, *_: _register.like(y),
)
_register.define(
    "energy_epilogue_backward(Tensor du, Tensor y, Tensor? skip, float skip_scale, Tensor? shift) -> Tensor",
    lambda du, y, *_: _register.like(y),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, skip, ctx.skip_scale, shift = inputs
    ctx.save_for_backward(y, skip, shift)


def _backward(ops: Any, ctx: Any, du: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[3]:
        raise RuntimeError("energy_epilogue has no gradient for shift; detach it.")
    y, skip, shift = ctx.saved_tensors
    dt = ops.energy_epilogue_backward(du, y, skip, ctx.skip_scale, shift)
    dskip = None
    if ctx.needs_input_grad[1]:
        dskip = dt if ctx.skip_scale == 1.0 else dt * ctx.skip_scale
    return dt, dskip, None, None


_register.register_gradient("energy_epilogue", save=_save, backward=_backward)
