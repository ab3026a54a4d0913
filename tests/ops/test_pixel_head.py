"""Pixels and log p(x|z): the reference against the distribution, the kernels against it in fp64, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import (
    assert_as_accurate,
    assert_never_falls_back,
    assert_refused,
    assert_same_bits_for_any_number_of_threads,
    nhwc,
    strided,
)
from vaebm_fast import reference
from vaebm_fast.config import NoiseLayout
from vaebm_fast.models.distributions import GaussianPixels
from vaebm_fast.ops.gaussian_latent import gaussian_latent
from vaebm_fast.ops.pixel_head import pixel_head, pixel_head_backward

# N, C, H, W: one (a hundred times: the worst error of one number is luck); odd; grey; an image in several blocks
SHAPES = [(100, 1, 1, 1), (2, 17, 7, 9), (3, 1, 5, 31), (2, 3, 64, 64)]


def tensors(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, eps_x, and cotangents of x and log p, float32: pixels in and outside [-1, 1], log sigmas around -2."""
    N, C, H, W = shape
    logits = nhwc(N, 2 * C, H, W)
    logits[:, C:] -= 2
    return logits, nhwc(*shape), nhwc(*shape), torch.randn(N)


def plain(logits: Tensor, eps_x: Tensor) -> tuple[Tensor, Tensor]:
    pixels = GaussianPixels(logits)
    x = pixels.sample(eps_x)
    return x, pixels.log_prob(x)


def gradients(logits: Tensor, eps_x: Tensor, dx: Tensor, dlog_p: Tensor) -> tuple[Tensor, ...]:
    """By autograd of the distribution's own code."""
    inputs = (logits.detach().requires_grad_(), eps_x.detach().requires_grad_())
    return torch.autograd.grad(plain(*inputs), inputs, (dx, dlog_p))


def doubled(*arguments: Tensor) -> list[Tensor]:
    return [a.double() for a in arguments]


def around(value: float, steps: int = 50) -> Tensor:
    """The float32 numbers next to `value`, ascending, [2 steps + 1]."""
    bits = torch.tensor(value).view(torch.int32) + torch.arange(-steps, steps + 1, dtype=torch.int32)
    return bits.view(torch.float32).sort().values


def test_reference_equals_the_distribution_and_its_gradients() -> None:
    logits, eps_x, dx, dlog_p = doubled(*tensors((2, 3, 8, 5)))
    t = plain(logits, eps_x)[0]
    assert (t == 1).any() and (t == 0).any() and ((t > 0) & (t < 1)).any()
    torch.testing.assert_close(reference.pixel_head(logits, eps_x, with_log_p=True), plain(logits, eps_x))
    assert reference.pixel_head(logits, eps_x, with_log_p=False)[1] is None
    results = reference.pixel_head_backward(dx, dlog_p, logits, eps_x)
    torch.testing.assert_close(results, gradients(logits, eps_x, dx, dlog_p))


def test_reference_passes_gradcheck() -> None:
    logits, eps_x, dx, dlog_p = doubled(*tensors((2, 2, 2, 3)))
    inputs = (logits.requires_grad_(), eps_x.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, e: reference.pixel_head(a, e, with_log_p=True), inputs)
    assert torch.autograd.gradcheck(lambda a, e: reference.pixel_head_backward(dx, dlog_p, a, e), inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], compiled: None, poisoned_memory: None
) -> None:
    logits, eps_x, dx, dlog_p = tensors(shape)
    results = [*pixel_head(logits, eps_x, with_log_p=True, backend="cpp")]
    results += pixel_head_backward(dx, dlog_p, logits, eps_x, backend="cpp")
    fp32 = (*plain(logits, eps_x), *gradients(logits, eps_x, dx, dlog_p))
    fp64 = (*plain(*doubled(logits, eps_x)), *gradients(*doubled(logits, eps_x, dx, dlog_p)))
    for result, expected, truth in zip(results, fp32, fp64, strict=True):
        assert result is not None
        assert_as_accurate(result, expected, truth)
        assert result.dim() == 1 or result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("sign", [-1, 1])
