"""bias + sum_chw weight[c] swish(y + shift + skip_scale * skip): reference against autograd, kernels against that."""

from __future__ import annotations

from typing import Any

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
)
from vaebm_fast import reference
from vaebm_fast.ops.energy_head import energy_head, energy_head_backward

# one; odd; ragged; several chunks of pixels; more channels than a chunk
SHAPES = [(1, 1, 1, 1), (2, 17, 7, 9), (3, 5, 1, 31), (2, 64, 32, 32), (2, 5000, 2, 3)]
# The skip's scale and whether there is a shift; None is no skip.
TERMS = pytest.mark.parametrize(("scale", "shifted"), [(None, False), (None, True), (1.0, False), (1 / 1.1, True)])


def arguments(shape: tuple[int, ...], scale: float | None, shifted: bool = True) -> tuple[Any, ...]:
    """y, skip, skip_scale, shift, weight, bias, float32."""
    skip = None if scale is None else nhwc(*shape, scale=3)
    shift, linear = 3 * torch.randn(shape[1]) if shifted else None, (torch.randn(shape[1]), torch.randn(1))
    return nhwc(*shape, scale=3), skip, 1.0 if scale is None else scale, shift, *linear


def plain(
    y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None, weight: Tensor, bias: Tensor
) -> Tensor:
    y = y if shift is None else y + shift[:, None, None]
    u = F.silu(y if skip is None else y + skip_scale * skip)
    return (weight[:, None, None] * u).sum(dim=(1, 2, 3)) + bias


def plain_backward(denergy: Tensor, y: Tensor, *rest: Any) -> Tensor:
    y = y.detach().requires_grad_()
    return torch.autograd.grad(plain(y, *rest), y, denergy)[0]


def doubled(*arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


@TERMS
def test_reference_equals_plain_pytorch_and_its_gradient(scale: float | None, shifted: bool) -> None:
    given = doubled(*arguments((2, 3, 4, 5), scale, shifted))
    denergy = torch.randn(2).double()
    torch.testing.assert_close(reference.energy_head(*given), plain(*given))
    dt = reference.energy_head_backward(denergy, *given[:-1])
    torch.testing.assert_close(dt, plain_backward(denergy, *given))


def test_reference_passes_gradcheck() -> None:
    y, skip, _, shift, weight, bias = doubled(*arguments((2, 2, 3, 2), 0.9))
    denergy = torch.randn(2).double()
    inputs = (y.requires_grad_(), skip.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, skip: reference.energy_head(y, skip, 0.9, shift, weight, bias), inputs)
    backward = lambda y, skip: reference.energy_head_backward(denergy, y, skip, 0.9, shift, weight)  # noqa: E731
    assert torch.autograd.gradcheck(backward, inputs)


def test_reference_sums_in_the_precision_of_its_weights() -> None:
    y, *_, weight, bias = arguments((2, 3, 30, 30), None)
    y = y.bfloat16()
    energy = reference.energy_head(y, None, 1.0, None, weight, bias)
    activated = (weight[:, None, None] * F.silu(y).double()).sum(dim=(1, 2, 3)) + bias
    assert energy.dtype == torch.float32
    torch.testing.assert_close(energy.double(), activated, rtol=1e-5, atol=1e-4)
    assert reference.energy_head_backward(torch.randn(2), y, None, 1.0, None, weight).dtype == torch.bfloat16


@TERMS
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], scale: float | None, shifted: bool, compiled: None, poisoned_memory: None
) -> None:
    given, denergy = arguments(shape, scale, shifted), torch.randn(shape[0])
    energy = energy_head(*given, backend="cpp")
    dt = energy_head_backward(denergy, *given[:-1], backend="cpp")
    assert_as_accurate(energy, plain(*given), plain(*doubled(*given)))
    assert_as_accurate(dt, plain_backward(denergy, *given), plain_backward(*doubled(denergy, *given)))
    assert dt.is_contiguous(memory_format=torch.channels_last)


def test_kernel_adds_what_cancels_in_twice_the_precision(compiled: None) -> None:
    """The second half of the channels takes away what the first adds; float32 sums leave 2^-24 of the terms there."""
    half, weight = nhwc(4, 64, 16, 16, scale=3), torch.rand(64)
    y, weights = torch.cat((half, half.flip(1)), dim=1), torch.cat((weight, -weight.flip(0)))
    energy = energy_head(y, None, 1.0, None, weights, torch.zeros(1), backend="cpp")
    terms = (weight[:, None, None] * F.silu(half)).abs().sum(dim=(1, 2, 3))
    assert (energy.abs() <= 2.0**-40 * terms).all()


def test_kernels_keep_nan_in_its_image(compiled: None) -> None:
    y, *rest = arguments((3, 5, 6, 7), 1.0)
    y[1, 2, 3, 4] = torch.nan
    assert energy_head(y, *rest, backend="cpp").isnan().tolist() == [False, True, False]
    dt = energy_head_backward(torch.ones(3), y, *rest[:-1], backend="cpp")
    assert dt.isnan().nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    given = arguments(shape, 1.0)
    assert torch.equal(energy_head(*given, backend="cpp"), given[-1].expand(shape[0]))
    assert energy_head_backward(torch.ones(shape[0]), *given[:-1], backend="cpp").shape == shape


def test_kernels_have_the_same_bits_for_any_number_of_threads(compiled: None) -> None:
    given, denergy = arguments((3, 19, 40, 21), 0.9), torch.randn(3)
    assert_same_bits_for_any_number_of_threads(
        lambda: [energy_head(*given, backend="cpp"), energy_head_backward(denergy, *given[:-1], backend="cpp")]
    )


