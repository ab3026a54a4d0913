"""TF32 products in Triton's interpreter, which multiplies in float32: what is seen is how operands were rounded.

`test_triton.py` runs this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tests.triton_kernels.interpreted_residual_tail import saved, tail
from tests.triton_kernels.interpreted_triton import OPS, bands, normal
from vaebm_fast import reference
from vaebm_fast.reference import Activation
from vaebm_fast.triton_kernels import activation
from vaebm_fast.triton_kernels import pointwise as pointwise_kernels
from vaebm_fast.triton_kernels import residual_tail as tail_kernels

__all__ = ["bands"]  # the fixture that every test here runs in

LARGEST = 0x7F7FFFFF
NANS = (0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7FFFF000)  # a GPU's own; a CPU's; payloads that rounding would lose
KINDS = {"tf32": "high", "ieee": "highest"}


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 with its mantissa rounded to 10 bits, halves away from zero; NaN and infinity stay."""
    bits = x.view(torch.int32) + (1 << 12)  # sign and magnitude: both signs grow in magnitude
    return torch.where(torch.isfinite(x), (bits & -(1 << 13)).view(torch.float32), x)


@triton.jit
def rounding_kernel(x, y, BLOCK: tl.constexpr):
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + e, activation.round_to_tf32(tl.load(x + e)))