def test_kernels_and_reference_clamp_where_autograd_does_and_pass_the_gradient_at_the_bound(
    sign: int, compiled: None
) -> None:
    """mu = 0 and sigma = 1.01 exactly: pixels run over the floats at the bound."""
    eps_x = around(sign / 1.01).reshape(1, 1, -1, 1)
    unclamped = torch.tensor(1.01) * eps_x
    assert (unclamped.abs() < 1).any() and (unclamped.abs() > 1).any() and (unclamped == sign).any()
    logits = torch.zeros(1, 2, eps_x.numel(), 1)
    dx, dlog_p = torch.randn_like(eps_x), torch.randn(1)
    expected = gradients(logits, eps_x, dx, dlog_p)
    assert torch.equal(expected[1] != 0, unclamped.abs() <= 1)
    for backend in ("reference", "cpp"):
        results = pixel_head_backward(dx, dlog_p, logits, eps_x, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(results[1] != 0, expected[1] != 0)
        torch.testing.assert_close(results, expected, rtol=1e-6, atol=1e-6)


def test_kernels_and_reference_pass_the_gradient_of_log_p_at_the_floor_of_log_sigma(compiled: None) -> None:
    """mu = eps = 0 leaves dlog_sigma = -[log sigma >= -2] e^-2 / sigma; each code's own rounding says where -2 is."""
    raw = around(5 * math.atanh(-0.4)).reshape(1, 1, -1, 1)
    zero, one = torch.zeros_like(raw), torch.ones(1)
    logits = torch.cat((zero, raw), dim=1)
    autograd = gradients(logits, zero, zero, one)[0][:, 1:] != 0
    for backend in ("reference", "cpp"):
        means_of = torch.cat((raw, zero), dim=1)
        log_sigma, _ = gaussian_latent(means_of, zero, 1.0, with_log_p=False, backend=backend)  # type: ignore[arg-type]
        assert (log_sigma == -2).any()
        dlogits, _ = pixel_head_backward(zero, one, logits, zero, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(dlogits[:, 1:] != 0, log_sigma >= -2)
        assert ((dlogits[:, 1:] != 0) != autograd).sum() <= (0 if backend == "reference" else 3)


def test_kernels_keep_nan_in_its_pixel_and_image(compiled: None) -> None:
    for channel in (0, 3):
        logits, eps_x, _, _ = tensors((2, 3, 2, 2))
        logits[1, channel, 0, 0] = torch.nan
        x, log_p = pixel_head(logits, eps_x, with_log_p=True, backend="cpp")
        assert log_p is not None
        assert x[1, 0, 0, 0].isnan() and x.isnan().sum() == 1
        assert log_p[0].isfinite() and log_p[1].isnan()


@pytest.mark.parametrize("shape", [(0, 3, 3, 3), (2, 0, 3, 3), (2, 3, 0, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors(shape)
    x, log_p = pixel_head(logits, eps_x, with_log_p=True, backend="cpp")
    assert log_p is not None
    assert x.shape == shape and torch.equal(log_p, torch.zeros(shape[0]))
    dlogits, deps_x = pixel_head_backward(dx, dlog_p, logits, eps_x, backend="cpp")
    assert dlogits.shape == logits.shape and deps_x.shape == shape


def test_kernels_have_the_same_bits_for_any_number_of_threads_and_place_in_the_batch(compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors((3, 3, 53, 47))

    def run() -> list[Any]:
        results = [*pixel_head(logits, eps_x, with_log_p=True, backend="cpp")]
        results += pixel_head_backward(dx, dlog_p, logits, eps_x, backend="cpp")
        part = [t[1:2] for t in (dx, dlog_p, logits, eps_x)]
        alone = [*pixel_head(part[2], part[3], with_log_p=True, backend="cpp")]
        alone += pixel_head_backward(*part, backend="cpp")
        assert all(torch.equal(a[1:2], b) for a, b in zip(results, alone, strict=True))
        return results

    assert_same_bits_for_any_number_of_threads(run)


def test_kernels_read_any_strides(compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors((2, 3, 5, 4))
    _, view = NoiseLayout([(5, 3, 4)], (3, 5, 4)).split(torch.randn(2, 120))
    view.copy_(eps_x)
    expected = [*pixel_head(logits, eps_x, with_log_p=True, backend="cpp")]
    expected += pixel_head_backward(dx, dlog_p, logits, eps_x, backend="cpp")
    for other in (strided, torch.Tensor.contiguous):
        results = [*pixel_head(other(logits), view, with_log_p=True, backend="cpp")]
        results += pixel_head_backward(other(dx), dlog_p, logits, other(eps_x), backend="cpp")
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("with_log_p", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_the_op_are_its_backward(backend: Any, with_log_p: bool, compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors((2, 3, 4, 6))
    inputs = (logits.requires_grad_(), eps_x.requires_grad_())
    x, log_p = pixel_head(logits, eps_x, with_log_p=with_log_p, backend=backend)
    assert (log_p is not None) == with_log_p
    outputs, cotangents = ((x, log_p), (dx, dlog_p)) if log_p is not None else ((x,), (dx,))
    results = torch.autograd.grad(outputs, inputs, cotangents)
    with torch.no_grad():
        weight = dlog_p if with_log_p else None
        expected = pixel_head_backward(dx, weight, logits, eps_x, backend=backend)
    torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_log_p", [False, True])
def test_cpp_ops_pass_opcheck(with_log_p: bool, compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors((2, 3, 4, 6))
    ops = torch.ops.vaebm_fast
    weight = dlog_p if with_log_p else None
    torch.library.opcheck(ops.pixel_head_backward.default, (dx, weight, logits, eps_x))
    torch.library.opcheck(ops.pixel_head.default, (logits, strided(eps_x), with_log_p))
    torch.library.opcheck(ops.pixel_head.default, (logits.requires_grad_(), eps_x.requires_grad_(), with_log_p))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    logits, eps_x, dx, _ = tensors((1, 3, 3, 3))
    x, _ = pixel_head(logits, eps_x.requires_grad_(), with_log_p=False, backend="cpp")
    (deps_x,) = torch.autograd.grad(x, eps_x, dx, create_graph=True)
    with pytest.raises(RuntimeError, match="pixel_head is differentiable once"):
        torch.autograd.grad(deps_x.square().sum(), eps_x)


def test_the_reference_widens_logits_and_narrows_their_gradient_and_compiled_backends_refuse(compiled: None) -> None:
    logits, eps_x, dx, dlog_p = tensors((1, 3, 3, 3))
    low = logits.bfloat16()
    x, log_p = pixel_head(low, eps_x, with_log_p=True, backend="reference")
    expected = pixel_head(low.float(), eps_x, with_log_p=True, backend="reference")
    assert expected[1] is not None and log_p is not None
    assert torch.equal(x, expected[0]) and torch.equal(log_p, expected[1])
    dlogits, deps_x = pixel_head_backward(dx, dlog_p, low, eps_x, backend="reference")
    assert dlogits.dtype == torch.bfloat16 and deps_x.dtype == torch.float32
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.bfloat16; ask for backend='reference'"):
            pixel_head(low, eps_x, with_log_p=True, backend=backend)  # type: ignore[arg-type]


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, eps_x, dx, _ = tensors((1, 3, 3, 3))
    run, back = pixel_head, pixel_head_backward
    assert_never_falls_back(monkeypatch, "pixel_head", lambda: run(logits, eps_x, with_log_p=True, backend="cpp"))
    assert_never_falls_back(monkeypatch, "pixel_head_backward", lambda: back(dx, None, logits, eps_x, backend="cpp"))


GIVEN: dict[str, Any] = {"logits": torch.zeros(1, 6, 3, 5), "eps_x": torch.zeros(1, 3, 3, 5)}
BAD = [
    ({"eps_x": torch.zeros(2, 3, 4)}, "eps_x must be float"),
    ({"logits": torch.zeros(1, 3, 3, 5)}, r"logits must be .*\[1, 6, 3, 5\]; it is "),
    ({"logits": torch.zeros(1, 6, 3, 5, dtype=torch.int32)}, "logits must be float"),
    ({"logits": torch.zeros(1, 6, 3, 5, device="meta")}, "logits is on meta; move it to cpu"),
]
BAD_BACKWARD = [
    *BAD,
    ({"dx": torch.zeros(1, 3, 3, 6)}, r"dx must be .*\[1, 3, 3, 5\]; it is "),
    ({"dx": torch.zeros(1, 3, 3, 5).double()}, "dx "),
    ({"dlog_p": torch.zeros(2)}, r"dlog_p must be .*\[1\]; it is "),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    assert_refused(pixel_head, torch.ops.vaebm_fast.pixel_head, {**GIVEN, "with_log_p": True} | change, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    given = {"dx": torch.zeros(1, 3, 3, 5), "dlog_p": torch.zeros(1), **GIVEN} | change
    assert_refused(pixel_head_backward, torch.ops.vaebm_fast.pixel_head_backward, given, sentence)
