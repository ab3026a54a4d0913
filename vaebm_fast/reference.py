"""The reference of every op in plain PyTorch: same names, same signatures, any device. Kernels are tested against it.

Run it eagerly: a compiler may contract a product and a sum into an fma, which changes the bits of the normals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["none", "swish", "elu"]

_MASK = 0xFFFFFFFF
_SIGMA_MIN = 1e-2
_LOG_SIGMA_FLOOR = -2.0
_LOG_2PI = math.log(2 * math.pi)


def prior_potential(*noise: Tensor) -> Tensor:
    """sum |eps|^2 / 2 over tensors [N, ...], [N]: what the "paper" potential adds to the energy."""
    terms = [0.5 * (eps * eps).flatten(1).sum(1) for eps in noise]
    return torch.stack(terms).sum(0)


def philox_words(seeds: Tensor, draw: Tensor, *, stream: int, numel: int) -> Tensor:
    """Philox4x32-10 words, int32 [N, numel]; see `vaebm_fast.ops.philox_normal.philox_words`."""
    words = _philox_quads(seeds, draw, stream, (numel + 3) // 4)
    signed = torch.where(words < 2**31, words, words - 2**32).to(torch.int32)
    return signed.flatten(1)[:, :numel].contiguous()


def philox_normal(seeds: Tensor, draw: Tensor, *, stream: int, numel: int) -> Tensor:
    """Standard normals, float32 [N, numel]; see `vaebm_fast.ops.philox_normal.philox_normal`."""
    words = _philox_quads(seeds, draw, stream, (numel + 3) // 4)
    pairs = words.unflatten(2, (2, 2))  # [N, quads, 2 pairs, 2]
    normals = _box_muller(pairs[..., 0], pairs[..., 1])
    return normals.flatten(1)[:, :numel].contiguous()


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
) -> None:
    """A Langevin step of eps [N, D], in place; see `vaebm_fast.ops.langevin_update.langevin_update`."""
    noise = philox_normal(seeds, draw, stream=stream, numel=eps.shape[1])
    slope = gradient + eps if prior else gradient
    eps.copy_(eps - (step_size / 2) * slope + math.sqrt(step_size) * noise)
    is_first = (nonfinite_at < 0) & ~torch.isfinite(eps).all(dim=1)
    nonfinite_at.copy_(torch.where(is_first, draw.reshape(()) & _MASK, nonfinite_at))


def gather_images(images: Tensor, index: Tensor, flip: Tensor, top: Tensor, left: Tensor, *, size: int) -> Tensor:
    """A batch of cropped and mirrored images; see `vaebm_fast.ops.gather_images.gather_images`.

    Values out of range are clamped, which needs no host sync.
    """
    M, H, W, _ = images.shape
    steps = torch.arange(size, device=images.device)
    rows = top.clamp(0, H - size)[:, None] + steps
    columns = left.clamp(0, W - size)[:, None] + torch.where(flip[:, None], size - 1 - steps, steps)
    return images[index.clamp(0, M - 1)[:, None, None], rows[:, :, None], columns[:, None, :]]


def depthwise_swish(h: Tensor, weight: Tensor, bias: Tensor, *, upsample: bool = False) -> Tensor:
    """Depthwise convolution of swish(h); see `vaebm_fast.ops.depthwise_swish.depthwise_swish`."""
    s = F.silu(h)
    if upsample:
        s = F.interpolate(s, scale_factor=2, mode="nearest")
    return F.conv2d(s, weight.permute(2, 0, 1)[:, None], bias, padding=weight.shape[0] // 2, groups=h.shape[1])


def depthwise_swish_backward(dy: Tensor, h: Tensor, weight: Tensor, *, upsample: bool = False) -> Tensor:
    """Its gradient for h; see `vaebm_fast.ops.depthwise_swish.depthwise_swish_backward`."""
    flipped = weight.flip(0, 1).permute(2, 0, 1)[:, None]
    ds = F.conv2d(dy, flipped, padding=weight.shape[0] // 2, groups=h.shape[1])
    if upsample:
        ds = F.avg_pool2d(ds, 2) * 4
    return ds * _swish_slope(h)


def _swish_slope(x: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(x)
    return sigmoid * (1 + x * (1 - sigmoid))


def activated(x: Tensor, activation: Activation) -> Tensor:
    """f(x), element by element."""
    if activation == "none":
        return x
    return F.silu(x) if activation == "swish" else F.elu(x)


def activation_slope(x: Tensor, activation: Activation) -> Tensor:
    """f'(x), element by element."""
    if activation == "none":
        return torch.ones_like(x)
    return _swish_slope(x) if activation == "swish" else x.clamp(max=0).exp()


def pointwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    activation: Activation = "none",
) -> Tensor:
    """1x1 convolution, weight [Cout, Cin]; see `vaebm_fast.ops.pointwise.pointwise`."""
    y = F.conv2d(activated(x, activation), weight[:, :, None, None], bias)
    return y if residual is None else y + residual


def pointwise_backward(
    dy: Tensor, weight: Tensor, x: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """Its gradient for the input; see `vaebm_fast.ops.pointwise.pointwise_backward`."""
    dx = F.conv2d(dy, weight.T[:, :, None, None])
    return dx if x is None else dx * activation_slope(x, activation)


def bilinear_upsample(x: Tensor) -> Tensor:
    """Upsampling by 2, corners aligned; see `vaebm_fast.ops.bilinear_upsample.bilinear_upsample`.

    PyTorch's, except for the gradient on CUDA, where PyTorch uses atomics.
    """
    y: Tensor = _BilinearUpsample.apply(x) if x.is_cuda else _interpolate(x)
    return y


def bilinear_upsample_backward(dy: Tensor) -> Tensor:
    """Its gradient; see `vaebm_fast.ops.bilinear_upsample.bilinear_upsample_backward`."""
    return _gather_bilinear(_gather_bilinear(dy, 2), 3).to(dy.dtype)


def inverted_residual(
    x: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor,
    project_weight: Tensor,
    project_bias: Tensor,
    *,
    with_h2: bool,
) -> tuple[Tensor, Tensor | None]:
    """s and h2; see `vaebm_fast.ops.inverted_residual.inverted_residual`."""
    h2 = depthwise_swish(pointwise(x, expand_weight, expand_bias), depthwise_weight, depthwise_bias)
    return pointwise(h2, project_weight, project_bias, activation="swish"), h2 if with_h2 else None


def inverted_residual_backward(
    ds: Tensor,
    x: Tensor,
    h2: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    depthwise_weight: Tensor,
    project_weight: Tensor,
) -> Tensor:
    """Its gradient for x; see `vaebm_fast.ops.inverted_residual.inverted_residual_backward`."""
    h1 = pointwise(x, expand_weight, expand_bias)
    dh2 = pointwise_backward(ds, project_weight, h2, activation="swish")
    dh1 = depthwise_swish_backward(dh2, h1, depthwise_weight)
    return pointwise_backward(dh1, expand_weight)


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
    upsample: bool,
) -> Tensor:
    """y; see `vaebm_fast.ops.residual_tail.residual_tail`."""
    h2 = depthwise_swish(h, depthwise_weight, depthwise_bias, upsample=upsample)
    s = pointwise(h2, project_weight, project_bias, activation="swish")
    return se_gate_residual(s, skip, weight_in, bias_in, weight_out, bias_out)


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
    upsample: bool,
) -> Tensor:
    """Its gradient for h; see `vaebm_fast.ops.residual_tail.residual_tail_backward`."""
    ds = se_gate_residual_backward(dy, s, hidden, gate, weight_in, weight_out)
    dh2 = pointwise_backward(ds, project_weight, h2, activation="swish")
    return depthwise_swish_backward(dh2, h, depthwise_weight, upsample=upsample)


