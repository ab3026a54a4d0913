"""Depthwise convolution of a swish: the reference against autograd, the kernels against it in fp64, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.kernels import assert_as_accurate
from vaebm_fast import reference
from vaebm_fast.ops import _backend
from vaebm_fast.ops._backend import why_not
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward, pack_depthwise

# N, C, H, W, K: one pixel; odd; windows larger than the image; columns, channels and rows that take several tiles;
# each unrolled and the general window; a cell of a model
SHAPES = [
    (1, 1, 1, 1, 5),
    (2, 17, 7, 9, 5),
    (1, 3, 2, 4, 11),
    (1, 5, 3, 137, 3),
    (1, 150, 3, 70, 5),
    (2, 271, 9, 5, 3),
    (2, 8, 6, 5, 1),
    (1, 20, 9, 11, 7),
    (1, 33, 12, 19, 11),
    (1, 96, 32, 32, 5),
]


def tensors(shape: tuple[int, ...], upsample: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, weight [C, 1, K, K], bias and a cotangent, float32."""
    N, C, H, W, K = shape
    scale = 2 if upsample else 1
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    h = (3 * normal(N, C, H, W)).to(memory_format=torch.channels_last)
    dy = normal(N, C, scale * H, scale * W).to(memory_format=torch.channels_last)
    return h, normal(C, 1, K, K), normal(C), dy


def plain(h: Tensor, weight: Tensor, bias: Tensor, upsample: bool) -> Tensor:
    """The layers as a model writes them."""
    s = F.silu(h)
    if upsample:
        s = F.interpolate(s, scale_factor=2)
    return F.conv2d(s, weight, bias, padding=weight.shape[-1] // 2, groups=h.shape[1])


def plain_backward(dy: Tensor, h: Tensor, weight: Tensor, bias: Tensor, upsample: bool) -> Tensor:
    h = h.detach().requires_grad_()
    return torch.autograd.grad(plain(h, weight, bias, upsample), h, dy)[0]


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("K", [1, 3, 5])
def test_reference_equals_the_layers_of_a_model_and_their_gradient(K: int, upsample: bool) -> None:
    h, weight, bias, dy = (t.double() for t in tensors((2, 3, 4, 5, K), upsample))
    y = reference.depthwise_swish(h, pack_depthwise(weight), bias, upsample=upsample)
    dh = reference.depthwise_swish_backward(dy, h, pack_depthwise(weight), upsample=upsample)
    torch.testing.assert_close(y, plain(h, weight, bias, upsample))
    torch.testing.assert_close(dh, plain_backward(dy, h, weight, bias, upsample))


@pytest.mark.parametrize("upsample", [False, True])
def test_reference_passes_gradcheck_in_h(upsample: bool) -> None:
    h, weight, bias, dy = (t.double() for t in tensors((1, 2, 3, 4, 5), upsample))
    packed = pack_depthwise(weight)
    h.requires_grad_()
    assert torch.autograd.gradcheck(lambda h: reference.depthwise_swish(h, packed, bias, upsample=upsample), h)
    back = reference.depthwise_swish_backward
    assert torch.autograd.gradcheck(lambda h: back(dy, h, packed, upsample=upsample), h)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], upsample: bool, compiled: None, poisoned_memory: None
) -> None:
    h, weight, bias, dy = tensors(shape, upsample)
    packed = pack_depthwise(weight)
    y = depthwise_swish(h, packed, bias, upsample=upsample, backend="cpp")
    dh = depthwise_swish_backward(dy, h, packed, upsample=upsample, backend="cpp")
    truth = [t.double() for t in (h, weight, bias)]
    assert_as_accurate(y, plain(h, weight, bias, upsample), plain(*truth, upsample))
    plain_dh = plain_backward(dy, h, weight, bias, upsample)
    assert_as_accurate(dh, plain_dh, plain_backward(dy.double(), *truth, upsample))
    for result in (y, dh):
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3, 5), (2, 0, 3, 3, 3), (1, 4, 0, 3, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], upsample: bool, compiled: None) -> None:
    h, weight, bias, dy = tensors(shape, upsample)
    y = depthwise_swish(h, pack_depthwise(weight), bias, upsample=upsample, backend="cpp")
    dh = depthwise_swish_backward(dy, h, pack_depthwise(weight), upsample=upsample, backend="cpp")
    assert y.shape == dy.shape and dh.shape == h.shape


