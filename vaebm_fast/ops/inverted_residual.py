"""An inverted residual as one op (1x1, swish, depthwise, swish, 1x1) and its gradient for the input.

The weights are frozen: they have no gradient here. The cell's squeeze-and-excitation gate and skip are in
`vaebm_fast.ops.se_gate_residual`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend, choose
from vaebm_fast.ops._checks import check_image, check_tensor, refuse_weight_gradients

CHANNELS = (32, 64, 128)  # values of C that the CUDA kernels are compiled for
CHUNK = 32  # hidden channels that the CUDA kernels process at a time
WINDOW = 5


class BlockWeights(NamedTuple):
    """Weights for the reference: W1 [hidden, C], b1 [hidden], Wd [K, K, hidden], K odd, from `pack_depthwise`,
    bd [hidden], W2 [C, hidden], b2 [C]."""

    expand_weight: Tensor
    expand_bias: Tensor
    depthwise_weight: Tensor
    depthwise_bias: Tensor
    project_weight: Tensor
    project_bias: Tensor


class PackedBlock(NamedTuple):
    """Weights for cuda, made by `pack_inverted_residual`.

    A row of `weight` [hidden / 32, 64 C + 1920] holds everything the forward kernel reads for 32 hidden channels, in
    the order its lanes read it (`Chunk` of csrc/cuda/inverted_residual_tile.h); `weight_t` [hidden / 32, 96 C + 1920]
    is the same for the backward kernel.
    """

    weight: Tensor
    weight_t: Tensor
    project_bias: Tensor


def is_taken(C: int, depthwise_weight: Tensor) -> bool:
    """Whether the CUDA kernels support C channels and a depthwise weight [K, K, hidden]."""
    K, _, hidden = depthwise_weight.shape
    return C in CHANNELS and hidden % CHUNK == 0 and K == WINDOW


def pack_inverted_residual(weights: BlockWeights) -> PackedBlock:
    """Copy the weights into the layout of the CUDA kernels.

    The kernels compute swish as u + u tanh u with u = x / 2, so W1 and b1 are halved here; the backward's W2 and W1 are
    halved for the two slopes. Halving is exact. The window and b1 are stored as float32: a zero bf16, then the value.
    Raises ValueError for sizes that the kernels do not support.
    """
    W1, b1, Wd, bd, W2, b2 = weights
    if not is_taken(W1.shape[1], Wd):
        raise ValueError(f"The CUDA kernels take {_TAKEN}, not {_sizes(W1.shape[1], Wd)}.")
    zeros, taps, pairs = torch.zeros_like(bd), Wd.flatten(0, 1), (b1 / 2).unflatten(0, (-1, CHUNK // 2, 2))
    bias, bias_t = (_as_float32(torch.stack((pairs, pairs), dim)) for dim in (3, 2))
    window = torch.stack((*taps, bd, zeros, zeros))
    window_t = torch.stack((*taps.flip(0), zeros, zeros, zeros))
    project, project_t = _right_operand(W2).transpose(0, 1), _left_operand(W2.T / 2)
    expand_t = _right_operand(W1.T / 2).transpose(0, 1)
    weight = (_left_operand(W1 / 2), project, _lanes(window), bias)
    weight_t = (project_t, expand_t, _right_operand(W1 / 2), _lanes(window_t), bias_t)
    return PackedBlock(_rows(weight), _rows(weight_t), b2)


def _rows(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def _left_operand(weight: Tensor) -> Tensor:
    """[hidden, C] -> [hidden / 32, C / 32, 1024]: `m` and `s` index 16 x 16 products, `g` and `q` index lanes.

    The eight elements of a lane come from two rows, `i`. They are contiguous, and so are those of four products.
    """
    chunk, g, m, i, c, q, s, h, b = range(9)
    blocks = weight.reshape(-1, 8, 2, 2, weight.shape[1] // CHUNK, 4, 2, 2, 2)
    return blocks.permute(chunk, c, m, s, g, q, h, i, b).flatten(2)


def _right_operand(weight: Tensor) -> Tensor:
    """[rows, columns] -> [rows / 32, columns / 32, 1024]: in 8 x 32 product `j` a lane holds eight of row 2 a + d."""
    block, a, j, d, c, q, e = range(7)
    blocks = weight.reshape(-1, 4, 4, 2, weight.shape[1] // CHUNK, 4, 8)
    return blocks.permute(block, c, j, a, d, q, e).flatten(2)


def _lanes(window: Tensor) -> Tensor:
    """[28, hidden] -> [hidden / 32, 7, 32, 4, 2]: groups of four values for each of 32 channels."""
    quads = window.reshape(7, 4, -1, CHUNK)
    return _as_float32(quads.permute(2, 0, 3, 1))


def _as_float32(x: Tensor) -> Tensor:
    """[..., 2]: bfloat16 pairs (0, x), which in little-endian memory are the bits of x in float32."""
    return torch.stack((torch.zeros_like(x), x), -1)


def inverted_residual(
    x: Tensor, weights: BlockWeights | PackedBlock, *, with_h2: bool = False, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """s = W2 swish(h2) + b2, h2 = Wd * swish(h1) + bd, h1 = W1 x + b1; swish(h1) is zero outside the image.

    x: [N, C, H, W], best in channels_last (other layouts are copied), dtype of the weights. `weights`: plain for the
    reference, packed for cuda; "auto" picks by type. cuda: bfloat16 with float32 sums, C = 32, 64 or 128, hidden a
    multiple of 32, K = 5; swish(h1) and swish(h2) are rounded to bfloat16, and tanh is within 2^-11.
    Returns s [N, C, H, W], channels_last, and h2 [N, hidden, H, W] without a gradient if `with_h2`, otherwise None.
    FLOP per pixel: 4 C hidden + 2 K^2 hidden; cuda computes h1 1.9 times, because tiles overlap. Moves each element of
    x and s once, and each of h2 once if it is returned or x requires a gradient.
    Differentiable once, in x only: saves x and h2.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(x, weights)
    refuse_weight_gradients("inverted_residual", *weights)
    if isinstance(weights, BlockWeights):
        _require_reference("inverted_residual", x, backend)
        s, h2 = reference.inverted_residual(x, *weights, with_h2=with_h2)
        return s, None if h2 is None else h2.detach()
    _require_cuda("inverted_residual", x, backend)
    saves_h2 = with_h2 or (torch.is_grad_enabled() and x.requires_grad)
    s, h2 = torch.ops.vaebm_fast.inverted_residual(x, *weights, saves_h2)
    return s, h2 if with_h2 else None


