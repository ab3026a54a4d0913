"""Pointwise (1x1) convolution with fused activation, bias and residual, and its gradient for the input.

Weights and bias are frozen: they have no gradient here.
"""

from __future__ import annotations

from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
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
from vaebm_fast.reference import Activation

PANEL = 16  # contiguous output channels in the C++ layout


class PointwiseWeight(NamedTuple):
    """The weight of a 1x1 convolution in a backend's layout; made by `pack_pointwise`.

    Plain, for every backend but cpp: `forward` is [Cout, Cin], `backward` is None. cpp: zero-padded panels of 16 output
    channels, `forward` [ceil(Cout / 16), Cin, 16] and, for the transpose, `backward` [ceil(Cin / 16), Cout, 16].
    """

    forward: Tensor
    backward: Tensor | None

    @property
    def transposed(self) -> Tensor:
        """The weight of the backward product: `backward`, or the plain weight as a [Cin, Cout] view."""
        return self.forward.T if self.backward is None else self.backward

    @property
    def shape(self) -> tuple[int, int]:
        """(Cout, Cin)."""
        if self.backward is None:
            return (self.forward.shape[0], self.forward.shape[1])
        return (self.backward.shape[1], self.forward.shape[1])


def pack_pointwise(weight: Tensor, backend: Backend) -> PointwiseWeight:
    """The weight [Cout, Cin] or [Cout, Cin, 1, 1] in the layout of `backend`; "auto" means plain.

    Raises ValueError for any other shape.
    """
    if weight.dim() not in (2, 4) or weight.shape[2:] not in ((), (1, 1)):
        raise ValueError(f"A pointwise weight is [Cout, Cin] or [Cout, Cin, 1, 1]; this one is {list(weight.shape)}.")
    weight = weight.flatten(1)
    if backend != "cpp":
        return PointwiseWeight(weight, None)
    return PointwiseWeight(_panels(weight), _panels(weight.T))


