"""The rest of an inverted residual after its expansion (depthwise, projection, gate, skip) and its gradient.

Fusing them shares intermediate results: the projection's blocks give the gate its mean, the projection's gradient forms
ds from dy, and the depthwise gives the projection swish(h2). The weights are frozen: they have no gradient here.
Backends without this op run `depthwise_swish`, `pointwise` and `se_gate_residual`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_image, check_tensor, choose_for, refuse_weight_gradients


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
    *,
    upsample: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """y = skip + gate(s) s, s = W2 swish(h2) + b2, h2 = Wd * swish(h) + bd; the gate of `se_gate_residual`.

    h: [N, hidden, H, W], the expansion's output; swish(h) is zero outside the image and enlarged to [2H, 2W] with
    `upsample`, as in `depthwise_swish`. skip: [N, C, H, W], or [N, C, 2H, 2W]. depthwise_weight Wd: [K, K, hidden], K
    odd, from `pack_depthwise`; depthwise_bias bd: [hidden]. project_weight W2: [C, hidden], plain; project_bias b2:
    [C]. Gate weights as in `se_gate_residual`. All share one floating dtype that the backend stores; sums are float32.
    Returns y, shape of skip, channels_last.
    FLOP per pixel of y: 2 K^2 hidden (with `upsample` 2 ((K + 1) / 2)^2 hidden) + 2 C hidden. Moves each element of h,
    skip and y once, of s twice (three times if it has left the cache), of h2 twice (three times if swish(h2) is stored
    too).
    Differentiable once, in h and skip: saves h, h2, s and the gate; the gradient for skip is dy.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(h, depthwise_weight, project_weight, weight_in, weight_out)
    hidden, C = h.shape[1], project_weight.shape[0]
    _check_result("skip", skip, h, C, upsample)
    biases = {"depthwise_bias": (depthwise_bias, hidden), "project_bias": (project_bias, C)}
    biases |= {"bias_in": (bias_in, weight_in.shape[0]), "bias_out": (bias_out, C)}
    for name, (bias, size) in biases.items():
        check_tensor(name, bias, (size,), h.device, h.dtype)
    weights = (depthwise_weight, depthwise_bias, project_weight, project_bias, weight_in, bias_in, weight_out, bias_out)
    refuse_weight_gradients("residual_tail", *weights)
    if choose_for("residual_tail", backend, h) == "reference":
        return reference.residual_tail(h, skip, *weights, upsample=upsample)
    y: Tensor = torch.ops.vaebm_triton.residual_tail(h, skip, *weights, upsample)[0]
    return y


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
    *,
    upsample: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """dh = swish'(h) (Wd' * [swish'(h2) W2' ds]), ds of `se_gate_residual_backward`: the gradient for h.

    dy, s: shape of y; h2 [N, hidden, H, W] (or [2H, 2W]), hidden [N, squeezed] and gate [N, C] from the forward; other
    arguments and errors as there. Returns dh, shape of h, channels_last.
    FLOP as there. Moves each element of dy twice, of s, h, h2 and dh once, and of the gradient for h2 twice.
    """
    _check(h, depthwise_weight, project_weight, weight_in, weight_out)
    C = project_weight.shape[0]
    for name, x, channels in (("dy", dy, C), ("s", s, C), ("h2", h2, h.shape[1])):
        _check_result(name, x, h, channels, upsample)
    check_tensor("hidden", hidden, (h.shape[0], weight_in.shape[0]), h.device, h.dtype)
    check_tensor("gate", gate, (h.shape[0], C), h.device, h.dtype)
    given = (dy, h, h2, s, hidden, gate, depthwise_weight, project_weight, weight_in, weight_out)
    if choose_for("residual_tail_backward", backend, h) == "reference":
        return reference.residual_tail_backward(*given, upsample=upsample)
    dh: Tensor = torch.ops.vaebm_triton.residual_tail_backward(*given, upsample)
    return dh


def _check(h: Tensor, depthwise_weight: Tensor, project_weight: Tensor, weight_in: Tensor, weight_out: Tensor) -> None:
    check_image("h", h)
    if project_weight.dim() != 2:
        raise ValueError(f"project_weight must be [C, hidden]; it is {list(project_weight.shape)}.")
    if weight_in.dim() != 2:
        raise ValueError(f"weight_in must be [squeezed, C]; it is {list(weight_in.shape)}.")
    hidden, C, K = h.shape[1], project_weight.shape[0], depthwise_weight.shape[0] if depthwise_weight.dim() else 0
    check_tensor("depthwise_weight", depthwise_weight, (K, K, hidden), h.device, h.dtype)
    if K % 2 == 0:
        raise ValueError(f"The window is {K}x{K}; it must be odd.")
    check_tensor("project_weight", project_weight, (C, hidden), h.device, h.dtype)
    check_tensor("weight_in", weight_in, (weight_in.shape[0], C), h.device, h.dtype)
    check_tensor("weight_out", weight_out, (C, weight_in.shape[0]), h.device, h.dtype)


def _check_result(name: str, x: Tensor, h: Tensor, channels: int, upsample: bool) -> None:
    """Check that x is [N, channels, ...] with the height and width of y."""
    scale = 2 if upsample else 1
    check_tensor(name, x, (h.shape[0], channels, scale * h.shape[2], scale * h.shape[3]), h.device, h.dtype)


def _fake(h: Tensor, skip: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (N, C, H, W), weight_in = skip.shape, others[4]
    h2, hidden = _register.like(h, N, h.shape[1], H, W), h.new_empty((N, weight_in.shape[0]))
    return _register.like(skip), h2, _register.like(skip), hidden, h.new_empty((N, C))


_register.define(
    "residual_tail(Tensor h, Tensor skip, Tensor depthwise_weight, Tensor depthwise_bias, Tensor project_weight, "
    "Tensor project_bias, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out, bool upsample) "
    "-> (Tensor y, Tensor h2, Tensor s, Tensor hidden, Tensor gate)",
    _fake,
)
_register.define(
    "residual_tail_backward(Tensor dy, Tensor h, Tensor h2, Tensor s, Tensor hidden, Tensor gate, "
    "Tensor depthwise_weight, Tensor project_weight, Tensor weight_in, Tensor weight_out, bool upsample) -> Tensor",
    lambda dy, h, *_: _register.like(h),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    h, _, depthwise_weight, _, project_weight, _, weight_in, _, weight_out, _, ctx.upsample = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros, for h2 as large as the hidden tensor
    ctx.save_for_backward(h, *output[1:], depthwise_weight, project_weight, weight_in, weight_out)


def _backward(ops: Any, ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:]):
        raise RuntimeError("residual_tail has no gradient for its weights; detach them.")
    dh = ops.residual_tail_backward(dy, *ctx.saved_tensors, ctx.upsample) if ctx.needs_input_grad[0] else None
    return dh, dy, *(None,) * 9


_register.register_gradient("residual_tail", save=_save, backward=_backward)
