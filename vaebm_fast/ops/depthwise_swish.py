"""Depthwise convolution of a swish, the middle of an inverted residual, and its gradient for the input.

Weight and bias are frozen: they have no gradient here. `vaebm_fast.frozen` folds batch norm into them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import choose_for


def pack_depthwise(weight: Tensor) -> Tensor:
    """Copy the weight [C, 1, K, K] of a depthwise `Conv2d` into the contiguous [K, K, C] that the ops below take.

    Raises ValueError for any other shape.
    """
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"A depthwise weight is [C, 1, K, K]; this one is {list(weight.shape)}.")
    return weight[:, 0].permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def depthwise_swish(
    h: Tensor, weight: Tensor, bias: Tensor, *, upsample: bool = False, backend: Backend = "auto"
) -> Tensor:
    """y[n, c, i, j] = bias[c] + sum_{k, l} weight[k, l, c] s[n, c, i + k - K//2, j + l - K//2], s = h sigmoid(h).

    s is zero outside the image. `upsample` first enlarges s to [N, C, 2H, 2W] by nearest neighbour.
    h: [N, C, H, W], best in channels_last (other layouts are copied). weight: [K, K, C], K odd, from `pack_depthwise`.
    bias: [C]. Returns [N, C, H, W], or [N, C, 2H, 2W] with `upsample`, channels_last.
    All share one floating dtype that the backend stores (`_backend.DTYPES`); compiled backends compute in float32.
    Moves each element of h and y once; 2 K^2 FLOP per element of y, with `upsample` 2 ((K + 1) / 2)^2, because taps
    that fall on the same source pixel are summed first.
    Differentiable once, in h only: saves h and recomputes its sigmoid.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(h, weight)
    _check_like(h, bias=bias)
    if bias.shape != h.shape[1:2]:
        raise ValueError(f"bias must be [C] with the C = {h.shape[1]} of h; it is {list(bias.shape)}.")
    if torch.is_grad_enabled() and (weight.requires_grad or bias.requires_grad):
        raise ValueError("depthwise_swish has no gradient for weight and bias; give it weight.detach(), bias.detach().")
    chosen = choose_for("depthwise_swish", backend, h)
    if chosen == "reference":
        return reference.depthwise_swish(h, weight, bias, upsample=upsample)
    y: Tensor = _register.ops_of(chosen).depthwise_swish(h, weight, bias, upsample)
    return y


def depthwise_swish_backward(
    dy: Tensor, h: Tensor, weight: Tensor, *, upsample: bool = False, backend: Backend = "auto"
) -> Tensor:
    """dh = swish'(h) ds with ds[a, b] = sum_{k, l} weight[k, l] dy[a + K//2 - k, b + K//2 - l], dy zero outside.

    The vector-Jacobian product of `depthwise_swish`; swish' = s (1 + h (1 - s)), s = sigmoid(h). With `upsample`, ds is
    summed over the 2x2 pixels made from one. dy: shape of the output; arguments, FLOP and errors as there.
    Returns dh, channels_last. Moves each element of dy, h and dh once.
    """
    _check(h, weight)
    _check_like(h, dy=dy)
    scale = 2 if upsample else 1
    expected = [h.shape[0], h.shape[1], scale * h.shape[2], scale * h.shape[3]]
    if list(dy.shape) != expected:
        raise ValueError(f"dy must have the shape of the output, {expected}; it is {list(dy.shape)}.")
    chosen = choose_for("depthwise_swish_backward", backend, h)
    if chosen == "reference":
        return reference.depthwise_swish_backward(dy, h, weight, upsample=upsample)
    dh: Tensor = _register.ops_of(chosen).depthwise_swish_backward(dy, h, weight, upsample)
    return dh


def _check(h: Tensor, weight: Tensor) -> None:
    if h.dim() != 4 or not h.is_floating_point():
        raise ValueError(f"h must be floating point [N, C, H, W]; it is {h.dtype} {list(h.shape)}.")
    _check_like(h, weight=weight)
    if weight.dim() != 3 or weight.shape[2] != h.shape[1]:
        raise ValueError(
            f"weight must be [K, K, C] with the C = {h.shape[1]} of h, as pack_depthwise makes it; "
            f"it is {list(weight.shape)}."
        )
    if weight.shape[0] != weight.shape[1] or weight.shape[0] % 2 == 0:
        raise ValueError(f"The window is {weight.shape[0]}x{weight.shape[1]}; it must be square and odd.")


def _check_like(h: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.device != h.device:
            raise ValueError(f"{name} is on {other.device} but h is on {h.device}; move it there.")
        if other.dtype != h.dtype:
            raise ValueError(f"{name} is {other.dtype} but h is {h.dtype}; convert one of them.")


def _fake(h: Tensor, *others: Any) -> Tensor:
    (N, C, H, W), (*_, upsample) = h.shape, others
    scale = 2 if upsample else 1
    return _register.like(h, N, C, scale * H, scale * W)


_register.define("depthwise_swish(Tensor h, Tensor weight, Tensor bias, bool upsample) -> Tensor", _fake)
_register.define(
    "depthwise_swish_backward(Tensor dy, Tensor h, Tensor weight, bool upsample) -> Tensor",
    lambda dy, h, *_: _register.like(h),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, _, ctx.upsample = inputs
    ctx.save_for_backward(h, weight)


def _backward(ops: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise RuntimeError("depthwise_swish has no gradient for weight and bias; detach them.")
    h, weight = ctx.saved_tensors
    return ops.depthwise_swish_backward(dy, h, weight, ctx.upsample), None, None, None


_register.register_gradient("depthwise_swish", save=_save, backward=_backward)