def _panels(weight: Tensor) -> Tensor:
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pointwise(
    x: Tensor,
    weight: PointwiseWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: Activation = "none",
    backend: Backend = "auto",
) -> Tensor:
    """y[n, :, i, j] = W f(x[n, :, i, j]) + bias + residual[n, :, i, j]; f: "swish", "elu", or "none", the identity.

    x: [N, Cin, H, W], best in channels_last (other layouts are copied). weight: from `pack_pointwise`, in the layout of
    the backend; "auto" follows the layout. bias: [Cout]. residual: [N, Cout, H, W]. All share one floating dtype
    that the backend stores; it computes in float32. Returns [N, Cout, H, W], channels_last.
    2 Cin Cout FLOP per pixel; moves each element of x, residual, y and the weight once.
    Differentiable once (reference: any number of times), in x and the residual; saves x if it is activated.
    Triton multiplies float32 as TF32, rounded to nearest, if `torch.set_float32_matmul_precision` or
    `torch.backends.cuda.matmul.fp32_precision` allows it. cuda is one cuBLAS product over all pixels, with the bias in
    its epilogue; an activation is a separate pass.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(x, weight, bias, residual)
    _check_activation(activation)
    chosen = _choose("pointwise", x, weight, backend)
    if chosen == "reference":
        return reference.pointwise(x, weight.forward, bias, residual, activation=activation)
    if chosen == "cuda":
        return _by_cublas(x, weight.forward, bias, residual, activation)
    op = _register.ops_of(chosen).pointwise
    y: Tensor = op(x, weight.forward, weight.transposed, bias, residual, activation)
    return y


def pointwise_backward(
    dy: Tensor,
    weight: PointwiseWeight,
    x: Tensor | None = None,
    *,
    activation: Activation = "none",
    backend: Backend = "auto",
) -> Tensor:
    """dx[n, :, i, j] = W' dy[n, :, i, j], times f'(x[n, :, i, j]): the gradient of `pointwise` for x.

    dy: [N, Cout, H, W]; x: [N, Cin, H, W], the input before its activation, None without one. elu' = 1 for x > 0,
    otherwise exp(x). Arguments, FLOP and errors as there. Returns [N, Cin, H, W], channels_last.
    """
    Cout, Cin = weight.shape
    check_image("dy", dy)
    if dy.shape[1] != Cout:
        raise ValueError(f"dy has {dy.shape[1]} channels; this weight gives {Cout}.")
    check_tensor("weight", weight.forward, weight.forward.shape, dy.device, dy.dtype)
    _check_activation(activation)
    if (x is None) != (activation == "none"):
        raise ValueError(
            f"activation is {activation!r} and x is {'not ' if x is None else ''}given; x is the input before its "
            "activation: pass it for swish and elu only."
        )
    if x is not None:
        check_tensor("x", x, [dy.shape[0], Cin, *dy.shape[2:]], dy.device, dy.dtype)
    chosen = _choose("pointwise_backward", dy, weight, backend)
    if chosen == "reference":
        return reference.pointwise_backward(dy, weight.forward, x, activation=activation)
    if chosen == "cuda":
        dx_of_rows = _image(_rows(dy) @ weight.forward, dy)
        return dx_of_rows if x is None else dx_of_rows * reference.activation_slope(x, activation)
    dx: Tensor = _register.ops_of(chosen).pointwise_backward(dy, weight.transposed, Cin, x, activation)
    return dx


def _by_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor:
    """One matrix product over all pixels; PyTorch differentiates it."""
    rows = _rows(reference.activated(x, activation))
    if residual is None:
        return _image(F.linear(rows, weight, bias), x)
    y = torch.addmm(_rows(residual), rows, weight.T)
    return _image(y if bias is None else y + bias, x)


def _rows(x: Tensor) -> Tensor:
    """[N, C, H, W] as the matrix [N H W, C]; a view if x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _image(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_rows`: [N, channels, H, W] with the N, H, W of `like`, channels_last."""
    N, _, H, W = like.shape
    return rows.view(N, H, W, rows.shape[1]).permute(0, 3, 1, 2)


def _choose(op: str, x: Tensor, weight: PointwiseWeight, backend: Backend) -> str:
    """The backend; raises ValueError if it does not read this weight's layout."""
    is_packed = weight.backward is not None
    if backend == "auto":
        backend = "cpp" if is_packed else "reference"
    chosen = choose_for(op, backend, x)
    if is_packed != (chosen == "cpp"):
        raise ValueError(
            f"The weight is in the {'cpp' if is_packed else 'plain'} layout, which backend={chosen!r} does not read; "
            f"make it with pack_pointwise(weight, {chosen!r})."
        )
    return chosen


def _check_activation(activation: Activation) -> None:
    names = get_args(Activation)
    if activation not in names:
        raise ValueError(f"activation is {activation!r}; it must be {', '.join(names[:-1])} or {names[-1]}.")


def _check(x: Tensor, weight: PointwiseWeight, bias: Tensor | None, residual: Tensor | None) -> None:
    Cout, Cin = weight.shape
    check_image("x", x)
    if x.shape[1] != Cin:
        raise ValueError(f"x has {x.shape[1]} channels; this weight takes {Cin}.")
    check_tensor("weight", weight.forward, weight.forward.shape, x.device, x.dtype)
    if bias is not None:
        check_tensor("bias", bias, [Cout], x.device, x.dtype)
    if residual is not None:
        check_tensor("residual", residual, [x.shape[0], Cout, *x.shape[2:]], x.device, x.dtype)
    refuse_weight_gradients("pointwise", *(tensor for tensor in (*weight, bias) if tensor is not None))


# weight and weight_t: `forward` and `transposed` of a PointwiseWeight. x of the backward: None without activation.
_register.define(
    "pointwise(Tensor x, Tensor weight, Tensor weight_t, Tensor? bias, Tensor? residual, str activation) -> Tensor",
    lambda x, weight, weight_t, *_: _register.like(x, x.shape[0], weight_t.shape[1], *x.shape[2:]),
)
_register.define(
    "pointwise_backward(Tensor dy, Tensor weight_t, int Cin, Tensor? x, str activation) -> Tensor",
    lambda dy, weight_t, Cin, *_: _register.like(dy, dy.shape[0], Cin, *dy.shape[2:]),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, weight_t, _, _, ctx.activation = inputs
    ctx.Cin = x.shape[1]
    ctx.save_for_backward(weight_t, None if ctx.activation == "none" else x)


def _backward(ops: Any, ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:4]):
        raise RuntimeError("pointwise has no gradient for weight and bias; detach them.")
    weight_t, x = ctx.saved_tensors
    dx = None
    if ctx.needs_input_grad[0]:
        dx = ops.pointwise_backward(dy, weight_t, ctx.Cin, x, ctx.activation)
    return dx, None, None, None, dy if ctx.needs_input_grad[4] else None, None


_register.register_gradient("pointwise", save=_save, backward=_backward)
