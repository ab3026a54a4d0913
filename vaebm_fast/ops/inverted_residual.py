"""A whole inverted residual (1x1, depthwise, 1x1, with a swish before each of the last two) and its input gradient.

The weights are frozen: they have no gradient here. The cell's squeeze and excitation and its skip are in
`vaebm_fast.ops.se_gate_residual`.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from vaebm_fast import _extension, reference
from vaebm_fast.ops._backend import Backend, choose
from vaebm_fast.ops._checks import check_image, check_tensor, refuse_weight_gradients

CHANNELS = (32, 64, 128)  # that the CUDA kernels are compiled for
CHUNK = 32  # hidden channels that they take at a time
WINDOW = 5


def is_taken(x: Tensor, depthwise_weight: Tensor) -> bool:
    """Whether the CUDA kernels take an x [N, C, H, W] of this precision, a window [K, K, hidden] of these sizes."""
    K, _, hidden = depthwise_weight.shape
    return x.dtype == torch.bfloat16 and x.shape[1] in CHANNELS and hidden % CHUNK == 0 and K == WINDOW


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    with_h2: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """s = W2 swish(h2) + b2, h2 = Wd * swish(h1) + bd, h1 = W1 x + b1; swish(h1) is zero outside the image.

    x: [N, C, H, W], best in channels_last (others are copied into it). expand_weight W1: [hidden, C]; expand_bias b1:
    [hidden]. depthwise_weight Wd: [K, K, hidden], K odd, of `pack_depthwise`; depthwise_bias bd: [hidden].
    project_weight W2: [C, hidden]; project_bias b2: [C]. All of one floating dtype. cuda: bfloat16, summed in float32,
    C = 32, 64 or 128, hidden a multiple of 32, K = 5; its swish(h1) and swish(h2) are rounded to bfloat16.
    Returns s [N, C, H, W], channels_last, and with `with_h2` h2 [N, hidden, H, W], which has no gradient, else None.
    FLOP per pixel: 4 C hidden + 2 K^2 hidden; cuda expands 1.9 times, as tiles overlap. Moves each element of x and s
    once, and each of h2 where it is asked for or x has a gradient.
    Differentiable once, in x alone: x and h2 are saved.
    Raises ValueError for arguments that do not fit, RuntimeError for a backend that is missing.
    """
    weights = (expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    _check(x, expand_weight, expand_bias, depthwise_weight, project_weight)
    check_tensor("depthwise_bias", depthwise_bias, expand_bias.shape, x.device, x.dtype)
    check_tensor("project_bias", project_bias, x.shape[1:2], x.device, x.dtype)
    refuse_weight_gradients("inverted_residual", *weights)
    if _choose("inverted_residual", x, depthwise_weight, backend) == "reference":
        s, h2 = reference.inverted_residual(x, *weights, with_h2=with_h2)
        return s, None if h2 is None else h2.detach()
    saves_h2 = with_h2 or (torch.is_grad_enabled() and x.requires_grad)
    s, h2 = torch.ops.vaebm_fast.inverted_residual(x, *weights, saves_h2)
    return s, h2 if with_h2 else None


def inverted_residual_backward(
    ds: Tensor,
    x: Tensor,
    h2: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """dx = W1' [swish'(h1) (Wd' * [swish'(h2) W2' ds])], ds zero outside; swish' = s (1 + h (1 - s)), s = sigmoid(h).

    The vector-Jacobian product of `inverted_residual`, whose h2 it takes; h1 is computed again. ds: [N, C, H, W]; other
    arguments and errors as there. Returns dx [N, C, H, W], channels_last.
    FLOP per pixel: 6 C hidden + 2 K^2 hidden; cuda computes W2' ds 1.9 times. Moves each element of ds, x, h2 and dx
    once; cuda reads ds and h2 1.9 times, mostly from L2, and transposes both weights first.
    """
    _check(x, expand_weight, expand_bias, depthwise_weight, project_weight)
    check_tensor("ds", ds, x.shape, x.device, x.dtype)
    check_tensor("h2", h2, (x.shape[0], expand_weight.shape[0], *x.shape[2:]), x.device, x.dtype)
    weights = (expand_weight, expand_bias, depthwise_weight, project_weight)
    if _choose("inverted_residual_backward", x, depthwise_weight, backend) == "reference":
        return reference.inverted_residual_backward(ds, x, h2, *weights)
    dx: Tensor = torch.ops.vaebm_fast.inverted_residual_backward(ds, x, h2, *weights)
    return dx


def _check(
    x: Tensor, expand_weight: Tensor, expand_bias: Tensor, depthwise_weight: Tensor, project_weight: Tensor
) -> None:
    check_image("x", x)
    if expand_weight.dim() != 2:
        raise ValueError(f"expand_weight must be [hidden, C]; it is {list(expand_weight.shape)}.")
    C, hidden = x.shape[1], expand_weight.shape[0]
    check_tensor("expand_weight", expand_weight, (hidden, C), x.device, x.dtype)
    check_tensor("expand_bias", expand_bias, (hidden,), x.device, x.dtype)
    K = depthwise_weight.shape[0] if depthwise_weight.dim() else 0
    check_tensor("depthwise_weight", depthwise_weight, (K, K, hidden), x.device, x.dtype)
    if K % 2 == 0:
        raise ValueError(f"The window is {K}x{K}; it must be odd.")
    check_tensor("project_weight", project_weight, (C, hidden), x.device, x.dtype)


def _choose(op: str, x: Tensor, depthwise_weight: Tensor, backend: Backend) -> str:
    chosen = choose(op, x.device, backend)
    if chosen != "reference" and not is_taken(x, depthwise_weight):
        (K, _, hidden), C = depthwise_weight.shape, x.shape[1]
        raise ValueError(
            f"{op} with backend={chosen!r} takes bfloat16, C = 32, 64 or 128, hidden a multiple of {CHUNK} and K = "
            f"{WINDOW}, not {x.dtype}, C = {C}, hidden = {hidden}, K = {K}; ask for backend='reference'."
        )
    return chosen


if _extension.is_available():

    @torch.library.register_fake("vaebm_fast::inverted_residual")
    def _(x: Tensor, expand_weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        N, _, H, W = x.shape
        shape = (N, expand_weight.shape[0], H, W)
        h2 = x.new_empty(shape).to(memory_format=torch.channels_last) if others[-1] else x.new_empty(0)
        return torch.empty_like(x, memory_format=torch.channels_last), h2

    @torch.library.register_fake("vaebm_fast::inverted_residual_backward")
    def _(ds: Tensor, x: Tensor, *others: Tensor) -> Tensor:
        return torch.empty_like(x, memory_format=torch.channels_last)

    def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, expand_weight, expand_bias, depthwise_weight, _, project_weight, _, ctx.with_h2 = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)  # else h2 gets a gradient of zeros, as large as itself
        ctx.save_for_backward(x, output[1], expand_weight, expand_bias, depthwise_weight, project_weight)

    def _backward(ctx: Any, ds: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[1:]):
            raise RuntimeError("inverted_residual has no gradient for its weights; detach them.")
        if not ctx.with_h2:
            raise RuntimeError("inverted_residual ran without h2, which its gradient needs; call it with with_h2=True.")
        return torch.ops.vaebm_fast.inverted_residual_backward(ds, *ctx.saved_tensors), *(None,) * 7

    def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def _refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError("inverted_residual is differentiable once; backend='reference' has further derivatives.")

    torch.library.register_autograd("vaebm_fast::inverted_residual", _backward, setup_context=_save)
    torch.library.register_autograd("vaebm_fast::inverted_residual_backward", _refuse, setup_context=_save_nothing)
