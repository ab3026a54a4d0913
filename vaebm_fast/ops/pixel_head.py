"""An image from the decoder's logits and noise, with log p(x|z), and their gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops._checks import check_image, check_tensor, choose_for


def pixel_head(
    logits: Tensor, eps_x: Tensor, *, with_log_p: bool, backend: Backend = "auto"
) -> tuple[Tensor, Tensor | None]:
    """x = c / 2 + 1/2, c = clamp(mu + sigma eps_x, -1, 1); and log p(x|z) = sum log Normal(c; mu, sigma_p), or None.

    mu = 5 tanh(m / 5), log sigma = 5 tanh(r / 5), sigma = exp(log sigma) + 0.01; sigma_p uses max(log sigma, -2)
    instead, VAEBM's floor. log_p is in nats, for pixels in [-1, 1].
    logits: m, then r, [N, 2 C, H, W]. eps_x: [N, C, H, W], best NHWC within each image, with any stride between images
    (other layouts are copied). Returns x [N, C, H, W], channels_last, and log_p [N], in the dtype of eps_x. The
    reference also takes logits of another floating dtype and converts them to that of eps_x.
    Moves 16 bytes per element of x. Differentiable once, in logits and eps_x, which are saved.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(logits, eps_x)
    chosen = choose_for("pixel_head", backend, eps_x, logits)
    if chosen == "reference":
        return reference.pixel_head(logits, eps_x, with_log_p=with_log_p)
    x, log_p = _register.ops_of(chosen).pixel_head(logits, eps_x, with_log_p)
    return x, log_p if with_log_p else None


def pixel_head_backward(
    dx: Tensor, dlog_p: Tensor | None, logits: Tensor, eps_x: Tensor, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """(dlogits, deps_x), the vector-Jacobian product of `pixel_head`; t = mu + sigma eps_x, d = (c - mu) / sigma_p.

    dt = [-1 <= t <= 1] (dx / 2 - dlog_p d / sigma_p), deps_x = sigma dt, dmu = dt + dlog_p d / sigma_p,
    dlog_sigma = exp(log sigma) (dt eps_x + [log sigma >= -2] dlog_p (d^2 - 1) / sigma_p); dm and dr follow by the
    slope 1 - tanh^2. dx: [N, C, H, W]; dlog_p: [N], None for zeros; other arguments as there.
    Returns dlogits [N, 2 C, H, W] and deps_x [N, C, H, W], channels_last. Moves 28 bytes per element of x.
    """
    _check(logits, eps_x)
    check_tensor("dx", dx, eps_x.shape, eps_x.device, eps_x.dtype)
    if dlog_p is not None:
        check_tensor("dlog_p", dlog_p, eps_x.shape[:1], eps_x.device, eps_x.dtype)
    chosen = choose_for("pixel_head_backward", backend, eps_x, logits)
    if chosen == "reference":
        return reference.pixel_head_backward(dx, dlog_p, logits, eps_x)
    dlogits, deps_x = _register.ops_of(chosen).pixel_head_backward(dx, dlog_p, logits, eps_x)
    return dlogits, deps_x


def _check(logits: Tensor, eps_x: Tensor) -> None:
    check_image("eps_x", eps_x)
    check_image("logits", logits)
    N, C, H, W = eps_x.shape
    check_tensor("logits", logits, (N, 2 * C, H, W), eps_x.device, logits.dtype)


# log_p is [0] where `pixel_head` returns None.
_register.define(
    "pixel_head(Tensor logits, Tensor eps_x, bool with_log_p) -> (Tensor x, Tensor log_p)",
    lambda logits, eps_x, with_log_p: (_register.like(eps_x), eps_x.new_empty(eps_x.shape[0] if with_log_p else 0)),
)
_register.define(
    "pixel_head_backward(Tensor dx, Tensor? dlog_p, Tensor logits, Tensor eps_x) -> (Tensor dlogits, Tensor deps_x)",
    lambda dx, dlog_p, logits, eps_x: (_register.like(logits), _register.like(eps_x)),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, eps_x, ctx.with_log_p = inputs
    ctx.save_for_backward(logits, eps_x)


def _backward(ops: Any, ctx: Any, dx: Tensor, dlog_p: Tensor) -> tuple[Tensor | None, ...]:
    weight = dlog_p if ctx.with_log_p else None
    return *ops.pixel_head_backward(dx, weight, *ctx.saved_tensors), None


_register.register_gradient("pixel_head", save=_save, backward=_backward)