def test_kernel_swish_errs_by_at_most_3_ulp_and_its_slope_by_2_of_one(compiled: None) -> None:
    """A 1x1 window of weight 1 shows the function itself."""
    x = torch.cat((torch.linspace(-87, 87, 400_001), torch.linspace(-1e-3, 1e-3, 1001))).reshape(1, 1, -1, 1)
    one, zero = torch.ones(1, 1, 1), torch.zeros(1)
    exact = x.double() * torch.sigmoid(x.double())
    error = (depthwise_swish(x, one, zero, backend="cpp") - exact).abs()
    _, exponent = torch.frexp(exact)
    ulp = torch.ldexp(torch.ones_like(exact), (exponent - 24).clamp(min=-149))
    assert (error / ulp).max() <= 3
    sigmoid = torch.sigmoid(x.double())
    slope = depthwise_swish_backward(torch.ones_like(x), x, one, backend="cpp")
    assert (slope - sigmoid * (1 + x * (1 - sigmoid))).abs().max() <= 2 * 2.0**-23


def test_kernel_swish_is_zero_or_x_far_out_and_keeps_nan(compiled: None) -> None:
    x = torch.tensor([-1e30, -1e3, -90.0, 0.0, 90.0, 1e3, 1e30, torch.inf, torch.nan]).reshape(1, 1, -1, 1)
    y = depthwise_swish(x, torch.ones(1, 1, 1), torch.zeros(1), backend="cpp").flatten()
    assert y[1:3].abs().max() < 1e-33 and y[0].abs() < 1e-7  # the last: -1e30 e^-87
    assert y[3] == 0 and torch.equal(y[4:8], x.flatten()[4:8]) and y[8].isnan()
    slope = depthwise_swish_backward(torch.ones_like(x), x, torch.ones(1, 1, 1), backend="cpp").flatten()
    assert torch.allclose(slope[1:7], torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0, 1.0]), atol=1e-30) and slope[8].isnan()


@pytest.mark.parametrize("upsample", [False, True])
def test_kernels_have_the_same_bits_for_any_number_of_threads_and_place_in_the_batch(
    upsample: bool, compiled: None
) -> None:
    h, weight, bias, dy = tensors((3, 19, 40, 6, 5), upsample)
    packed = pack_depthwise(weight)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = [depthwise_swish(part, packed, bias, upsample=upsample, backend="cpp") for part in (h, h[1:2])]
            dh = depthwise_swish_backward(dy, h, packed, upsample=upsample, backend="cpp")
            assert torch.equal(y[0][1:2], y[1])
            results.append((y[0], dh))
    finally:
        torch.set_num_threads(threads)
    for y, dh in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(dh, results[0][1])


def test_kernels_read_any_strides(compiled: None) -> None:
    h, weight, bias, dy = tensors((2, 10, 6, 7, 3), False)
    packed = pack_depthwise(weight)
    expected = depthwise_swish(h, packed, bias, backend="cpp")
    expected_dh = depthwise_swish_backward(dy, h, packed, backend="cpp")
    wide = torch.full((2, 10, 6, 14), torch.nan)
    wide[..., ::2] = h
    strided_weight, strided_bias = packed.transpose(0, 1).contiguous().transpose(0, 1), bias.repeat_interleave(2)[::2]
    for view in (h.contiguous(), wide[..., ::2]):
        assert torch.equal(depthwise_swish(view, strided_weight, strided_bias, backend="cpp"), expected)
        result = depthwise_swish_backward(dy.contiguous(), view, strided_weight, backend="cpp")
        assert torch.equal(result, expected_dh)
    constant = torch.ones(()).expand_as(dy)
    result = depthwise_swish_backward(constant, h, packed, backend="cpp")
    assert torch.equal(result, depthwise_swish_backward(torch.ones_like(dy), h, packed, backend="cpp"))


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradient_of_the_op_is_its_backward(backend: Any, upsample: bool, compiled: None) -> None:
    h, weight, bias, dy = tensors((2, 5, 4, 6, 5), upsample)
    packed = pack_depthwise(weight)
    h.requires_grad_()
    y = depthwise_swish(h, packed, bias, upsample=upsample, backend=backend)
    (dh,) = torch.autograd.grad(y, h, dy)
    expected = depthwise_swish_backward(dy, h.detach(), packed, upsample=upsample, backend=backend)
    torch.testing.assert_close(dh, expected)


