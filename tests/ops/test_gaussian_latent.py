"""Normal latents and log p: the reference against the distribution, the kernels against it in fp64, bad arguments."""

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
    ulps,
)
from vaebm_fast import reference
from vaebm_fast.config import NoiseLayout
from vaebm_fast.models.distributions import Normal
from vaebm_fast.ops.gaussian_latent import gaussian_latent, gaussian_latent_backward

# N, L, H, W: one (a hundred times: the worst error of one number is luck); odd; fewer latents than a vector; more than
# a block; a group of a model, in several blocks
SHAPES = [(100, 1, 1, 1), (2, 17, 7, 9), (3, 3, 5, 31), (1, 2100, 2, 1), (2, 20, 32, 32)]
KINDS = [(True, 1.0), (True, 0.7), (False, 0.7)]  # with parameters or the top prior; temperature


def tensors(shape: tuple[int, ...], with_parameters: bool = True) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """parameters that reach the soft clamp, eps, and cotangents of z and log p, float32."""
    N, L, H, W = shape
    parameters = nhwc(N, 2 * L, H, W, scale=4) if with_parameters else None
    return parameters, nhwc(*shape), nhwc(*shape), torch.randn(N)


def plain(parameters: Tensor | None, eps: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """z, and log p by the density of the distribution; the means, at most 5, cancel there, so in fp64 alone exact."""
    N, L, H, W = eps.shape
    raw = eps.new_zeros(N, 2 * L, H, W) if parameters is None else parameters
    prior = Normal.from_raw(raw[:, :L], raw[:, L:], temperature)
    z = prior.sample(eps)
    return z, prior.log_prob(z).flatten(1).sum(1)


def doubled(*arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


def gradients(run: Any, parameters: Tensor | None, eps: Tensor, dz: Tensor, dlog_p: Tensor) -> list[Tensor]:
    """By autograd, for parameters (where there are some) and eps."""
    inputs = [t.detach().requires_grad_() for t in (parameters, eps) if t is not None]
    outputs = run(*inputs) if parameters is not None else run(None, *inputs)
    return list(torch.autograd.grad(outputs, inputs, (dz, dlog_p)))


@pytest.mark.parametrize(("with_parameters", "temperature"), KINDS)
def test_reference_equals_the_distribution_and_its_gradients(with_parameters: bool, temperature: float) -> None:
    parameters, eps, dz, dlog_p = doubled(*tensors((2, 3, 4, 5), with_parameters))
    z, log_p = reference.gaussian_latent(parameters, eps, temperature, with_log_p=True)
    torch.testing.assert_close((z, log_p), plain(parameters, eps, temperature))
    assert reference.gaussian_latent(parameters, eps, temperature, with_log_p=False)[1] is None
    results = reference.gaussian_latent_backward(dz, dlog_p, parameters, eps, temperature)
    expected = gradients(lambda p, e: plain(p, e, temperature), parameters, eps, dz, dlog_p)
    torch.testing.assert_close([t for t in results if t is not None], expected)


def test_reference_passes_gradcheck() -> None:
    parameters, eps, dz, dlog_p = doubled(*tensors((2, 2, 1, 3)))
    inputs = (parameters.requires_grad_(), eps.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, e: reference.gaussian_latent(p, e, 0.7, with_log_p=True), inputs)
    assert torch.autograd.gradcheck(lambda p, e: reference.gaussian_latent_backward(dz, dlog_p, p, e, 0.7), inputs)


@pytest.mark.parametrize(("with_parameters", "temperature"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], with_parameters: bool, temperature: float, compiled: None, poisoned_memory: None
) -> None:
    parameters, eps, dz, dlog_p = tensors(shape, with_parameters)

    def slow(parameters: Tensor | None, eps: Tensor) -> tuple[Tensor, Tensor | None]:
        return reference.gaussian_latent(parameters, eps, temperature, with_log_p=True)

    results = gaussian_latent(parameters, eps, temperature, with_log_p=True, backend="cpp")
    for result, fp32, fp64 in zip(results, slow(parameters, eps), slow(*doubled(parameters, eps)), strict=True):
        assert result is not None and fp32 is not None and fp64 is not None
        assert_as_accurate(result, fp32, fp64)
    backward = gaussian_latent_backward(dz, dlog_p, parameters, eps, temperature, backend="cpp")
    given = [t for t in backward if t is not None]
    fp32_gradients = gradients(slow, parameters, eps, dz, dlog_p)
    truth = gradients(slow, *doubled(parameters, eps, dz, dlog_p))
    for result, fp32, fp64 in zip(given, fp32_gradients, truth, strict=True):
        assert_as_accurate(result, fp32, fp64)
    for image in (results[0], *given):
        assert image.is_contiguous(memory_format=torch.channels_last)


def elementary() -> Tensor:
    """Raw parameters of every size, each an image of one pixel."""
    x = torch.cat((torch.linspace(-40, 40, 100_001), torch.linspace(-4, 4, 50_001), torch.logspace(-30, 1, 5001)))
    return x.reshape(-1, 1, 1, 1)


def test_kernel_clamp_its_slope_exp_and_log_err_by_few_ulp(compiled: None) -> None:
    """Noise of 0 shows mu, of 1 over mu = 0 sigma, a gradient of 1 the slope, an image of one latent the log."""
    x = elementary()
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    clamped = 5 * torch.tanh(x.double() / 5)
    mu, _ = gaussian_latent(torch.cat((x, zero), 1), zero, 1.0, with_log_p=False, backend="cpp")
    assert ulps(mu, clamped).max() <= 2.5
    slope, _ = gaussian_latent_backward(one, None, torch.cat((x, x), 1), zero, 1.0, backend="cpp")
    assert slope is not None
    exact = 1 / torch.cosh(x.double() / 5) ** 2
    assert ((slope[:, :1] - exact).abs() / exact).max() <= 8 * 2.0**-23
    sigma, log_p = gaussian_latent(torch.cat((zero, x), 1), one, 1.0, with_log_p=True, backend="cpp")
    exact = clamped.exp() + 0.01
    assert log_p is not None
    torch_sigma, torch_log_p = reference.gaussian_latent(torch.cat((zero, x), 1), one, 1.0, with_log_p=True)
    assert torch_log_p is not None
    assert ulps(sigma, exact).max() <= 1.5 * ulps(torch_sigma, exact).max()
    exact = -0.5 - 0.5 * math.log(2 * math.pi) - exact.log().flatten()
    assert (log_p - exact).abs().max() <= 1.5 * (torch_log_p - exact).abs().max()


def test_kernels_keep_nan_in_its_latent_and_image(compiled: None) -> None:
    for channel in (0, 3):
        parameters, eps, _, _ = tensors((2, 3, 2, 2))
        assert parameters is not None
        parameters[1, channel, 0, 0] = torch.nan
        z, log_p = gaussian_latent(parameters, eps, 1.0, with_log_p=True, backend="cpp")
        assert log_p is not None
        assert z[1, 0, 0, 0].isnan() and z.isnan().sum() == 1
        assert log_p[0].isfinite() and log_p[1].isnan() == (channel == 3)  # eps alone is the normalised distance


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    parameters, eps, dz, dlog_p = tensors(shape)
    assert parameters is not None
    z, log_p = gaussian_latent(parameters, eps, 1.0, with_log_p=True, backend="cpp")
    assert log_p is not None
    assert z.shape == shape and torch.equal(log_p, torch.zeros(shape[0]))
    dparameters, deps = gaussian_latent_backward(dz, dlog_p, parameters, eps, 1.0, backend="cpp")
    assert dparameters is not None
    assert dparameters.shape == parameters.shape and deps.shape == shape


def test_kernels_have_the_same_bits_for_any_number_of_threads_and_place_in_the_batch(compiled: None) -> None:
    parameters, eps, dz, dlog_p = tensors((3, 20, 23, 17))
    assert parameters is not None

    def run() -> list[Any]:
        results = [*gaussian_latent(parameters, eps, 0.7, with_log_p=True, backend="cpp")]
        results += gaussian_latent_backward(dz, dlog_p, parameters, eps, 0.7, backend="cpp")
        part = [t[1:2] for t in (dz, dlog_p, parameters, eps)]
        alone = [*gaussian_latent(part[2], part[3], 0.7, with_log_p=True, backend="cpp")]
        alone += gaussian_latent_backward(*part, 0.7, backend="cpp")
        assert all(torch.equal(a[1:2], b) for a, b in zip(results, alone, strict=True))
        return results

    assert_same_bits_for_any_number_of_threads(run)


def test_kernels_read_any_strides(compiled: None) -> None:
    parameters, eps, dz, dlog_p = tensors((2, 5, 3, 4))
    assert parameters is not None
    flat = torch.randn(2, 200)
    (view, _), _ = NoiseLayout([(5, 3, 4), (1, 4, 8)], (3, 6, 6)).split(flat)
    view.copy_(eps)
    expected = [*gaussian_latent(parameters, eps, 0.7, with_log_p=True, backend="cpp")]
    expected += gaussian_latent_backward(dz, dlog_p, parameters, eps, 0.7, backend="cpp")
    for other in (strided, torch.Tensor.contiguous):
        results = [*gaussian_latent(other(parameters), view, 0.7, with_log_p=True, backend="cpp")]
        results += gaussian_latent_backward(other(dz), dlog_p, parameters, other(eps), 0.7, backend="cpp")
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    ones = gaussian_latent_backward(dz, torch.ones(2), parameters, eps, 0.7, backend="cpp")
    spread = gaussian_latent_backward(dz, torch.ones(()).expand(2), parameters, eps, 0.7, backend="cpp")
    assert torch.equal(ones[1], spread[1])


@pytest.mark.parametrize("with_log_p", [False, True])
@pytest.mark.parametrize("with_parameters", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_the_op_are_its_backward(
    backend: Any, with_parameters: bool, with_log_p: bool, compiled: None
) -> None:
    parameters, eps, dz, dlog_p = tensors((2, 5, 4, 6), with_parameters)
    inputs = [t.requires_grad_() for t in (parameters, eps) if t is not None]
    z, log_p = gaussian_latent(parameters, eps, 0.7, with_log_p=with_log_p, backend=backend)
    assert (log_p is not None) == with_log_p
    outputs, cotangents = ((z, log_p), (dz, dlog_p)) if log_p is not None else ((z,), (dz,))
    results = torch.autograd.grad(outputs, inputs, cotangents)
    with torch.no_grad():
        weight = dlog_p if with_log_p else None
        expected = gaussian_latent_backward(dz, weight, parameters, eps, 0.7, backend=backend)
    torch.testing.assert_close(list(results), [t for t in expected if t is not None], rtol=1e-5, atol=1e-5)


def test_either_output_may_go_unused(compiled: None) -> None:
    parameters, eps, dz, dlog_p = tensors((2, 5, 4, 6))
    assert parameters is not None
    outputs = gaussian_latent(parameters, eps.requires_grad_(), 0.7, with_log_p=True, backend="cpp")
    for output, cotangent in zip(outputs, (dz, dlog_p), strict=True):
        (deps,) = torch.autograd.grad(output, eps, cotangent, retain_graph=True)
        slow = reference.gaussian_latent(parameters, eps, 0.7, with_log_p=True)[0 if output is outputs[0] else 1]
        torch.testing.assert_close(deps, torch.autograd.grad(slow, eps, cotangent)[0])


@pytest.mark.parametrize("with_log_p", [False, True])
@pytest.mark.parametrize("with_parameters", [False, True])
def test_cpp_ops_pass_opcheck(with_parameters: bool, with_log_p: bool, compiled: None) -> None:
    parameters, eps, dz, dlog_p = tensors((2, 5, 4, 6), with_parameters)
    ops = torch.ops.vaebm_fast
    weight = dlog_p if with_log_p else None
    torch.library.opcheck(ops.gaussian_latent_backward.default, (dz, weight, parameters, eps, 0.7))
    torch.library.opcheck(ops.gaussian_latent.default, (parameters, strided(eps), 0.7, with_log_p))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (parameters, eps)]
    torch.library.opcheck(ops.gaussian_latent.default, (*leaves, 0.7, with_log_p))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    parameters, eps, dz, _ = tensors((1, 2, 3, 3))
    z, _ = gaussian_latent(parameters, eps.requires_grad_(), 1.0, with_log_p=False, backend="cpp")
    (deps,) = torch.autograd.grad(z, eps, dz, create_graph=True)
    with pytest.raises(RuntimeError, match="gaussian_latent is differentiable once"):
        torch.autograd.grad(deps.square().sum(), eps)


def test_the_reference_widens_parameters_and_narrows_their_gradient_and_compiled_backends_refuse(
    compiled: None,
) -> None:
    parameters, eps, dz, dlog_p = tensors((1, 2, 3, 3))
    assert parameters is not None
    low = parameters.bfloat16()
    z, log_p = gaussian_latent(low, eps, 1.0, with_log_p=True, backend="reference")
    expected = gaussian_latent(low.float(), eps, 1.0, with_log_p=True, backend="reference")
    assert expected[1] is not None and log_p is not None
    assert torch.equal(z, expected[0]) and torch.equal(log_p, expected[1])
    dparameters, deps = gaussian_latent_backward(dz, dlog_p, low, eps, 1.0, backend="reference")
    assert dparameters is not None and dparameters.dtype == torch.bfloat16 and deps.dtype == torch.float32
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.bfloat16; ask for backend='reference'"):
            gaussian_latent(low, eps, 1.0, with_log_p=True, backend=backend)  # type: ignore[arg-type]


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, eps, dz, _ = tensors((1, 2, 3, 3))
    run, back = gaussian_latent, gaussian_latent_backward
    name = "gaussian_latent"
    assert_never_falls_back(monkeypatch, name, lambda: run(parameters, eps, 1.0, with_log_p=True, backend="cpp"))
    assert_never_falls_back(
        monkeypatch, f"{name}_backward", lambda: back(dz, None, parameters, eps, 1.0, backend="cpp")
    )


GIVEN: dict[str, Any] = {"parameters": torch.zeros(1, 8, 3, 5), "eps": torch.zeros(1, 4, 3, 5), "temperature": 1.0}
BAD = [
    ({"eps": torch.zeros(2, 3, 4)}, "eps must be float"),
    ({"parameters": torch.zeros(1, 4, 3, 5)}, r"parameters must be .*\[1, 8, 3, 5\]; it is "),
    ({"parameters": torch.zeros(1, 8, 3, 5, dtype=torch.int32)}, "parameters must be float"),
    ({"parameters": torch.zeros(1, 8, 3, 5, device="meta")}, "parameters is on meta; move it to cpu"),
]
BAD_BACKWARD = [
    *BAD,
    ({"dz": torch.zeros(1, 4, 3, 6)}, r"dz must be .*\[1, 4, 3, 5\]; it is "),
    ({"dz": torch.zeros(1, 4, 3, 5).double()}, "dz "),
    ({"dlog_p": torch.zeros(2)}, r"dlog_p must be .*\[1\]; it is "),
]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    given = {**GIVEN, "with_log_p": True} | change
    assert_refused(gaussian_latent, torch.ops.vaebm_fast.gaussian_latent, given, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    given = {"dz": torch.zeros(1, 4, 3, 5), "dlog_p": torch.zeros(1), **GIVEN} | change
    assert_refused(gaussian_latent_backward, torch.ops.vaebm_fast.gaussian_latent_backward, given, sentence)