def test_kernels_give_an_image_the_same_bits_in_any_batch(compiled: None) -> None:
    y, skip, *rest = arguments((5, 19, 20, 21), 0.9)
    together = energy_head(y, skip, *rest, backend="cpp")
    alone = [energy_head(y[n : n + 1], skip[n : n + 1], *rest, backend="cpp") for n in range(5)]
    assert torch.equal(torch.cat(alone), together)


def test_kernels_read_any_strides(compiled: None) -> None:
    y, skip, scale, shift, weight, bias = arguments((2, 10, 6, 7), 0.9)
    denergy = torch.randn(2)
    expected = energy_head(y, skip, scale, shift, weight, bias, backend="cpp")
    expected_dt = energy_head_backward(denergy, y, skip, scale, shift, weight, backend="cpp")
    given = strided(y), skip.contiguous(), scale, strided(shift[None])[0], strided(weight[None])[0]
    assert torch.equal(energy_head(*given, bias, backend="cpp"), expected)
    assert torch.equal(energy_head_backward(strided(denergy[None])[0], *given, backend="cpp"), expected_dt)


@TERMS
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_the_op_are_its_backward(backend: Any, scale: float | None, shifted: bool, compiled: None) -> None:
    given, denergy = arguments((2, 5, 4, 6), scale, shifted), torch.randn(2)
    inputs = [t.requires_grad_() for t in given[:2] if t is not None]
    gradients = torch.autograd.grad(energy_head(*given, backend=backend), inputs, denergy)
    with torch.no_grad():
        dt = energy_head_backward(denergy, *given[:-1], backend=backend)
    for gradient, factor in zip(gradients, (1.0, given[2]), strict=False):
        torch.testing.assert_close(gradient, factor * dt)


@TERMS
def test_cpp_ops_pass_opcheck(scale: float | None, shifted: bool, compiled: None) -> None:
    y, skip, *rest = arguments((2, 5, 4, 6), scale, shifted)
    ops = torch.ops.vaebm_fast
    torch.library.opcheck(ops.energy_head_backward.default, (torch.randn(2), y, skip, *rest[:-1]))
    torch.library.opcheck(ops.energy_head.default, (y.contiguous(), skip, *rest))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (y, skip)]
    torch.library.opcheck(ops.energy_head.default, (*leaves, *rest))


def test_a_second_derivative_and_gradients_of_weights_are_refused(compiled: None) -> None:
    y, *frozen = arguments((1, 2, 3, 3), None)
    y.requires_grad_()
    energy = energy_head(y, *frozen, backend="cpp")
    (dt,) = torch.autograd.grad(energy, y, torch.randn(1), create_graph=True)
    with pytest.raises(RuntimeError, match="energy_head is differentiable once"):
        torch.autograd.grad(dt.square().sum(), y)
    for index in (2, 3, 4):
        given = [t.clone().requires_grad_() if i == index else t for i, t in enumerate(frozen)]
        with pytest.raises(ValueError, match="energy_head has no gradient for its weights; detach them"):
            energy_head(y, *given)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given, denergy = arguments((1, 2, 3, 3), 1.0), torch.randn(1)
    assert_never_falls_back(monkeypatch, "energy_head", lambda: energy_head(*given, backend="cpp"))
    back = "energy_head_backward"
    assert_never_falls_back(monkeypatch, back, lambda: energy_head_backward(denergy, *given[:-1], backend="cpp"))
    assert torch.equal(energy_head(*given), reference.energy_head(*given))


BAD: list[tuple[dict[str, Tensor], str]] = [
    ({"y": torch.zeros(2, 3, 4)}, "y must be float"),
    ({"skip": torch.zeros(2, 4, 3, 6)}, r"skip must be .*\[2, 4, 3, 5\]; it is "),
    ({"skip": torch.zeros(2, 4, 3, 5, device="meta")}, "skip is on meta; move it to cpu"),
    ({"shift": torch.zeros(5)}, r"shift must be .*\[4\]; it is "),
    ({"shift": torch.zeros(4, dtype=torch.float64)}, "shift "),
    ({"weight": torch.zeros(1, 4)}, r"weight must be .*\[4\]; it is "),
    ({"weight": torch.zeros(4, dtype=torch.float64)}, "weight "),
]
BAD_FORWARD = [*BAD, ({"bias": torch.zeros(2)}, r"bias must be .*\[1\]; it is ")]
BAD_BACKWARD = [*BAD, ({"denergy": torch.zeros(1)}, r"denergy must be .*\[2\]; it is ")]


def zeros(**change: Tensor) -> dict[str, Any]:
    image = torch.zeros(2, 4, 3, 5)
    vectors = {"shift": torch.zeros(4), "weight": torch.zeros(4)}
    return {"y": image, "skip": image, "skip_scale": 1.0, **vectors} | change


@pytest.mark.parametrize(("change", "sentence"), BAD_FORWARD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    given = zeros(**{"bias": torch.zeros(1), **change})
    assert_refused(energy_head, torch.ops.vaebm_fast.energy_head, given, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    given = zeros(**{"denergy": torch.zeros(2), **change})
    assert_refused(energy_head_backward, torch.ops.vaebm_fast.energy_head_backward, given, sentence)


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    given = doubled(*arguments((1, 2, 3, 3), None))
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            energy_head(*given, backend=backend)  # type: ignore[arg-type]
    assert energy_head(*given, backend="reference").dtype == torch.float64
