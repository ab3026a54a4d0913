"""One Langevin step on the whole state in one launch; the kernel generates the step's noise itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend, choose
from vaebm_fast.ops._checks import check_tensor
from vaebm_fast.ops.philox_normal import check_noise


def langevin_update(
    eps: Tensor,
    gradient: Tensor,
    seeds: Tensor,
    draw: Tensor,
    nonfinite_at: Tensor,
    *,
    stream: int,
    step_size: float,
    prior: bool = False,
    backend: Backend = "auto",
) -> None:
    """eps <- eps - (h/2) gradient + sqrt(h) z in place, z = `philox_normal(seeds, draw, stream, D)`, h = `step_size`.

    eps: float32 [N, D], contiguous; written in place. gradient: float32 [N, D], dU/deps. seeds [N], draw [] or [1] and
    stream: as for `philox_normal`. prior: also add eps, the gradient of |eps|^2 / 2; `gradient` must then exclude it.
    nonfinite_at: int64 [N], contiguous; the caller fills it with -1 before the first step. Entry n is set once, to the
    low 32 bits of the first draw after which row n is not finite.
    A CUDA graph may capture it: no host sync, and everything that changes between steps is in tensors.
    h/2 and sqrt(h) are rounded to float32 once; products and sums follow the formula one by one, so the bits are the
    same on every backend and in any batch.
    Moves 12 bytes per element: reads eps and gradient once, writes eps once.
    No gradient. Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    Source: VAEBM, arXiv:2010.00654, equation 3.
    """
    _check(eps, gradient, seeds, draw, nonfinite_at, stream, step_size)
    if torch.is_grad_enabled() and (eps.requires_grad or gradient.requires_grad):
        raise ValueError("langevin_update has no gradient; call it under torch.no_grad().")
    chosen = choose("langevin_update", eps.device, backend)
    if chosen == "reference":
        reference.langevin_update(
            eps, gradient, seeds, draw, nonfinite_at, stream=stream, step_size=step_size, prior=prior
        )
    else:
        _register.ops_of(chosen).langevin_update(eps, gradient, seeds, draw, nonfinite_at, stream, step_size, prior)


def _check(
    eps: Tensor, gradient: Tensor, seeds: Tensor, draw: Tensor, nonfinite_at: Tensor, stream: int, step_size: float
) -> None:
    if eps.dim() != 2 or eps.dtype != torch.float32 or not eps.is_contiguous():
        raise ValueError(
            f"eps must be float32 [N, D] and contiguous; it is {eps.dtype} {list(eps.shape)} with strides "
            f"{list(eps.stride())}."
        )
    N, D = eps.shape
    check_noise(seeds, draw, stream, D)
    check_tensor("gradient", gradient, eps.shape, eps.device, eps.dtype)
    check_tensor("seeds", seeds, (N,), eps.device, torch.int64)
    check_tensor("nonfinite_at", nonfinite_at, (N,), eps.device, torch.int64)
    if not nonfinite_at.is_contiguous():
        raise ValueError(f"nonfinite_at must be contiguous; its stride is {nonfinite_at.stride(0)}.")
    if not (step_size > 0 and math.isfinite(step_size)):
        raise ValueError(f"step_size is {step_size}; it must be a positive number.")


_register.define(
    "langevin_update(Tensor(a!) eps, Tensor gradient, Tensor seeds, Tensor draw, Tensor(b!) nonfinite_at, int stream, "
    "float step_size, bool prior) -> ()",
    lambda *_: None,
)
