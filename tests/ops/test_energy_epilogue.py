"""swish(y + shift + skip_scale * skip): the reference against autograd, the kernels against it in fp64, refusals."""

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
    ulps,
)
from vaebm_fast import reference
from vaebm_fast.ops.energy_epilogue import energy_epilogue, energy_epilogue_backward

SHAPES = [(1, 1, 1, 1), (2, 17, 7, 9), (3, 5, 1, 31), (2, 64, 32, 32)]  # one; odd; ragged; several tasks of threads
# The skip's scale and whether there is a shift; None is no skip.
TERMS = pytest.mark.parametrize(("scale", "shifted"), [(None, False), (None, True), (1.0, False), (1 / 1.1, True)])


def terms(shape: tuple[int, ...], scale: float | None, shifted: bool) -> tuple[Any, ...]:
    """y, skip, skip_scale and shift, float32."""
    skip = None if scale is None else nhwc(*shape, scale=3)
    shift = 3 * torch.randn(shape[1]) if shifted else None
    return nhwc(*shape, scale=3), skip, 1.0 if scale is None else scale, shift


def plain(y: Tensor, skip: Tensor | None, skip_scale: float, shift: Tensor | None) -> Tensor:
    y = y if shift is None else y + shift[:, None, None]
    return F.silu(y if skip is None else y + skip_scale * skip)


def plain_backward(du: Tensor, y: Tensor, *rest: Any) -> Tensor:
    y = y.detach().requires_grad_()
    return torch.autograd.grad(plain(y, *rest), y, du)[0]


def doubled(*arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


@TERMS
def test_reference_equals_plain_pytorch_and_its_gradient(scale: float | None, shifted: bool) -> None:
    given, du = doubled(*terms((2, 3, 4, 5), scale, shifted)), torch.randn(2, 3, 4, 5).double()
    torch.testing.assert_close(reference.energy_epilogue(*given), plain(*given))
    torch.testing.assert_close(reference.energy_epilogue_backward(du, *given), plain_backward(du, *given))


def test_reference_passes_gradcheck() -> None:
    y, skip, _, shift = doubled(*terms((1, 2, 3, 2), 0.9, True))
    du, inputs = torch.randn(1, 2, 3, 2).double(), (y.requires_grad_(), skip.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, skip: reference.energy_epilogue(y, skip, 0.9, shift), inputs)
    backward = lambda y, skip: reference.energy_epilogue_backward(du, y, skip, 0.9, shift)  # noqa: E731
    assert torch.autograd.gradcheck(backward, inputs)


@TERMS
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], scale: float | None, shifted: bool, compiled: None, poisoned_memory: None
) -> None:
    given, du = terms(shape, scale, shifted), nhwc(*shape)
    u = energy_epilogue(*given, backend="cpp")
    dt = energy_epilogue_backward(du, *given, backend="cpp")
    assert_as_accurate(u, plain(*given), plain(*doubled(*given)))
    assert_as_accurate(dt, plain_backward(du, *given), plain_backward(*doubled(du, *given)))
    for result in (u, dt):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_kernels_err_by_few_ulp_and_keep_nan(compiled: None) -> None:
    x = torch.linspace(-80, 80, 100_001).reshape(1, 1, -1, 1)
    exact = F.silu(x.double())
    assert ulps(energy_epilogue(x, backend="cpp"), exact).max() <= 3
    x = torch.tensor([torch.nan, torch.inf, -1e3]).reshape(1, 1, -1, 1)
    u = energy_epilogue(x, backend="cpp").flatten()
    assert u[0].isnan() and u[1] == torch.inf and u[2].abs() < 1e-33
    assert energy_epilogue_backward(torch.ones_like(x), x, backend="cpp").flatten()[0].isnan()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    given = terms(shape, 1.0, True)
    assert energy_epilogue(*given, backend="cpp").shape == shape
    assert energy_epilogue_backward(nhwc(*shape), *given, backend="cpp").shape == shape


def test_kernels_have_the_same_bits_for_any_number_of_threads(compiled: None) -> None:
    given, du = terms((3, 19, 40, 21), 0.9, True), nhwc(3, 19, 40, 21)
    assert_same_bits_for_any_number_of_threads(
        lambda: [energy_epilogue(*given, backend="cpp"), energy_epilogue_backward(du, *given, backend="cpp")]
    )


def test_kernels_read_any_strides(compiled: None) -> None:
    y, skip, scale, shift = terms((2, 10, 6, 7), 0.9, True)
    du, wide = nhwc(2, 10, 6, 7), strided(shift[None])[0]
    expected = energy_epilogue(y, skip, scale, shift, backend="cpp")
    expected_dt = energy_epilogue_backward(du, y, skip, scale, shift, backend="cpp")
    assert torch.equal(energy_epilogue(strided(y), skip.contiguous(), scale, wide, backend="cpp"), expected)
    result = energy_epilogue_backward(strided(du), y.contiguous(), strided(skip), scale, wide, backend="cpp")
    assert torch.equal(result, expected_dt)