def inverted_residual_backward(
    ds: Tensor, x: Tensor, h2: Tensor, weights: BlockWeights | PackedBlock, *, backend: Backend = "auto"
) -> Tensor:
    """dx = W1' [swish'(h1) (Wd' * [swish'(h2) W2' ds])], ds zero outside; swish' = s (1 + h (1 - s)), s = sigmoid(h).

    The vector-Jacobian product of `inverted_residual`; takes its h2 and recomputes h1. ds: [N, C, H, W]; other
    arguments and errors as there. Returns dx [N, C, H, W], channels_last.
    FLOP per pixel: 6 C hidden + 2 K^2 hidden; cuda computes W2' ds 1.9 times. Moves each element of ds, x, h2 and dx
    once; cuda reads ds and h2 1.9 times, mostly from L2.
    """
    hidden = _check(x, weights)
    check_tensor("ds", ds, x.shape, x.device, x.dtype)
    check_tensor("h2", h2, (x.shape[0], hidden, *x.shape[2:]), x.device, x.dtype)
    if isinstance(weights, BlockWeights):
        _require_reference("inverted_residual_backward", x, backend)
        W1, b1, Wd, _, W2, _ = weights
        return reference.inverted_residual_backward(ds, x, h2, W1, b1, Wd, W2)
    _require_cuda("inverted_residual_backward", x, backend)
    dx: Tensor = torch.ops.vaebm_fast.inverted_residual_backward(ds, x, h2, weights.weight_t)
    return dx