def rounded(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """What the kernels make of these bits, a multiple of 1024."""
    x = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    y = torch.empty_like(x)
    rounding_kernel[(len(x) // 1024,)](x, y, BLOCK=1024)
    return y.view(torch.int32).numpy().view(np.uint32)


def test_operands_become_the_nearest_tf32_number_in_every_bit() -> None:
    """Against integers of 64 bits: all that is dropped, ties, carries into the exponent, subnormals, the largest."""
    dropped = np.arange(1 << 13)
    kept = np.array([0, 1, 511, 1023]) << 13
    exponents = np.array([0, 1, 127, 254]) << 23
    signs = np.array([0, 1]) << 31
    bits = (signs[:, None, None, None] | exponents[:, None, None] | kept[:, None] | dropped).flatten()
    sign, magnitude = bits >> 31 << 31, bits & 0x7FFFFFFF
    truth = sign | ((magnitude + (1 << 12)) >> 13 << 13)
    assert (truth == sign | 0x7F800000).sum() == 1 << 13  # halves of the last step beyond the largest, both signs
    assert np.array_equal(rounded(bits.astype(np.uint32)), truth)


def test_infinities_stay_and_no_nan_becomes_a_number() -> None:
    signs = np.array([0, 1 << 31], dtype=np.uint32)
    for magnitude, becomes in ((0x7F800000, 0x7F800000), (LARGEST, 0x7F800000), (0, 0), (1, 0)):
        assert np.array_equal(rounded(np.repeat(signs | np.uint32(magnitude), 512)), np.repeat(signs | becomes, 512))
    for nan in NANS:
        assert np.isnan(rounded(np.repeat(signs | np.uint32(nan), 512)).view(np.float32)).all()


def off(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth|."""
    return float((found - truth).norm() / truth.norm())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """How float32 is multiplied."""
    torch.set_float32_matmul_precision(KINDS[request.param])
    yield str(request.param)
    torch.set_float32_matmul_precision("highest")


def test_either_way_to_ask_torch_for_tf32_is_heard() -> None:
    try:
        assert pointwise_kernels.precision_of(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"  # after which the older question raises
        assert pointwise_kernels.precision_of(torch.float32) == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert pointwise_kernels.precision_of(torch.float32) == "ieee"


def check(kind: str, found: Tensor, slow: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> None:
    """`slow` computes in float64, of operands that the function it is given has rounded.

    TF32 agrees with it but where float32's error before an operand is rounded puts that on the other side of a half:
    one in thousands, by 2^-10. Operands that are cut off are 2^-10.5 away, more than the exact ones.
    """
    exact = off(found.double(), slow(lambda operand: operand))
    if kind == "ieee":
        assert exact < 1e-6
    else:
        assert off(found.double(), slow(lambda operand: round_to_tf32(operand.float()).double())) < 2.0**-15
        assert 2.0**-13 < exact < 2.0**-11


@pytest.mark.parametrize("name", get_args(Activation))
@pytest.mark.parametrize("shape_class", ["narrow", "small", "large"])
def test_a_product_is_that_of_rounded_operands(
    shape_class: str, name: Activation, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ragged blocks of everything in every configuration."""
    monkeypatch.setattr(pointwise_kernels, "shape_class", lambda *sizes: shape_class)
    x, weight, bias, residual = normal(1, 70, 12, 13), normal(130, 70), normal(130), normal(1, 130, 12, 13)
    y = OPS.pointwise(x, weight, weight.T, bias, residual, name)
    dx = OPS.pointwise_backward(residual, weight.T, 70, None if name == "none" else x, name)
    x, weight, bias, residual = x.double(), weight.double(), bias.double(), residual.double()
    read, slope = {"none": (x, None), "swish": (F.silu(x), x), "elu": (F.elu(x), x)}[name]
    backward = partial(reference.pointwise_backward, activation=name)
    check(kind, y, lambda operand: reference.pointwise(operand(read), operand(weight), bias, residual))
    check(kind, dx, lambda operand: backward(operand(residual), operand(weight), slope))


@pytest.mark.parametrize("stores", [False, True])
def test_a_projection_reads_what_the_depthwise_gave_rounded(
    stores: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_kernels, "stores_activated", lambda C, dtype: stores)
    shape = (2, 20, 70, 12, 13, 3, False)
    arguments = tail(shape, torch.float32)
    _, h2, s, _, _ = OPS.residual_tail(*arguments, False)
    project, bias = (weight.double() for weight in arguments[4:6])
    product = s.double() - bias[:, None, None]
    check(kind, product, lambda operand: reference.pointwise(operand(F.silu(h2.double())), operand(project)))


@pytest.mark.parametrize("shape", [(2, 20, 70, 12, 13, 3, False), (5, 20, 33, 2, 2, 3, False)], ids=str)
def test_a_gated_gradient_is_rounded_behind_its_gate(shape: tuple[Any, ...], kind: str) -> None:
    """Made where the product reads it, and stored before where images are smaller than a block."""
    given = saved(shape, tail(shape, torch.float32), torch.float32)
    dh = OPS.residual_tail_backward(*given, False)
    dy, h, h2, s, hidden, gate, depthwise, project, first, second = (tensor.double() for tensor in given)
    ds = reference.se_gate_residual_backward(dy, s, hidden, gate, first, second)

    def slow(operand: Callable[[Tensor], Tensor]) -> Tensor:
        dh2 = reference.pointwise_backward(operand(ds), operand(project), h2, activation="swish")
        return reference.depthwise_swish_backward(dh2, h, depthwise, upsample=False)

    check(kind, dh, slow)


@pytest.mark.parametrize("bits", [0x7F800000, NANS[0]], ids=["infinity", "NaN"])
@pytest.mark.parametrize("kind", ["tf32"], indirect=True)
def test_what_is_not_finite_shows_in_the_product(bits: int, kind: str) -> None:
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x, weight = normal(1, 20, 3, 3), normal(5, 20)
    in_x, in_weight = x.clone(), weight.clone()
    in_x[0, 7, 1, 2], in_weight[3, 7] = value, value
    of_x = OPS.pointwise(in_x, weight, weight.T, None, None, "none").isfinite()
    assert not of_x[0, :, 1, 2].any() and of_x.sum() == 5 * 8
    of_weight = OPS.pointwise(x, in_weight, in_weight.T, None, None, "none").isfinite()
    assert not of_weight[0, 3].any() and of_weight.sum() == 4 * 9