@pytest.mark.parametrize("upsample", [False, True])
def test_cpp_ops_pass_opcheck(upsample: bool, compiled: None) -> None:
    h, weight, bias, dy = tensors((2, 5, 4, 6, 3), upsample)
    packed = pack_depthwise(weight)
    ops = torch.ops.vaebm_fast
    torch.library.opcheck(ops.depthwise_swish.default, (h.clone().requires_grad_(), packed, bias, upsample))
    torch.library.opcheck(ops.depthwise_swish.default, (h.contiguous(), packed, bias, upsample))
    torch.library.opcheck(ops.depthwise_swish_backward.default, (dy, h, packed, upsample))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    h, weight, bias, dy = tensors((1, 2, 3, 3, 3), False)
    h.requires_grad_()
    y = depthwise_swish(h, pack_depthwise(weight), bias, backend="cpp")
    (dh,) = torch.autograd.grad(y, h, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(dh.square().sum(), h)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_gradient_for_weight_or_bias_is_refused(frozen: str, compiled: None) -> None:
    h, weight, bias, _ = tensors((1, 2, 3, 3, 3), False)
    packed = pack_depthwise(weight)
    {"weight": packed, "bias": bias}[frozen].requires_grad_()
    for backend in ("reference", "cpp"):
        with pytest.raises(ValueError, match="no gradient for weight and bias"):
            depthwise_swish(h, packed, bias, backend=backend)  # type: ignore[arg-type]
    y = torch.ops.vaebm_fast.depthwise_swish(h, packed, bias, False)
    with pytest.raises(RuntimeError, match="no gradient for weight and bias"):
        y.square().sum().backward()
    with torch.no_grad():
        depthwise_swish(h, packed, bias)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, bias, dy = tensors((1, 2, 3, 3, 3), False)
    packed = pack_depthwise(weight)
    monkeypatch.setattr(_backend.extension, "_why_missing", "the compiled part has not been built")
    with pytest.raises(RuntimeError, match="depthwise_swish cannot run with backend='cpp': the compiled part has not"):
        depthwise_swish(h, packed, bias, backend="cpp")
    with pytest.raises(RuntimeError, match="depthwise_swish_backward cannot run with backend='cpp'"):
        depthwise_swish_backward(dy, h, packed, backend="cpp")
    assert torch.equal(depthwise_swish(h, packed, bias), reference.depthwise_swish(h, packed, bias))


BAD = [
    ({"h": torch.zeros(2, 3, 4)}, "h must be float"),
    ({"weight": torch.zeros(3, 3, 2)}, "with the C = 4 of h"),
    ({"weight": torch.zeros(4, 1, 3, 3)}, "with the C = 4 of h"),
    ({"weight": torch.zeros(2, 2, 4)}, "The window is 2x2; it must be square and odd"),
    ({"weight": torch.zeros(3, 5, 4)}, "The window is 3x5; it must be square and odd"),
    ({"weight": torch.zeros(3, 3, 4, dtype=torch.float64)}, "weight "),
    ({"weight": torch.zeros(3, 3, 4, device="meta")}, "weight is on meta"),
]
BAD_FORWARD = [*BAD, ({"bias": torch.zeros(5)}, "bias must be"), ({"bias": torch.zeros(4).double()}, "bias ")]
BAD_BACKWARD = [*BAD, ({"dy": torch.zeros(1, 4, 6, 10)}, "dy must "), ({"dy": torch.zeros(1, 4, 3, 5).double()}, "dy ")]


@pytest.mark.parametrize(("change", "sentence"), BAD_FORWARD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    given = {"h": torch.zeros(1, 4, 3, 5), "weight": torch.zeros(3, 3, 4), "bias": torch.zeros(4)} | change
    refused(depthwise_swish, torch.ops.vaebm_fast.depthwise_swish, given, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    given = {"dy": torch.zeros(1, 4, 3, 5), "h": torch.zeros(1, 4, 3, 5), "weight": torch.zeros(3, 3, 4)} | change
    refused(depthwise_swish_backward, torch.ops.vaebm_fast.depthwise_swish_backward, given, sentence)


def refused(face: Any, op: Any, given: dict[str, Tensor], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        face(**given)
    on_cpu = all(tensor.device.type == "cpu" for tensor in given.values())
    if on_cpu and why_not("depthwise_swish", torch.device("cpu"), "cpp") is None:
        with pytest.raises(ValueError, match=sentence):
            op(**given, upsample=False)


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    h, weight, bias, _ = (t.double() for t in tensors((1, 2, 3, 3, 3), False))
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            depthwise_swish(h, pack_depthwise(weight), bias, backend=backend)  # type: ignore[arg-type]
    assert depthwise_swish(h, pack_depthwise(weight), bias, backend="reference").dtype == torch.float64


def test_only_a_depthwise_weight_is_packed() -> None:
    weight = torch.arange(18.0).reshape(2, 1, 3, 3)
    packed = pack_depthwise(weight)
    assert packed.shape == (3, 3, 2) and packed.is_contiguous() and packed[1, 2, 1] == weight[1, 0, 1, 2]
    with pytest.raises(ValueError, match=r"A depthwise weight is \[C, 1, K, K\]; this one is \[2, 2, 3, 3\]"):
        pack_depthwise(torch.zeros(2, 2, 3, 3))
