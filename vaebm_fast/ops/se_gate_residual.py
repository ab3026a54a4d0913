"""The end of a squeeze-and-excitation residual cell, skip + gate(s) s, and its gradient for the branch s.

The gate's weights are frozen: they have no gradient here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import (
    check_image,
    check_tensor,
    choose_for,
    refuse_weight_gradients,
)


def se_gate_residual(
    s: Tensor,
    skip: Tensor,
    weight_in: Tensor,
    bias_in: Tensor,
    weight_out: Tensor,
    bias_out: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """y = skip + gate s, gate = sigmoid(W_out hidden + b_out) [N, C], hidden = relu(W_in mean_hw(s) + b_in).

    s, skip: [N, C, H, W], best in channels_last (other layouts are copied). weight_in: [hidden, C]. bias_in: [hidden].
    weight_out: [C, hidden]. bias_out: [C]. All share one floating dtype.
    Returns y [N, C, H, W], channels_last.
    Moves 12 bytes per element, 4 more if an image's s leaves the cache between its mean and its gate.
    Differentiable once, in s and skip: saves s, hidden and gate; the gradient for skip is dy.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(s, weight_in, weight_out)
    check_tensor("skip", skip, s.shape, s.device, s.dtype)
    check_tensor("bias_in", bias_in, weight_in.shape[:1], s.device, s.dtype)
    check_tensor("bias_out", bias_out, s.shape[1:2], s.device, s.dtype)
    refuse_weight_gradients("se_gate_residual", weight_in, bias_in, weight_out, bias_out)
    chosen = choose_for("se_gate_residual", backend, s)
    if chosen == "reference":
        return reference.se_gate_residual(s, skip, weight_in, bias_in, weight_out, bias_out)
    y: Tensor = _register.ops_of(chosen).se_gate_residual(s, skip, weight_in, bias_in, weight_out, bias_out)[0]
    return y


def se_gate_residual_backward(
    dy: Tensor,
    s: Tensor,
    hidden: Tensor,
    gate: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """ds = gate dy + W_in^T d_hidden / (H W): the gradient for s of `se_gate_residual`.

    d_hidden = [hidden > 0] W_out^T (gate (1 - gate) sum_hw(dy s)). dy: [N, C, H, W]; hidden: [N, hidden] and gate:
    [N, C] from the forward; other arguments and errors as there. Returns ds [N, C, H, W], channels_last.
    Moves 12 bytes per element, 4 more if an image's dy leaves the cache.
    """
    _check(s, weight_in, weight_out)
    check_tensor("dy", dy, s.shape, s.device, s.dtype)
    check_tensor("hidden", hidden, (s.shape[0], weight_in.shape[0]), s.device, s.dtype)
    check_tensor("gate", gate, s.shape[:2], s.device, s.dtype)
    chosen = choose_for("se_gate_residual_backward", backend, s)
    if chosen == "reference":
        return reference.se_gate_residual_backward(dy, s, hidden, gate, weight_in, weight_out)
    ds: Tensor = _register.ops_of(chosen).se_gate_residual_backward(dy, s, hidden, gate, weight_in, weight_out)
    return ds


def _check(s: Tensor, weight_in: Tensor, weight_out: Tensor) -> None:
    check_image("s", s)
    if weight_in.dim() != 2:
        raise ValueError(f"weight_in must be [hidden, C]; it is {list(weight_in.shape)}.")
    check_tensor("weight_in", weight_in, (weight_in.shape[0], s.shape[1]), s.device, s.dtype)
    check_tensor("weight_out", weight_out, (s.shape[1], weight_in.shape[0]), s.device, s.dtype)


_register.define(
    "se_gate_residual(Tensor s, Tensor skip, Tensor weight_in, Tensor bias_in, Tensor weight_out, Tensor bias_out) "
    "-> (Tensor y, Tensor hidden, Tensor gate)",
    lambda s, skip, weight_in, *_: (
        _register.like(s),
        s.new_empty((s.shape[0], weight_in.shape[0])),
        s.new_empty(s.shape[:2]),
    ),
)
_register.define(
    "se_gate_residual_backward(Tensor dy, Tensor s, Tensor hidden, Tensor gate, Tensor weight_in, Tensor weight_out) "
    "-> Tensor",
    lambda dy, s, *_: _register.like(s),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    s, _, weight_in, _, weight_out, _ = inputs
    _, hidden, gate = output
    ctx.mark_non_differentiable(hidden, gate)
    ctx.set_materialize_grads(False)  # otherwise two launches fill gradients of zeros for them
    ctx.save_for_backward(s, hidden, gate, weight_in, weight_out)


def _backward(ops: Any, ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:]):
        raise RuntimeError("se_gate_residual has no gradient for its weights; detach them.")
    ds = ops.se_gate_residual_backward(dy, *ctx.saved_tensors)
    return ds, dy, None, None, None, None


_register.register_gradient("se_gate_residual", save=_save, backward=_backward)
