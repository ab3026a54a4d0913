"""A group of normal latents z and log p(z) from the prior's raw parameters and noise, and their gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_image, check_tensor, choose_for


def gaussian_latent(
    parameters: Tensor | None, eps: Tensor, temperature: float, *, with_log_p: bool, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """z = mu + temperature sigma eps, mu = 5 tanh(m / 5), sigma = exp(5 tanh(r / 5)) + 0.01; and log p(z), or None.

    Since (z - mu) / (temperature sigma) = eps, log p(z) = -sum(eps^2 + log 2 pi) / 2 - sum log(temperature sigma) nats.
    parameters: m, then r, [N, 2 L, H, W]; None means zeros, the top prior: mu = 0, sigma = 1.01.
    eps: [N, L, H, W], best NHWC within each image, with any stride between images (other layouts are copied).
    Returns z [N, L, H, W], channels_last, and log_p [N], in the dtype of eps. The reference also takes parameters of
    another floating dtype and converts them to that of eps.
    Moves 16 bytes per element of eps. Differentiable once, in parameters and eps, which are saved.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(parameters, eps)
    chosen = choose_for("gaussian_latent", backend, eps, parameters)
    if chosen == "reference":
        return reference.gaussian_latent(parameters, eps, temperature, with_log_p=with_log_p)
    z, log_p = _register.ops_of(chosen).gaussian_latent(parameters, eps, temperature, with_log_p)
    return z, log_p if with_log_p else None


def gaussian_latent_backward(
    dz: Tensor,
    dlog_p: Tensor | None,
    parameters: Tensor | None,
    eps: Tensor,
    temperature: float,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor | None, Tensor]:
    """(dparameters, deps), the vector-Jacobian product of `gaussian_latent`, with e = exp(5 tanh(r / 5)).

    dm = dz (1 - tanh^2(m / 5)), dr = e (temperature dz eps - dlog_p / sigma) (1 - tanh^2(r / 5)),
    deps = temperature sigma dz - dlog_p eps. dz: [N, L, H, W]; dlog_p: [N], None for zeros; other arguments as there.
    Returns dparameters [N, 2 L, H, W] (None if parameters is None) and deps [N, L, H, W], both channels_last.
    Moves 28 bytes per element of eps.
    """
    _check(parameters, eps)
    check_tensor("dz", dz, eps.shape, eps.device, eps.dtype)
    if dlog_p is not None:
        check_tensor("dlog_p", dlog_p, eps.shape[:1], eps.device, eps.dtype)
    chosen = choose_for("gaussian_latent_backward", backend, eps, parameters)
    if chosen == "reference":
        return reference.gaussian_latent_backward(dz, dlog_p, parameters, eps, temperature)
    op = _register.ops_of(chosen).gaussian_latent_backward
    dparameters, deps = op(dz, dlog_p, parameters, eps, temperature)
    return None if parameters is None else dparameters, deps


def _check(parameters: Tensor | None, eps: Tensor) -> None:
    check_image("eps", eps)
    if parameters is not None:
        check_image("parameters", parameters)
        N, L, H, W = eps.shape
        check_tensor("parameters", parameters, (N, 2 * L, H, W), eps.device, parameters.dtype)


def _fake(parameters: Tensor | None, eps: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, with_log_p = others
    return _register.like(eps), eps.new_empty(eps.shape[0] if with_log_p else 0)


def _fake_backward(
    dz: Tensor, dlog_p: Tensor | None, parameters: Tensor | None, eps: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return eps.new_empty(0) if parameters is None else _register.like(parameters), _register.like(eps)


# log_p and dparameters are [0] where the public functions return None.
_register.define(
    "gaussian_latent(Tensor? parameters, Tensor eps, float temperature, bool with_log_p) -> (Tensor z, Tensor log_p)",
    _fake,
)
_register.define(
    "gaussian_latent_backward(Tensor dz, Tensor? dlog_p, Tensor? parameters, Tensor eps, float temperature) "
    "-> (Tensor dparameters, Tensor deps)",
    _fake_backward,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    parameters, eps, ctx.temperature, ctx.with_log_p = inputs
    ctx.save_for_backward(parameters, eps)


def _backward(ops: Any, ctx: Any, dz: Tensor, dlog_p: Tensor) -> tuple[Tensor | None, ...]:
    parameters, eps = ctx.saved_tensors
    weight = dlog_p if ctx.with_log_p else None
    op = ops.gaussian_latent_backward
    dparameters, deps = op(dz, weight, parameters, eps, ctx.temperature)
    return None if parameters is None else dparameters, deps, None, None


_register.register_gradient("gaussian_latent", save=_save, backward=_backward)