@TERMS
@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_gradients_of_the_op_are_its_backward(backend: Any, scale: float | None, shifted: bool, compiled: None) -> None:
    given, du = terms((2, 5, 4, 6), scale, shifted), nhwc(2, 5, 4, 6)
    inputs = [t.requires_grad_() for t in given[:2] if t is not None]
    gradients = torch.autograd.grad(energy_epilogue(*given, backend=backend), inputs, du)
    with torch.no_grad():
        dt = energy_epilogue_backward(du, *given, backend=backend)
    for gradient, factor in zip(gradients, (1.0, given[2]), strict=False):
        torch.testing.assert_close(gradient, factor * dt)


@TERMS
def test_cpp_ops_pass_opcheck(scale: float | None, shifted: bool, compiled: None) -> None:
    y, skip, *rest = terms((2, 5, 4, 6), scale, shifted)
    ops = torch.ops.vaebm_fast
    torch.library.opcheck(ops.energy_epilogue_backward.default, (nhwc(2, 5, 4, 6), y, skip, *rest))
    torch.library.opcheck(ops.energy_epilogue.default, (y.contiguous(), skip, *rest))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (y, skip)]
    torch.library.opcheck(ops.energy_epilogue.default, (*leaves, *rest))


def test_a_second_derivative_and_a_gradient_of_the_shift_are_refused(compiled: None) -> None:
    y = nhwc(1, 2, 3, 3).requires_grad_()
    (dt,) = torch.autograd.grad(energy_epilogue(y, backend="cpp"), y, nhwc(1, 2, 3, 3), create_graph=True)
    with pytest.raises(RuntimeError, match="energy_epilogue is differentiable once"):
        torch.autograd.grad(dt.square().sum(), y)
    with pytest.raises(ValueError, match="energy_epilogue has no gradient for its weights; detach them"):
        energy_epilogue(y, shift=torch.zeros(2, requires_grad=True))
    u = torch.ops.vaebm_fast.energy_epilogue(y, None, 1.0, torch.zeros(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="energy_epilogue has no gradient for shift; detach it"):
        torch.autograd.grad(u.sum(), y)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    y, skip, *_ = terms((1, 2, 3, 3), 1.0, False)
    assert_never_falls_back(monkeypatch, "energy_epilogue", lambda: energy_epilogue(y, backend="cpp"))
    back = "energy_epilogue_backward"
    assert_never_falls_back(monkeypatch, back, lambda: energy_epilogue_backward(y, y, backend="cpp"))
    assert torch.equal(energy_epilogue(y, skip), reference.energy_epilogue(y, skip))


BAD = [
    ({"y": torch.zeros(2, 3, 4)}, "y must be float"),
    ({"skip": torch.zeros(1, 4, 3, 6)}, r"skip must be .*\[1, 4, 3, 5\]; it is "),
    ({"skip": torch.zeros(1, 4, 3, 5, dtype=torch.float64)}, "skip "),
    ({"skip": torch.zeros(1, 4, 3, 5, device="meta")}, "skip is on meta; move it to cpu"),
    ({"shift": torch.zeros(5)}, r"shift must be .*\[4\]; it is .*\[5\]"),
    ({"shift": torch.zeros(4, dtype=torch.float64)}, "shift "),
    ({"shift": torch.zeros(4, device="meta")}, "shift is on meta; move it to cpu"),
]
BAD_BACKWARD = [*BAD, ({"du": torch.zeros(1, 4, 3, 1)}, "du must be "), ({"du": torch.zeros(1, 4, 3, 5).int()}, "du ")]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    zeros = torch.zeros(1, 4, 3, 5)
    given: dict[str, Any] = {"y": zeros, "skip": zeros, "skip_scale": 1.0, "shift": torch.zeros(4)} | change
    assert_refused(energy_epilogue, torch.ops.vaebm_fast.energy_epilogue, given, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    zeros = torch.zeros(1, 4, 3, 5)
    frozen = {"skip_scale": 1.0, "shift": torch.zeros(4)}
    given: dict[str, Any] = {"du": zeros, "y": zeros, "skip": zeros, **frozen} | change
    assert_refused(energy_epilogue_backward, torch.ops.vaebm_fast.energy_epilogue_backward, given, sentence)


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    y = nhwc(1, 2, 3, 3).double()
    for backend in ("auto", "cpp"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            energy_epilogue(y, backend=backend)  # type: ignore[arg-type]
    assert energy_epilogue(y, backend="reference").dtype == torch.float64