def power_iteration(weight: Tensor, u: Tensor, v: Tensor, *, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of [B, M, K]; see `vaebm_fast.ops.power_iteration.power_iteration`."""
    for _ in range(iterations):
        v = F.normalize(torch.bmm(u[:, None], weight)[:, 0], dim=1, eps=eps)
        u = F.normalize(torch.bmm(weight, v[:, :, None])[:, :, 0], dim=1, eps=eps)
    return u, v


def energy_epilogue(
    y: Tensor, skip: Tensor | None = None, skip_scale: float = 1.0, shift: Tensor | None = None
) -> Tensor:
    """swish(y + shift + skip_scale * skip); see `vaebm_fast.ops.energy_epilogue.energy_epilogue`."""
    return F.silu(_sum_of_terms(y, skip, skip_scale, shift))


def energy_epilogue_backward(
    du: Tensor, y: Tensor, skip: Tensor | None = None, skip_scale: float = 1.0, shift: Tensor | None = None
) -> Tensor:
    """Its gradient for y; see `vaebm_fast.ops.energy_epilogue.energy_epilogue_backward`."""
    return du * _swish_slope(_sum_of_terms(y, skip, skip_scale, shift))


def _sum_of_terms(y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None) -> Tensor:
    t = y if shift is None else y + shift[:, None, None]
    return t if skip is None else torch.add(t, skip, alpha=skip_scale)


def energy_head(
    y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    """bias + sum_chw weight[c] swish(y + shift + skip_scale * skip); see `vaebm_fast.ops.energy_head.energy_head`."""
    sums = energy_epilogue(y, skip, skip_scale, shift).sum(dim=(2, 3), dtype=weight.dtype)
    return F.linear(sums, weight[None], bias).squeeze(1)


def energy_head_backward(
    denergy: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, weight: Tensor
) -> Tensor:
    """Its gradient for y; see `vaebm_fast.ops.energy_head.energy_head_backward`."""
    du = (denergy[:, None] * weight)[:, :, None, None]
    return energy_epilogue_backward(du, y, skip, skip_scale, shift).to(y.dtype)


def se_gate_residual(
    s: Tensor, skip: Tensor, weight_in: Tensor, bias_in: Tensor, weight_out: Tensor, bias_out: Tensor
) -> Tensor:
    """skip + gate * s; see `vaebm_fast.ops.se_gate_residual.se_gate_residual`."""
    hidden = F.relu(F.linear(s.mean(dim=(2, 3)), weight_in, bias_in))
    gate = torch.sigmoid(F.linear(hidden, weight_out, bias_out))
    return torch.addcmul(skip, s, gate[:, :, None, None])


def se_gate_residual_backward(
    dy: Tensor, s: Tensor, hidden: Tensor, gate: Tensor, weight_in: Tensor, weight_out: Tensor
) -> Tensor:
    """Its gradient for s; see `vaebm_fast.ops.se_gate_residual.se_gate_residual_backward`."""
    dgate = (dy * s).sum(dim=(2, 3)) * gate * (1 - gate)
    dmean = ((dgate @ weight_out) * (hidden > 0)) @ weight_in
    return gate[:, :, None, None] * dy + (dmean / (s.shape[2] * s.shape[3]))[:, :, None, None]


def gaussian_latent(
    parameters: Tensor | None, eps: Tensor, temperature: float, *, with_log_p: bool
) -> tuple[Tensor, Tensor | None]:
    """z and log p(z); see `vaebm_fast.ops.gaussian_latent.gaussian_latent`."""
    mu, log_sigma = (_soft_clamp5(raw) for raw in _raw_parameters(parameters, eps))
    sigma = (torch.exp(log_sigma) + _SIGMA_MIN) * temperature
    z = mu + sigma * eps
    return z, (-0.5 * (eps * eps + _LOG_2PI) - torch.log(sigma)).flatten(1).sum(1) if with_log_p else None


def gaussian_latent_backward(
    dz: Tensor, dlog_p: Tensor | None, parameters: Tensor | None, eps: Tensor, temperature: float
) -> tuple[Tensor | None, Tensor]:
    """Its gradients; see `vaebm_fast.ops.gaussian_latent.gaussian_latent_backward`."""
    raw_mu, raw_log_sigma = _raw_parameters(parameters, eps)
    exponential = torch.exp(_soft_clamp5(raw_log_sigma))
    sigma = exponential + _SIGMA_MIN
    weight = 0.0 if dlog_p is None else dlog_p[:, None, None, None]
    deps = dz * (sigma * temperature) - weight * eps
    if parameters is None:
        return None, deps
    dlog_sigma = (dz * temperature * eps - weight / sigma) * exponential * _soft_clamp5_slope(raw_log_sigma)
    return torch.cat((dz * _soft_clamp5_slope(raw_mu), dlog_sigma), dim=1).to(parameters.dtype), deps


def pixel_head(logits: Tensor, eps_x: Tensor, *, with_log_p: bool) -> tuple[Tensor, Tensor | None]:
    """x and log p(x|z); see `vaebm_fast.ops.pixel_head.pixel_head`."""
    mu, log_sigma = (_soft_clamp5(raw) for raw in _raw_parameters(logits, eps_x))
    sigma = torch.exp(log_sigma) + _SIGMA_MIN
    x = torch.clamp(mu + sigma * eps_x, -1.0, 1.0) / 2 + 0.5
    if not with_log_p:
        return x, None
    sigma = torch.exp(log_sigma.clamp(min=_LOG_SIGMA_FLOOR)) + _SIGMA_MIN
    normalised = ((2 * x - 1) - mu) / sigma
    return x, (-0.5 * (normalised * normalised + _LOG_2PI) - torch.log(sigma)).flatten(1).sum(1)


def pixel_head_backward(dx: Tensor, dlog_p: Tensor | None, logits: Tensor, eps_x: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients; see `vaebm_fast.ops.pixel_head.pixel_head_backward`."""
    raw_mu, raw_log_sigma = _raw_parameters(logits, eps_x)
    mu, log_sigma = _soft_clamp5(raw_mu), _soft_clamp5(raw_log_sigma)
    sigma, sigma_of_p = (torch.exp(s) + _SIGMA_MIN for s in (log_sigma, log_sigma.clamp(min=_LOG_SIGMA_FLOOR)))
    unclamped = mu + sigma * eps_x
    normalised = (unclamped.clamp(-1.0, 1.0) - mu) / sigma_of_p
    weight = 0.0 if dlog_p is None else dlog_p[:, None, None, None]
    pull = weight * normalised / sigma_of_p
    dunclamped = (dx / 2 - pull) * ((unclamped >= -1) & (unclamped <= 1))
    dsigma = dunclamped * eps_x + weight * (normalised.square() - 1) / sigma_of_p * (log_sigma >= _LOG_SIGMA_FLOOR)
    dmu, dlog_sigma = dunclamped + pull, dsigma * torch.exp(log_sigma)
    slopes = _soft_clamp5_slope(raw_mu), _soft_clamp5_slope(raw_log_sigma)
    return torch.cat((dmu * slopes[0], dlog_sigma * slopes[1]), dim=1).to(logits.dtype), dunclamped * sigma


def _interpolate(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


class _BilinearUpsample(torch.autograd.Function):
    """`_interpolate` with a gradient that gathers."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _interpolate(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass  # the gradient depends only on dy

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return bilinear_upsample_backward(dy)


def _gather_bilinear(dy: Tensor, dim: int) -> Tensor:
    """Weighted sums of dy's rows (or columns) 2h - 1 .. 2h + 2, in this order; float32, or float64 for float64."""
    size = dy.shape[dim] // 2
    span, h = 2 * size - 1, torch.arange(size, device=dy.device)
    taps = torch.arange(-1, 3, device=dy.device)[:, None] + 2 * h  # [4, size]
    overlap = (span - (taps * (size - 1) - h * span).abs()).clamp(min=0)
    weights = overlap.to(torch.promote_types(dy.dtype, torch.float32)) / span
    first, *others = weights[:, :, None] if dim == 2 else weights
    padded = F.pad(dy, (0, 0, 1, 1) if dim == 2 else (1, 1))
    rows, *other_rows = padded.unfold(dim, 4, 2).unbind(-1)
    dx = first * rows
    for weight, rows in zip(others, other_rows, strict=True):
        dx = torch.addcmul(dx, weight, rows)
    return dx


def _raw_parameters(parameters: Tensor | None, eps: Tensor) -> tuple[Tensor, Tensor]:
    """Raw means and log sigmas in the dtype of eps; broadcastable zeros if parameters is None."""
    if parameters is None:
        return eps.new_zeros(1, 1, 1, 1), eps.new_zeros(1, 1, 1, 1)
    mu, log_sigma = parameters.to(eps.dtype).chunk(2, dim=1)
    return mu, log_sigma


def _soft_clamp5(x: Tensor) -> Tensor:
    return 5.0 * torch.tanh(x / 5.0)


def _soft_clamp5_slope(x: Tensor) -> Tensor:
    return 1 - torch.tanh(x / 5.0).square()


def _philox_quads(seeds: Tensor, draw: Tensor, stream: int, quads: int) -> Tensor:
    """Words of counters (0..quads-1, draw, stream, 0) as int64 in 0..2^32-1, [N, quads, 4]."""
    key0, key1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]  # [N, 1]
    c0 = torch.arange(quads, device=seeds.device).expand(seeds.shape[0], quads)
    c1 = (draw.reshape(()) & _MASK).expand_as(c0)
    c2, c3 = torch.full_like(c0, stream), torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _wide_product(0xD2511F53, c0)
        high1, low1 = _wide_product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _MASK, (key1 + 0xBB67AE85) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=2)


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a b for 32-bit a and b, by halves of a so that int64 does not overflow."""
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & _MASK


def _box_muller(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(-2 log u) (cos, sin)(2 pi b / 2^32) with u = a / 2^32 + 2^-33, on a new last axis of two."""
    u = a.to(torch.float32) * 2.0**-32 + 2.0**-33
    r = torch.sqrt((_log_of_unit(u) * -2.0).double()).float()  # fp32: torch's own square root is off by an ulp on a CPU
    cosine, sine = _cos_sin_of_turns(b)
    return torch.stack((r * cosine, r * sine), dim=-1)