def _check(x: Tensor, weights: BlockWeights | PackedBlock) -> int:
    """Check that the weights fit x; return the number of hidden channels."""
    check_image("x", x)
    return _check_plain(x, weights) if isinstance(weights, BlockWeights) else _check_packed(x, weights)


def _check_plain(x: Tensor, weights: BlockWeights) -> int:
    W1, b1, Wd, bd, W2, b2 = weights
    if W1.dim() != 2:
        raise ValueError(f"expand_weight must be [hidden, C]; it is {list(W1.shape)}.")
    C, hidden, K = x.shape[1], W1.shape[0], Wd.shape[0] if Wd.dim() else 0
    shapes = ((hidden, C), (hidden,), (K, K, hidden), (hidden,), (C, hidden), (C,))
    for name, tensor, shape in zip(BlockWeights._fields, weights, shapes, strict=True):
        check_tensor(name, tensor, shape, x.device, x.dtype)
    if K % 2 == 0:
        raise ValueError(f"The window is {K}x{K}; it must be odd.")
    return hidden


def _check_packed(x: Tensor, weights: PackedBlock) -> int:
    C, chunks = x.shape[1], weights.weight.shape[0]
    if x.dtype != torch.bfloat16 or C not in CHANNELS:
        raise ValueError(f"Packed weights take bfloat16 and C = 32, 64 or 128, not {x.dtype} and C = {C}.")
    shapes = ((chunks, 64 * C + 1920), (chunks, 96 * C + 1920), (C,))
    for name, tensor, shape in zip(PackedBlock._fields, weights, shapes, strict=True):
        check_tensor(name, tensor, shape, x.device, x.dtype)
    return CHUNK * chunks


_TAKEN = f"C = 32, 64 or 128, hidden a multiple of {CHUNK} and K = {WINDOW}"


def _sizes(C: int, depthwise_weight: Tensor) -> str:
    K, _, hidden = depthwise_weight.shape
    return f"C = {C}, hidden = {hidden}, K = {K}"


def _require_reference(op: str, x: Tensor, backend: Backend) -> None:
    if backend != "auto" and choose(op, x.device, backend) != "reference":
        raise ValueError(f"{op} with backend={backend!r} takes weights of pack_inverted_residual; pack them.")


def _require_cuda(op: str, x: Tensor, backend: Backend) -> None:
    if choose(op, x.device, "cuda" if backend == "auto" else backend) == "reference":
        raise ValueError(f"{op} with backend={backend!r} takes plain weights, not those of pack_inverted_residual.")


def _fake(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (N, _, H, W), (*_, with_h2) = x.shape, others
    hidden = CHUNK * weight.shape[0]
    return _register.like(x), _register.like(x, N, hidden, H, W) if with_h2 else x.new_empty(0)


# weight, weight_t and bias are those of a PackedBlock. h2 is [0] without with_h2.
_register.define(
    "inverted_residual(Tensor x, Tensor weight, Tensor weight_t, Tensor bias, bool with_h2) -> (Tensor s, Tensor h2)",
    _fake,
)
_register.define(
    "inverted_residual_backward(Tensor ds, Tensor x, Tensor h2, Tensor weight_t) -> Tensor",
    lambda ds, x, *_: _register.like(x),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, _, weight_t, _, ctx.with_h2 = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros of h2's size as its gradient
    ctx.save_for_backward(x, output[1], weight_t)


def _backward(ops: Any, ctx: Any, ds: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:]):
        raise RuntimeError("inverted_residual has no gradient for its weights; detach them.")
    if not ctx.with_h2:
        raise RuntimeError("inverted_residual ran without h2, which its gradient needs; call it with with_h2=True.")
    return ops.inverted_residual_backward(ds, *ctx.saved_tensors), *(None,) * 4


_register.register_gradient("inverted_residual", save=_save, backward=_backward)
