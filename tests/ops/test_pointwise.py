"""Pointwise convolution: the reference against autograd, the kernels against it in fp64, layouts, bad arguments."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
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
from vaebm_fast.ops import _backend, _checks
from vaebm_fast.ops.pointwise import PointwiseWeight, pack_pointwise, pointwise, pointwise_backward
from vaebm_fast.reference import Activation

# N, Cin, Cout, H, W: one number; ragged panels and rows; one, two, three and four panels; channels of several packed
# depths; rows of several tiles; a cell of a model
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 17, 3, 5),
    (1, 20, 16, 7, 1),
    (2, 33, 31, 2, 2),
    (1, 7, 48, 5, 5),
    (1, 40, 60, 9, 9),
    (1, 1030, 70, 3, 7),
    (3, 16, 100, 8, 9),
    (1, 96, 576, 16, 16),
]
ACTIVATIONS = pytest.mark.parametrize("activation", get_args(Activation))
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def tensors(shape: tuple[int, ...]) -> Case:
    """x, weight [Cout, Cin], bias, residual and a cotangent, float32."""
    N, Cin, Cout, H, W = shape
    like_y = N, Cout, H, W
    return nhwc(N, Cin, H, W, scale=3), torch.randn(Cout, Cin), torch.randn(Cout), nhwc(*like_y), nhwc(*like_y)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Activation) -> Tensor:
    """The layers as a model writes them."""
    x = {"none": lambda x: x, "swish": F.silu, "elu": F.elu}[activation](x)
    y = F.conv2d(x, weight[:, :, None, None], bias)
    return y if residual is None else y + residual


def activated(x: Tensor, activation: Activation) -> Tensor | None:
    """What the backward wants to see of x."""
    return None if activation == "none" else x


def plain_backward(dy: Tensor, x: Tensor, weight: Tensor, activation: Activation) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(plain(x, weight, None, None, activation), x, dy)[0]


@ACTIVATIONS
def test_reference_equals_the_layers_of_a_model_and_passes_gradcheck(activation: Activation) -> None:
    x, weight, bias, residual, dy = (t.double() for t in tensors((2, 5, 3, 2, 4)))
    y = reference.pointwise(x, weight, bias, residual, activation=activation)
    torch.testing.assert_close(y, plain(x, weight, bias, residual, activation))
    dx = reference.pointwise_backward(dy, weight, activated(x, activation), activation=activation)
    torch.testing.assert_close(dx, plain_backward(dy, x, weight, activation))
    inputs = (x.requires_grad_(), residual.requires_grad_())
    slow = partial(reference.pointwise, activation=activation)
    assert torch.autograd.gradcheck(lambda x, r: slow(x, weight, bias, r), inputs)


@ACTIVATIONS
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], activation: Activation, compiled: None, poisoned_memory: None
) -> None:
    x, weight, bias, residual, dy = case = tensors(shape)
    packed = pack_pointwise(weight, "cpp")
    truth = [t.double() for t in case]
    for b, r in ((bias, residual), (bias, None), (None, None)):
        y = pointwise(x, packed, b, r, activation=activation)
        wide = [None if t is None else t.double() for t in (b, r)]
        assert_as_accurate(y, plain(x, weight, b, r, activation), plain(truth[0], truth[1], *wide, activation))
        assert y.is_contiguous(memory_format=torch.channels_last)
    dx = pointwise_backward(dy, packed, activated(x, activation), activation=activation)
    exact = plain_backward(truth[4], truth[0], truth[1], activation)
    assert_as_accurate(dx, plain_backward(dy, x, weight, activation), exact)
    assert dx.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2, 2), (1, 4, 3, 0, 5), (1, 0, 3, 2, 2), (1, 4, 0, 2, 2)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None, poisoned_memory: None) -> None:
    """Without input channels nothing but the bias and the residual is left, without output channels a gradient of 0."""
    x, weight, bias, residual, dy = tensors(shape)
    packed = pack_pointwise(weight, "cpp")
    y = pointwise(x, packed, bias, residual)
    assert torch.equal(y, bias[:, None, None] + residual if shape[1] == 0 else torch.empty_like(residual))
    assert torch.equal(pointwise_backward(dy, packed), torch.zeros_like(x))


@pytest.mark.parametrize("activation", ["swish", "elu"])
def test_kernels_have_the_same_bits_for_any_number_of_threads_and_place_in_the_batch(
    activation: Activation, compiled: None
) -> None:
    x, weight, bias, residual, dy = tensors((3, 37, 131, 9, 8))
    packed = pack_pointwise(weight, "cpp")
    forward, backward = (partial(run, activation=activation) for run in (pointwise, pointwise_backward))
    assert_same_bits_for_any_number_of_threads(lambda: [forward(x, packed, bias, residual), backward(dy, packed, x)])
    y, dx = forward(x, packed, bias, residual), backward(dy, packed, x)
    assert torch.equal(forward(x[1:2], packed, bias, residual[1:2]), y[1:2])
    assert torch.equal(backward(dy[1:2], packed, x[1:2]), dx[1:2])


def test_kernels_give_elu_and_its_slope_within_few_ulp_and_keep_nan(compiled: None) -> None:
    """One channel and a weight of 1: nothing but the activation. Near 0, too, where exp(x) - 1 would cancel."""
    one = pack_pointwise(torch.ones(1, 1), "cpp")
    small = torch.logspace(-30, 0, 20_001)
    x = torch.cat((torch.linspace(-80, 80, 100_001), small, -small)).reshape(1, 1, -1, 1)
    assert ulps(pointwise(x, one, activation="elu"), torch.expm1(x.double()).where(x < 0, x.double())).max() <= 3
    slope = pointwise_backward(torch.ones_like(x), one, x, activation="elu")
    assert ulps(slope, x.double().clamp(max=0).exp()).max() <= 3
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -1e3, 0.0]).reshape(1, 1, -1, 1)
    y = pointwise(x, one, activation="elu").flatten()
    assert y[0].isnan() and y[1:].tolist() == [torch.inf, -1, -1, 0]
    slope = pointwise_backward(torch.ones_like(x), one, x, activation="elu").flatten()
    assert slope[0].isnan() and slope[1] == 1 and (slope[2:4] < 1e-33).all() and slope[4] == 1


def test_kernels_read_any_strides(compiled: None) -> None:
    x, weight, bias, residual, dy = tensors((2, 10, 20, 3, 4))
    packed = pack_pointwise(weight, "cpp")
    forward, backward = (partial(run, activation="elu") for run in (pointwise, pointwise_backward))
    expected, expected_dx = forward(x, packed, bias, residual), backward(dy, packed, x)
    for change in (Tensor.contiguous, strided):
        assert torch.equal(forward(change(x), packed, bias, change(residual)), expected)
        assert torch.equal(backward(change(dy), packed, change(x)), expected_dx)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@ACTIVATIONS
def test_gradient_of_the_op_is_its_backward(backend: Any, activation: Activation, compiled: None) -> None:
    x, weight, bias, residual, dy = tensors((2, 6, 19, 3, 4))
    packed = pack_pointwise(weight, backend)
    x.requires_grad_(), residual.requires_grad_()
    y = pointwise(x, packed, bias, residual, activation=activation, backend=backend)
    dx, dresidual = torch.autograd.grad(y, (x, residual), dy)
    given = activated(x.detach(), activation)
    torch.testing.assert_close(dx, pointwise_backward(dy, packed, given, activation=activation, backend=backend))
    assert torch.equal(dresidual, dy)


@ACTIVATIONS
def test_cpp_ops_pass_opcheck(activation: Activation, compiled: None) -> None:
    x, weight, bias, residual, dy = tensors((2, 5, 18, 4, 6))
    forward, backward = pack_pointwise(weight, "cpp")
    ops = torch.ops.vaebm_fast
    for r in (residual.requires_grad_(), None):
        given = x.clone().requires_grad_(), forward, backward, bias, r, activation
        torch.library.opcheck(ops.pointwise.default, given)
    torch.library.opcheck(ops.pointwise_backward.default, (dy, backward, 5, activated(x, activation), activation))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    x, weight, *_, dy = tensors((1, 2, 3, 3, 3))
    x.requires_grad_()
    y = pointwise(x, pack_pointwise(weight, "cpp"), activation="elu")
    (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="pointwise is differentiable once"):
        torch.autograd.grad(dx.square().sum(), x)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_a_gradient_for_weight_or_bias_is_refused(backend: Any, compiled: None) -> None:
    x, weight, bias, *_ = tensors((1, 2, 3, 3, 3))
    packed = pack_pointwise(weight, backend)
    for index in range(2):
        frozen = [packed.forward.clone(), bias.clone()]
        frozen[index].requires_grad_()
        with pytest.raises(ValueError, match="pointwise has no gradient for its weights; detach them"):
            pointwise(x, PointwiseWeight(frozen[0], packed.backward), frozen[1])
    with torch.no_grad():
        pointwise(x, packed, bias.clone().requires_grad_())


def test_a_layout_says_which_backend_reads_it(compiled: None) -> None:
    x, weight, *_ = tensors((1, 2, 3, 3, 3))
    with pytest.raises(ValueError, match=r"cpp layout, which backend='reference' does not read.*\(weight, 'reference'"):
        pointwise(x, pack_pointwise(weight, "cpp"), backend="reference")
    with pytest.raises(ValueError, match=r"plain layout, which backend='cpp' does not read.*\(weight, 'cpp'\)"):
        pointwise(x, pack_pointwise(weight, "reference"), backend="cpp")


def test_a_packed_weight_is_panels_of_sixteen_outputs_with_zeros_behind_the_last() -> None:
    weight = torch.randn(21, 3)
    forward, backward = packed = pack_pointwise(weight[:, :, None, None], "cpp")
    assert packed.shape == (21, 3) == pack_pointwise(weight, "reference").shape
    assert forward.shape == (2, 3, 16) and backward is not None and backward.shape == (1, 21, 16)
    assert forward[1, 2, 4] == weight[20, 2] and (forward[1, :, 5:] == 0).all()
    assert torch.equal(backward[0, :, :3], weight) and (backward[0, :, 3:] == 0).all()
    with pytest.raises(ValueError, match=r"A pointwise weight is \[Cout, Cin\] or .*; this one is \[2, 2, 3, 3\]"):
        pack_pointwise(torch.zeros(2, 2, 3, 3), "cpp")


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, *_, dy = tensors((1, 2, 3, 3, 3))
    packed = pack_pointwise(weight, "cpp")
    assert_never_falls_back(monkeypatch, "pointwise", lambda: pointwise(x, packed, backend="cpp"))
    assert_never_falls_back(monkeypatch, "pointwise_backward", lambda: pointwise_backward(dy, packed, backend="cpp"))


def test_cpu_refuses_float64_and_the_reference_takes_it(compiled: None) -> None:
    x, weight, *_ = (t.double() for t in tensors((1, 2, 3, 3, 3)))
    with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
        pointwise(x, pack_pointwise(weight, "cpp"))
    assert pointwise(x, pack_pointwise(weight, "reference")).dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 4, 4)}, r"x must be float.*\[N, C, H, W\]"),
        ({"x": torch.zeros(2, 5, 3, 3)}, "weight"),
        ({"bias": torch.zeros(5)}, r"bias must be .*\[6\]; it is .*\[5\]"),
        ({"bias": torch.zeros(6).double()}, "bias "),
        ({"residual": torch.zeros(2, 6, 3, 4)}, "residual must be .*"),
        ({"activation": "relu"}, "activation is 'relu'; it must be none, swish or elu"),
    ],
)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Any], sentence: str) -> None:
    packed = pack_pointwise(torch.zeros(6, 4), "cpp")
    given = {"x": torch.zeros(2, 4, 3, 3), "bias": torch.zeros(6), "residual": None, "activation": "none"} | change

    def op(**given: Any) -> Tensor:
        y: Tensor = torch.ops.vaebm_fast.pointwise(weight=packed[0], weight_t=packed[1], **given)
        return y

    assert_refused(lambda **given: pointwise(weight=packed, **given), op, given, sentence)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dy": torch.zeros(2, 4, 4)}, r"dy must be float.*\[N, C, H, W\]"),
        ({"dy": torch.zeros(2, 5, 3, 3)}, "weight"),
        ({"x": torch.zeros(2, 4, 3, 4), "activation": "elu"}, r"x must be .*; it is .*\[2, 4, 3, 4\]"),
        ({"activation": "relu"}, "activation is 'relu'; it must be none, swish or elu"),
        ({"activation": "elu"}, "activation is 'elu' and x is not given; x is"),
        ({"x": torch.zeros(2, 4, 3, 3)}, "activation is 'none' and x is given; x is"),
    ],
)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Any], sentence: str) -> None:
    packed = pack_pointwise(torch.zeros(6, 4), "cpp")
    given: dict[str, Any] = {"dy": torch.zeros(2, 6, 3, 3), "x": None, "activation": "none"} | change

    def op(**given: Any) -> Tensor:
        dx: Tensor = torch.ops.vaebm_fast.pointwise_backward(weight_t=packed[1], Cin=4, **given)
        return dx

    assert_refused(lambda **given: pointwise_backward(weight=packed, **given), op, given, sentence)


@pytest.mark.parametrize("activation", ["none", "swish", "elu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product_of_cublas_is_the_references_both_ways(
    activation: Any, with_residual: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, in float64: what cuBLAS is given, and what becomes of it."""
    monkeypatch.setattr(_backend, "why_not", lambda op, device, backend: None)
    monkeypatch.setattr(_checks, "require_dtype", lambda op, backend, dtype: None)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = pack_pointwise(torch.randn(7, 5, dtype=torch.float64), "cuda")
    bias = torch.randn(7, dtype=torch.float64) if with_bias else None
    residual = torch.randn(2, 7, 3, 4, dtype=torch.float64).requires_grad_() if with_residual else None
    given = [tensor for tensor in (x, residual) if tensor is not None]
    dy = torch.randn(2, 7, 3, 4, dtype=torch.float64)
    results = []
    for backend in ("cuda", "reference"):
        y = pointwise(x, weight, bias, residual, activation=activation, backend=backend)
        slope_of = None if activation == "none" else x.detach()
        results.append(
            [
                y,
                *torch.autograd.grad(y, given, dy),
                pointwise_backward(dy, weight, slope_of, activation=activation, backend=backend),
            ]
        )
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
