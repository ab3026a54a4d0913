"""References in the place of GPU kernels: a network made for a GPU runs on a CPU and shows which kernels it calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map, tree_map_only

from vaebm_fast import reference
from vaebm_fast.ops import _backend
from vaebm_fast.reference import Activation

NAMESPACES = ("vaebm_fast", "vaebm_triton")


def pretend_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Every backend of an op takes tensors of any device; run what it then calls under `StandIns`."""
    patch.setattr(_backend, "why_not", lambda op, device, backend: None)


class StandIns(TorchDispatchMode):
    """Counts the ops that are called; computes the compiled ones on CPU tensors by their references, and rounds.

    `kernels` replace a reference by something else, called as the op is. It is the C++ op where that
    is called alike.
    """

    def __init__(self, kernels: Mapping[str, Callable[..., Any]] | None = None) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._kernels = kernels or {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._schema.name] += 1
        if func.namespace not in NAMESPACES or func._schema.name.endswith("_memory"):
            return func(*args, **(kwargs or {}))
        likes = func(*tree_map_only(Tensor, lambda tensor: tensor.to("meta"), args))
        if any(isinstance(arg, Tensor) and arg.is_meta for arg in args):
            return likes
        name = func._schema.name.partition("::")[2]
        if name in self._kernels:
            return self._kernels[name](*args)
        run = REFERENCES.get(name) or getattr(torch.ops.vaebm_fast, name)
        results = run(*tree_map_only(Tensor, lambda tensor: tensor.float(), args))
        return tree_map(_rounded, results, likes)


def _rounded(result: Tensor, like: Tensor) -> Tensor:
    """The result in the precision and the layout of what the op's fake gives."""
    assert result.shape == like.shape
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype).copy_(result)


def _pointwise(
    x: Tensor, weight: Tensor, weight_t: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation
) -> Tensor:
    return reference.pointwise(x, weight, bias, residual, activation=activation)


def _pointwise_backward(dy: Tensor, weight_t: Tensor, Cin: int, x: Tensor | None, activation: Activation) -> Tensor:
    return reference.pointwise_backward(dy, weight_t.T, x, activation=activation)


def inverted_residual(
    x: Tensor, weight: Tensor, weight_t: Tensor, bias: Tensor, with_h2: bool
) -> tuple[Tensor, Tensor]:
    """The reference, called as the compiled op is."""
    C = x.shape[1]
    W1, W2, window, b1 = weight.split((32 * C, 32 * C, 1792, 128), 1)
    taps = _from_lanes(window)
    weights = (2 * _from_left(W1, C), 2 * _from_pairs(b1, 3), taps[:25].unflatten(0, (5, 5)), taps[25])
    s, h2 = reference.inverted_residual(x, *weights, _from_right(W2, C).T, bias, with_h2=with_h2)
    return s, x.new_empty(0) if h2 is None else h2


def _residual_tail(
    h: Tensor, skip: Tensor, depthwise: Tensor, depthwise_bias: Tensor, project: Tensor, project_bias: Tensor,
    weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor, upsample: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    h2 = reference.depthwise_swish(h, depthwise, depthwise_bias, upsample=upsample)
    s = reference.pointwise(h2, project, project_bias, activation="swish")
    hidden = F.relu(F.linear(s.mean((2, 3)), weight_in, bias_in))
    gate = torch.sigmoid(F.linear(hidden, weight_out, bias_out))
    return skip + gate[:, :, None, None] * s, h2, s, hidden, gate


def _residual_tail_backward(*given: Any) -> Tensor:
    *tensors, upsample = given
    return reference.residual_tail_backward(*tensors, upsample=upsample)


def inverted_residual_backward(ds: Tensor, x: Tensor, h2: Tensor, weight_t: Tensor) -> Tensor:
    C = x.shape[1]
    W2, W1_t, W1, window, b1 = weight_t.split((32 * C, 32 * C, 32 * C, 1792, 128), 1)
    taps, expand = _from_lanes(window)[:25].flip(0).unflatten(0, (5, 5)), 2 * _from_left(W2, C)
    own = _from_right(W1, C, own=True)
    assert torch.equal(own, _from_right(W1_t, C))  # there twice, for two products
    return reference.inverted_residual_backward(ds, x, h2, 2 * own, 2 * _from_pairs(b1, 2), taps, expand.T)


def _from_left(part: Tensor, C: int) -> Tensor:
    """The [hidden, C] of which this is a left operand: the inverse of what `pack_inverted_residual` does."""
    return part.reshape(-1, C // 32, 2, 2, 8, 4, 2, 2, 2).permute(0, 4, 2, 7, 1, 5, 3, 6, 8).reshape(-1, C)


def _from_right(part: Tensor, C: int, *, own: bool = False) -> Tensor:
    """The [hidden, C] of which, or of whose transpose, this is a right operand."""
    blocks = part.reshape(-1, C // 32, 4, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5, 6).reshape(-1, C // 32, 32, 32)
    return (blocks.transpose(1, 2) if own else blocks.permute(0, 3, 1, 2)).reshape(-1, C)


def _from_lanes(part: Tensor) -> Tensor:
    """[28, hidden]; the zeros between the numbers go."""
    return part.reshape(-1, 7, 32, 4, 2)[..., 1].permute(1, 3, 0, 2).reshape(28, -1)


def _from_pairs(part: Tensor, twice: int) -> Tensor:
    """[hidden], which is there twice along this dimension of pairs."""
    return part.reshape(-1, 16, 2, 2, 2)[..., 1].select(twice, 0).flatten()


REFERENCES: dict[str, Callable[..., Any]] = {
    "bilinear_upsample": reference.bilinear_upsample,
    "bilinear_upsample_backward": reference.bilinear_upsample_backward,
    "pointwise": _pointwise,
    "pointwise_backward": _pointwise_backward,
    "inverted_residual": inverted_residual,
    "inverted_residual_backward": inverted_residual_backward,
    "residual_tail": _residual_tail,
    "residual_tail_backward": _residual_tail_backward,
}