def _log_of_unit(u: Tensor) -> Tensor:
    """log u for u in (0, 1]: log m by a polynomial for the m in [sqrt(1/2), sqrt 2) of u = 2^e m, plus e log 2."""
    bits = u.view(torch.int32)
    e = (bits - 0x3F3504F3) >> 23
    t = (bits - (e << 23)).view(torch.float32) - 1.0
    log_m = t + (t * t) * _horner(LOG_COEFFICIENTS, t)
    exponent = e.to(torch.float32)
    return exponent * LN2_HI + (exponent * LN2_LO + log_m)


def _cos_sin_of_turns(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi turns / 2^32 for int64 turns in 0..2^32-1, through the nearest quarter turn."""
    quarter = (turns + 2**29) >> 30
    x = (turns - (quarter << 30)).to(torch.float32) * RADIANS_PER_TURN
    x2 = x * x
    sine = x + (x * x2) * _horner(SIN_COEFFICIENTS, x2)
    cosine = x2 * _horner(COS_COEFFICIENTS, x2) + 1.0
    swap = (quarter & 1) == 1
    cosine, sine = torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)
    return (
        torch.where(((quarter + 1) & 2) == 2, -cosine, cosine),
        torch.where((quarter & 2) == 2, -sine, sine),
    )


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, highest power first; each step is one product and one sum."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


# The coefficients of csrc/math.h. Every number is a float32 written with nine digits.
LN2_HI, LN2_LO = 0.693359375, -2.12194440e-4
RADIANS_PER_TURN = 2 * math.pi / 2**32
# (log(1 + t) - t) / t^2 for 1 + t in [sqrt(1/2), sqrt 2)
LOG_COEFFICIENTS = (
    -0.0763640329, 0.127622008, -0.131596133, 0.142015815, -0.166234091, 0.200012416, -0.250008196, 0.333333313, -0.5,
)  # fmt: skip
# (sin x - x) / x^3 and (cos x - 1) / x^2 as functions of x^2, for |x| <= pi/4
SIN_COEFFICIENTS = (-1.95182904e-4, 8.33218917e-3, -0.166666552)
COS_COEFFICIENTS = (2.44323273e-5, -1.38873095e-3, 4.16666456e-2, -0.5)
