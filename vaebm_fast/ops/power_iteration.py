"""Leading singular vectors of many matrices at once, by power iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend, choose


def power_iteration(
    weight: Tensor, u: Tensor, v: Tensor, *, iterations: int, eps: float, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """`iterations` times v <- normalize(u'W), then u <- normalize(W v), batched; normalize(x) = x / max(|x|, eps).

    weight: W [B, M, K] with M, K >= 1, best contiguous. u: [B, M]. v: [B, K]; its values matter only for
    `iterations` = 0, which returns both unchanged. Returns the new u and v; u'Wv tends to the largest singular value.
    All share one floating dtype; compiled backends take float32 only.
    An iteration takes 4 M K FLOP per matrix. W (4 bytes per element) is read from memory once, then once per iteration
    from cache if it fits (on a GPU all B matrices must fit, on a CPU one).
    Not differentiable: callers differentiate u'Wv through W only, with u and v constant.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    Source: Miyato et al., arXiv:1802.05957, section 2.2 and appendix A.
    """
    _check(weight, u, v, iterations, eps)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, u, v)):
        raise ValueError("power_iteration has no gradient; call it under torch.no_grad().")
    chosen = choose("power_iteration", weight.device, backend, weight.dtype)
    if chosen == "reference":
        return reference.power_iteration(weight, u, v, iterations=iterations, eps=eps)
    if weight.dtype != torch.float32:
        raise ValueError(
            f"power_iteration with backend={chosen!r} takes float32, not {weight.dtype}; ask for backend='reference'."
        )
    vectors: tuple[Tensor, Tensor] = torch.ops.vaebm_fast.power_iteration(weight, u, v, iterations, eps)
    return vectors


def _check(weight: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float) -> None:
    if weight.dim() != 3 or not weight.is_floating_point() or 0 in weight.shape[1:]:
        raise ValueError(
            f"weight must be floating point [B, M, K] with M, K >= 1; it is {weight.dtype} {list(weight.shape)}."
        )
    B, M, K = weight.shape
    for name, vector, size in (("u", u, M), ("v", v, K)):
        if vector.shape != (B, size):
            raise ValueError(
                f"{name} must be [{B}, {size}] for weight {list(weight.shape)}; it is {list(vector.shape)}."
            )
        if vector.device != weight.device:
            raise ValueError(f"{name} is on {vector.device} but weight is on {weight.device}; move it there.")
        if vector.dtype != weight.dtype:
            raise ValueError(f"{name} is {vector.dtype} but weight is {weight.dtype}; convert one of them.")
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; it must not be negative.")
    if not eps > 0:
        raise ValueError(f"eps is {eps}; it must be positive.")


_register.define(
    "power_iteration(Tensor weight, Tensor u, Tensor v, int iterations, float eps) -> (Tensor, Tensor)",
    lambda weight, u, v, *_: (u.new_empty(u.shape), v.new_empty(v.shape)),
)


def _no_derivative(ctx: Any, du: Tensor, dv: Tensor) -> None:
    raise RuntimeError("power_iteration has no gradient; call it under torch.no_grad().")


torch.library.register_autograd("vaebm_fast::power_iteration", _no_derivative)
