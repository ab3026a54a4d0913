"""The energy from the last convolution's output (activation, spatial sum, linear layer) and its gradient.

The activated tensor is never written: forward is one reduction; backward is one pass from one number per image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_energy_terms, check_tensor, choose_for, refuse_weight_gradients


def energy_head(
    y: Tensor,
    skip: Tensor | None,
    skip_scale: float,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """E[n] = bias + sum_chw weight[c] t sigmoid(t), t = y + shift + skip_scale * skip; shift and skip are optional.

    y, skip: [N, C, H, W], best in channels_last (other layouts are copied); shift: [C], the bias of the preceding
    convolution; all share one floating dtype. weight [C], bias [1] and E [N] are at least float32, because the sum
    cancels. The order of summation is fixed.
    Moves 8 bytes per element of y, 4 without a skip. Saves y and skip.
    Differentiable once, in y and skip.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(y, skip, shift, weight)
    check_tensor("bias", bias, (1,), y.device, weight.dtype)
    refuse_weight_gradients("energy_head", weight, bias)
    chosen = choose_for("energy_head", backend, y)
    if chosen == "reference":
        return reference.energy_head(y, skip, skip_scale, shift, weight, bias)
    energy: Tensor = _register.ops_of(chosen).energy_head(y, skip, skip_scale, shift, weight, bias)
    return energy


def energy_head_backward(
    denergy: Tensor,
    y: Tensor,
    skip: Tensor | None,
    skip_scale: float,
    shift: Tensor | None,
    weight: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """dt[n, c] = denergy[n] weight[c] swish'(t): the gradient for y; that for skip is skip_scale * dt.

    denergy: [N], dtype of weight; other arguments and errors as in `energy_head`. Returns dt [N, C, H, W],
    channels_last, dtype of y.
    Moves 12 bytes per element, 8 without a skip.
    """
    _check(y, skip, shift, weight)
    check_tensor("denergy", denergy, (y.shape[0],), y.device, weight.dtype)
    chosen = choose_for("energy_head_backward", backend, y)
    if chosen == "reference":
        return reference.energy_head_backward(denergy, y, skip, skip_scale, shift, weight)
    dt: Tensor = _register.ops_of(chosen).energy_head_backward(denergy, y, skip, skip_scale, shift, weight)
    return dt


def _check(y: Tensor, skip: Tensor | None, shift: Tensor | None, weight: Tensor) -> None:
    check_energy_terms("energy_head", y, skip, shift)
    check_tensor("weight", weight, (y.shape[1],), y.device, torch.promote_types(y.dtype, torch.float32))


_register.define(
    "energy_head(Tensor y, Tensor? skip, float skip_scale, Tensor? shift, Tensor weight, Tensor bias) -> Tensor",
    lambda y, skip, skip_scale, shift, weight, bias: weight.new_empty(y.shape[0]),
)
_register.define(
    "energy_head_backward(Tensor denergy, Tensor y, Tensor? skip, float skip_scale, Tensor? shift, Tensor weight) "
    "-> Tensor",
    lambda denergy, y, *_: _register.like(y),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, skip, ctx.skip_scale, shift, weight, _ = inputs
    ctx.save_for_backward(y, skip, shift, weight)


def _backward(ops: Any, ctx: Any, denergy: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[3:]):
        raise RuntimeError("energy_head has no gradient for shift, weight and bias; detach them.")
    y, skip, shift, weight = ctx.saved_tensors
    dt = ops.energy_head_backward(denergy, y, skip, ctx.skip_scale, shift, weight)
    dskip = None
    if ctx.needs_input_grad[1]:
        dskip = dt if ctx.skip_scale == 1.0 else dt * ctx.skip_scale
    return dt, dskip, None, None, None, None


_register.register_gradient("energy_head", save=_save, backward=_backward)
