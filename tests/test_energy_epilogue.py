"""swish(y + skip_scale * skip): the twin against autograd, the kernels against the twin in fp64, bad arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernels import (
    assert_as_accurate,
    assert_never_falls_back,
    assert_refused,
    assert_same_bits_for_any_number_of_threads,
    nhwc,
    strided,
    ulps,
)
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops.energy_epilogue import energy_epilogue, energy_epilogue_backward

SHAPES = [(1, 1, 1, 1), (2, 17, 7, 9), (3, 5, 1, 31), (2, 64, 32, 32)]  # one; odd; ragged; several tasks of threads
SCALES = [None, 1.0, 1 / 1.1]  # of the skip; None is none


def tensors(shape: tuple[int, ...], scale: float | None) -> tuple[Tensor, Tensor | None, float, Tensor]:
    """y, skip, skip_scale and a cotangent, float32."""
    skip = None if scale is None else nhwc(*shape, scale=3)
    return nhwc(*shape, scale=3), skip, 1.0 if scale is None else scale, nhwc(*shape)


def plain(y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    return F.silu(y if skip is None else y + skip_scale * skip)


def plain_backward(du: Tensor, y: Tensor, skip: Tensor | None, skip_scale: float) -> Tensor:
    y = y.detach().requires_grad_()
    return torch.autograd.grad(plain(y, skip, skip_scale), y, du)[0]


def doubled(*arguments: Any) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("scale", SCALES)
def test_twin_equals_plain_pytorch_and_its_gradient(scale: float | None) -> None:
    y, skip, skip_scale, du = doubled(*tensors((2, 3, 4, 5), scale))
    torch.testing.assert_close(reference.energy_epilogue(y, skip, skip_scale), plain(y, skip, skip_scale))
    dt = reference.energy_epilogue_backward(du, y, skip, skip_scale)
    torch.testing.assert_close(dt, plain_backward(du, y, skip, skip_scale))


def test_twin_passes_gradcheck() -> None:
    y, skip, _, du = doubled(*tensors((1, 2, 3, 2), 0.9))
    inputs = (y.requires_grad_(), skip.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, skip: reference.energy_epilogue(y, skip, 0.9), inputs)
    assert torch.autograd.gradcheck(lambda y, skip: reference.energy_epilogue_backward(du, y, skip, 0.9), inputs)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_kernels_are_as_accurate_as_plain_pytorch(
    shape: tuple[int, ...], scale: float | None, compiled: None, poisoned_memory: None
) -> None:
    y, skip, skip_scale, du = tensors(shape, scale)
    u = energy_epilogue(y, skip, skip_scale, backend="cpu")
    dt = energy_epilogue_backward(du, y, skip, skip_scale, backend="cpu")
    assert_as_accurate(u, plain(y, skip, skip_scale), plain(*doubled(y, skip, skip_scale)))
    assert_as_accurate(dt, plain_backward(du, y, skip, skip_scale), plain_backward(*doubled(du, y, skip, skip_scale)))
    for result in (u, dt):
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_kernels_err_by_few_ulp_and_keep_nan(compiled: None) -> None:
    x = torch.linspace(-80, 80, 100_001).reshape(1, 1, -1, 1)
    exact = F.silu(x.double())
    assert ulps(energy_epilogue(x, backend="cpu"), exact).max() <= 3
    x = torch.tensor([torch.nan, torch.inf, -1e3]).reshape(1, 1, -1, 1)
    u = energy_epilogue(x, backend="cpu").flatten()
    assert u[0].isnan() and u[1] == torch.inf and u[2].abs() < 1e-33
    assert energy_epilogue_backward(torch.ones_like(x), x, backend="cpu").flatten()[0].isnan()


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 0, 3, 3)])
def test_kernels_take_empty_tensors(shape: tuple[int, ...], compiled: None) -> None:
    y, skip, skip_scale, du = tensors(shape, 1.0)
    assert energy_epilogue(y, skip, skip_scale, backend="cpu").shape == shape
    assert energy_epilogue_backward(du, y, skip, skip_scale, backend="cpu").shape == shape


def test_kernels_have_the_same_bits_for_any_number_of_threads(compiled: None) -> None:
    y, skip, skip_scale, du = tensors((3, 19, 40, 21), 0.9)
    assert_same_bits_for_any_number_of_threads(
        lambda: [
            energy_epilogue(y, skip, skip_scale, backend="cpu"),
            energy_epilogue_backward(du, y, skip, skip_scale, backend="cpu"),
        ]
    )


def test_kernels_read_any_strides(compiled: None) -> None:
    y, skip, skip_scale, du = tensors((2, 10, 6, 7), 0.9)
    assert skip is not None
    expected = energy_epilogue(y, skip, skip_scale, backend="cpu")
    expected_dt = energy_epilogue_backward(du, y, skip, skip_scale, backend="cpu")
    assert torch.equal(energy_epilogue(strided(y), skip.contiguous(), skip_scale, backend="cpu"), expected)
    result = energy_epilogue_backward(strided(du), y.contiguous(), strided(skip), skip_scale, backend="cpu")
    assert torch.equal(result, expected_dt)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients_of_the_op_are_its_backward(backend: Any, scale: float | None, compiled: None) -> None:
    y, skip, skip_scale, du = tensors((2, 5, 4, 6), scale)
    inputs = [t.requires_grad_() for t in (y, skip) if t is not None]
    gradients = torch.autograd.grad(energy_epilogue(y, skip, skip_scale, backend=backend), inputs, du)
    with torch.no_grad():
        dt = energy_epilogue_backward(du, y, skip, skip_scale, backend=backend)
    for gradient, factor in zip(gradients, (1.0, skip_scale), strict=False):
        torch.testing.assert_close(gradient, factor * dt)


@pytest.mark.parametrize("scale", SCALES)
def test_cpp_ops_pass_opcheck(scale: float | None, compiled: None) -> None:
    y, skip, skip_scale, du = tensors((2, 5, 4, 6), scale)
    ops = torch.ops.vaebm_fast
    torch.library.opcheck(ops.energy_epilogue_backward.default, (du, y, skip, skip_scale))
    torch.library.opcheck(ops.energy_epilogue.default, (y.contiguous(), skip, skip_scale))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (y, skip)]
    torch.library.opcheck(ops.energy_epilogue.default, (*leaves, skip_scale))


def test_a_second_derivative_is_refused(compiled: None) -> None:
    y = nhwc(1, 2, 3, 3).requires_grad_()
    (dt,) = torch.autograd.grad(energy_epilogue(y, backend="cpu"), y, nhwc(1, 2, 3, 3), create_graph=True)
    with pytest.raises(RuntimeError, match="energy_epilogue is differentiable once"):
        torch.autograd.grad(dt.square().sum(), y)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    y, skip, _, du = tensors((1, 2, 3, 3), 1.0)
    assert_never_falls_back(monkeypatch, "energy_epilogue", lambda: energy_epilogue(y, backend="cpu"))
    back = "energy_epilogue_backward"
    assert_never_falls_back(monkeypatch, back, lambda: energy_epilogue_backward(du, y, backend="cpu"))
    assert torch.equal(energy_epilogue(y, skip), reference.energy_epilogue(y, skip))


BAD = [
    ({"y": torch.zeros(2, 3, 4)}, "y must be float"),
    ({"skip": torch.zeros(1, 4, 3, 6)}, r"skip must be .*\[1, 4, 3, 5\]; it is "),
    ({"skip": torch.zeros(1, 4, 3, 5, dtype=torch.float64)}, "skip "),
    ({"skip": torch.zeros(1, 4, 3, 5, device="meta")}, "skip is on meta; move it to cpu"),
]
BAD_BACKWARD = [*BAD, ({"du": torch.zeros(1, 4, 3, 1)}, "du must be "), ({"du": torch.zeros(1, 4, 3, 5).int()}, "du ")]


@pytest.mark.parametrize(("change", "sentence"), BAD)
def test_bad_arguments_are_refused_in_python_and_in_cpp(change: dict[str, Tensor], sentence: str) -> None:
    given = {"y": torch.zeros(1, 4, 3, 5), "skip": torch.zeros(1, 4, 3, 5), "skip_scale": 1.0} | change
    assert_refused(energy_epilogue, torch.ops.vaebm_fast.energy_epilogue, given, sentence)


@pytest.mark.parametrize(("change", "sentence"), BAD_BACKWARD)
def test_bad_arguments_of_the_backward_are_refused(change: dict[str, Tensor], sentence: str) -> None:
    zeros = torch.zeros(1, 4, 3, 5)
    given: dict[str, Any] = {"du": zeros, "y": zeros, "skip": zeros, "skip_scale": 1.0} | change
    assert_refused(energy_epilogue_backward, torch.ops.vaebm_fast.energy_epilogue_backward, given, sentence)


def test_compiled_backends_refuse_float64_and_the_reference_takes_it(compiled: None) -> None:
    y = nhwc(1, 2, 3, 3).double()
    for backend in ("auto", "cpu"):
        with pytest.raises(ValueError, match="takes float32, not torch.float64; ask for backend='reference'"):
            energy_epilogue(y, backend=backend)  # type: ignore[arg-type]
    assert energy_epilogue(y, backend="reference").dtype == torch.float64
