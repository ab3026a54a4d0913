"""Bilinear upsampling x2: reference against PyTorch's, its gradient that gathers, bad arguments.

Kernels: interpreted_triton.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.kernels import assert_as_accurate, nhwc, strided
from vaebm_fast import reference
from vaebm_fast.frozen.cells import freeze_cell
from vaebm_fast.models.layers import Cell
from vaebm_fast.ops._backend import OpBackends
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample, bilinear_upsample_backward

SHAPES = [(1, 1, 1, 1), (1, 2, 1, 5), (2, 3, 2, 3), (2, 3, 3, 1), (1, 5, 16, 31)]


def plain(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


def plain_backward(dy: Tensor) -> Tensor:
    N, C, H, W = dy.shape
    x = dy.new_zeros(N, C, H // 2, W // 2).requires_grad_()
    return torch.autograd.grad(plain(x), x, dy)[0]


def cotangent(shape: tuple[int, ...]) -> Tensor:
    N, C, H, W = shape
    return nhwc(N, C, 2 * H, 2 * W)


def on_a_gpu(x: Tensor) -> Tensor:
    """What the reference computes on a GPU."""
    result: Tensor = reference._BilinearUpsample.apply(x)
    return result


class Called(TorchDispatchMode):
    """The names of the operators inside."""

    def __enter__(self) -> Called:
        self.names: set[str] = set()
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_reference_and_its_gradient_are_those_of_pytorch(shape: tuple[int, ...]) -> None:
    """float64 to 1e-12. In float32 PyTorch rounds positions, 3e-6 at 31 pixels; the gradient here must err no more."""
    x, dy = nhwc(*shape), cotangent(shape)
    exact, rounded = (plain(x.double()), plain_backward(dy.double())), (plain(x), plain_backward(dy))
    for run in (bilinear_upsample, on_a_gpu):
        for dtype in (torch.float64, torch.float32):
            leaf = x.to(dtype).requires_grad_()
            y = run(leaf)
            (dx,) = torch.autograd.grad(y, leaf, dy.to(dtype))
            for result, fp32, fp64 in zip((y, dx), rounded, exact, strict=True):
                if dtype == torch.float64:
                    torch.testing.assert_close(result, fp64, rtol=0, atol=1e-12)
                else:
                    assert_as_accurate(result, fp32, fp64)
                assert result.stride() == fp64.stride()
        assert torch.equal(y, rounded[0])
    assert torch.equal(bilinear_upsample_backward(dy, backend="reference"), dx)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gradient_of_few_pixels_is_pytorchs_to_rounding(shape: tuple[int, ...]) -> None:
    dy = cotangent(shape)
    torch.testing.assert_close(bilinear_upsample_backward(dy), plain_backward(dy), rtol=1e-6, atol=1e-6)


def test_corners_are_aligned() -> None:
    x = torch.arange(4.0)[None, None, None]  # one row
    for run in (bilinear_upsample, on_a_gpu):
        torch.testing.assert_close(run(x)[0, 0], torch.linspace(0, 3, 8).expand(2, 8))


def test_reference_passes_gradcheck_twice() -> None:
    x = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    for run in (bilinear_upsample, on_a_gpu):
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(run, x)


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    x, dy = nhwc(2, 5, 6, 7).bfloat16(), cotangent((2, 5, 6, 7)).bfloat16()
    for run in (bilinear_upsample, on_a_gpu):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        for result, exact in ((y, plain(x.double())), (dx, plain_backward(dy.double()))):
            assert result.dtype == torch.bfloat16
            once = (exact.bfloat16() - exact).abs()
            assert ((result - exact).abs() <= once + 2.0**-20).all()  # but for ties that float32 sees another way


def test_the_gradient_on_a_gpu_neither_scatters_nor_adds_in_place() -> None:
    """What PyTorch has on CUDA for these is elementwise, or a copy: no atomics."""
    y, dy = on_a_gpu(nhwc(2, 3, 4, 5).requires_grad_()), cotangent((2, 3, 4, 5))
    with Called() as called:
        y.backward(dy)
    elementwise = {"addcmul", "mul", "div", "abs", "clamp", "sub", "rsub", "add", "_to_copy", "constant_pad_nd"}
    views = {"unfold", "unbind", "slice", "select", "unsqueeze", "detach", "permute"}
    assert called.names <= elementwise | views | {"arange", "promote_types"}


def test_a_tensor_on_a_gpu_has_that_gradient() -> None:
    class OnAGpu(Tensor):
        is_cuda = True

    x = nhwc(1, 2, 3, 4).requires_grad_()
    results = [bilinear_upsample(t, backend="reference") for t in (x, x.as_subclass(OnAGpu))]
    assert [type(y.grad_fn).__name__ for y in results] == ["UpsampleBilinear2DBackward0", "_BilinearUpsampleBackward"]


def test_any_strides_are_read() -> None:
    x, dy = nhwc(2, 3, 4, 6), cotangent((2, 3, 4, 6))
    y, dx = bilinear_upsample(x), bilinear_upsample_backward(dy)
    for view in (strided, Tensor.contiguous):
        torch.testing.assert_close(bilinear_upsample(view(x)), y, rtol=0, atol=1e-6)
        torch.testing.assert_close(bilinear_upsample_backward(view(dy)), dx, rtol=0, atol=1e-6)


def test_an_empty_batch_is_taken() -> None:
    assert bilinear_upsample(torch.zeros(0, 3, 2, 5)).shape == (0, 3, 4, 10)
    assert bilinear_upsample_backward(torch.zeros(0, 3, 4, 10)).shape == (0, 3, 2, 5)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_on_a_cpu_a_frozen_pair_upsamples_by_pytorch(backend: Any) -> None:
    y = bilinear_upsample(nhwc(1, 2, 3, 4).requires_grad_(), backend=OpBackends.of(backend)["bilinear_upsample"])
    assert y.grad_fn is not None and y.grad_fn.name() == "UpsampleBilinear2DBackward0"


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_frozen_cell_upsamples_its_skip_by_the_op(backend: Any) -> None:
    """On the meta device, forward and backward: no operator of PyTorch's for it."""
    with torch.device("meta"):
        cell = Cell(["res_bnswish", "res_bnswish"], 8, 8, resample="up", use_se=False).eval()
        x = torch.empty(2, 8, 4, 6, dtype=torch.bfloat16).requires_grad_()
    with Called() as called:
        y = freeze_cell("cell", cell, torch.bfloat16, OpBackends.of(backend))(x)
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert {"bilinear_upsample", "bilinear_upsample_backward"} <= called.names
    assert not any(name.startswith("upsample") for name in called.names)


@pytest.mark.parametrize(
    ("op", "given", "sentence"),
    [
        (bilinear_upsample, torch.zeros(2, 3, 4), r"x must be floating point \[N, C, H, W\]"),
        (bilinear_upsample, torch.zeros(1, 2, 3, 4, dtype=torch.int64), "x must be floating point"),
        (bilinear_upsample_backward, torch.zeros(1, 2, 3, 4), r"dy must be \[N, C, 2H, 2W\]; it is \[1, 2, 3, 4\]"),
        (bilinear_upsample_backward, torch.zeros(1, 2, 4, 3), r"dy must be \[N, C, 2H, 2W\]"),
    ],
)
def test_bad_arguments_are_refused(op: Any, given: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        op(given)
