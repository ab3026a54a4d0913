"""Every rewrite of the frozen pair against its unfolded form, in float64: they are exact, so 1e-12 is all they get.

Rectangles with sides 1, 2, 3 and 5 put every pixel at or near a frame, where zero padding tells the rewrites apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.golden import relative_error
from vaebm_fast.frozen import fold
from vaebm_fast.frozen.cells import freeze_cell
from vaebm_fast.frozen.energy import FrozenBlock
from vaebm_fast.frozen.fold import Conv
from vaebm_fast.frozen.units import (
    SqueezeExcite,
    gate_and_add,
    interleave,
    swish_group_conv_phases,
)
from vaebm_fast.models.energy import EnergyResidualBlock
from vaebm_fast.models.layers import SE, Cell, DownSkip, WNConv2d
from vaebm_fast.ops._backend import OpBackends

SIDES = list(itertools.product((1, 2, 3, 5), repeat=2))
EXACT = 1e-12
REFERENCE = OpBackends.of("reference")


@pytest.fixture(autouse=True)
def _float64_from_seed_0() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        yield
        torch.set_default_dtype(torch.float32)


def error(actual: Tensor, expected: Tensor) -> float:
    return relative_error(actual, expected.detach())


def disturb(module: nn.Module) -> nn.Module:
    """Evaluation mode, with statistics that matter: gammas of both signs, means and shifts away from zero."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            assert norm.running_mean is not None and norm.running_var is not None
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def run(conv: Conv, x: Tensor, **options: int) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, **options)


def upsampled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def test_batch_norm_is_an_affine_map() -> None:
    norm, x = disturb(nn.BatchNorm2d(5)), torch.randn(2, 5, 3, 4)
    assert isinstance(norm, nn.BatchNorm2d)
    scale, shift = fold.batch_norm(norm)
    assert error(x * scale[:, None, None] + shift[:, None, None], norm(x)) < EXACT


def test_weight_norm_is_carried_out() -> None:
    conv, x = WNConv2d(4, 6, 3), torch.randn(2, 4, 5, 5)
    nn.init.normal_(conv.log_weight_norm)
    assert error(run(fold.convolution(conv), x, padding=1), conv(x)) < EXACT


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_batch_norm_behind_a_padded_convolution_folds_into_it(groups: int, bias: bool) -> None:
    conv, norm = nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=bias), disturb(nn.BatchNorm2d(6))
    assert isinstance(norm, nn.BatchNorm2d)
    x = torch.randn(2, 6, 4, 5)
    folded = fold.then_affine(fold.convolution(conv), fold.batch_norm(norm))
    assert error(run(folded, x, padding=1, groups=groups), norm(conv(x))) < EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_before_a_1x1_folds_into_it(bias: bool) -> None:
    norm, conv, x = disturb(nn.BatchNorm2d(5)), nn.Conv2d(5, 7, 1, bias=bias), torch.randn(2, 5, 3, 4)
    assert isinstance(norm, nn.BatchNorm2d)
    folded = fold.of_affine(fold.convolution(conv), fold.batch_norm(norm))
    assert error(run(folded, x), conv(norm(x))) < EXACT


@pytest.mark.parametrize("bias", [True, False])
def test_a_factor_before_or_behind_a_convolution_folds_into_it(bias: bool) -> None:
    conv, x = nn.Conv2d(3, 4, 3, padding=1, bias=bias), torch.randn(1, 3, 4, 4)
    folded = fold.convolution(conv)
    assert error(run(fold.scaled(folded, 0.3), x, padding=1), 0.3 * conv(x)) < EXACT
    assert error(run(fold.of_scaled(folded, 0.3), x, padding=1), conv(0.3 * x)) < EXACT


def test_a_convolution_of_concatenated_inputs_is_a_sum_of_two() -> None:
    conv, s, z = WNConv2d(7, 4, 1), torch.randn(2, 5, 3, 3), torch.randn(2, 2, 3, 3)
    first, second = fold.split_input(fold.convolution(conv), 5)
    assert error(run(first, s) + run(second, z), conv(torch.cat([s, z], dim=1))) < EXACT


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("kernel_size", [3, 5, 11])
@pytest.mark.parametrize("groups", [6, 2])
def test_phase_kernels_are_a_convolution_of_the_upsampled_image_up_to_the_frame(
    groups: int, kernel_size: int, sides: tuple[int, int]
) -> None:
    h = torch.randn(2, 6, *sides, requires_grad=True)
    weight, bias = torch.randn(6, 6 // groups, kernel_size, kernel_size), torch.randn(6)
    expected = F.conv2d(F.silu(upsampled(h)), weight, bias, padding=kernel_size // 2, groups=groups)
    actual = interleave(swish_group_conv_phases(h, Conv(fold.nearest_phases(weight), bias)))
    assert error(actual, expected) < EXACT
    cotangent = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(actual, h, cotangent)
    assert error(gradient, torch.autograd.grad(expected, h, cotangent)[0]) < EXACT


def test_a_5x5_becomes_four_3x3_and_an_even_kernel_is_refused() -> None:
    sizes = {size: fold.nearest_phases(torch.randn(1, 1, size, size)).shape[-1] for size in (1, 3, 5, 11)}
    assert sizes == {1: 1, 3: 3, 5: 3, 11: 7}
    with pytest.raises(ValueError, match="odd size, not 4"):
        fold.nearest_phases(torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_one_transposed_convolution_upsamples_and_convolves(kernel_size: int, sides: tuple[int, int]) -> None:
    x, weight = torch.randn(2, 3, *sides), torch.randn(4, 3, kernel_size, kernel_size)
    padding = kernel_size // 2
    actual = F.conv_transpose2d(x, fold.nearest_transposed(weight), stride=2, padding=padding)
    assert error(actual, F.conv2d(upsampled(x), weight, padding=padding)) < EXACT


@pytest.mark.parametrize("sides", list(itertools.product((2, 3, 5, 8), repeat=2)))
@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_one_strided_convolution_convolves_and_pools(kernel_size: int, sides: tuple[int, int]) -> None:
    x, weight, padding = torch.randn(2, 3, *sides), torch.randn(4, 3, kernel_size, kernel_size), kernel_size // 2
    expected = F.avg_pool2d(F.conv2d(x, weight, padding=padding), 2)
    assert error(F.conv2d(x, fold.pooled(weight), stride=2, padding=padding), expected) < EXACT


def test_the_skip_of_a_down_cell_is_one_2x2() -> None:
    skip, x = DownSkip(5, 11), torch.randn(2, 5, 4, 6)
    assert error(run(fold.down_skip(skip), F.silu(x), stride=2), skip(x)) < EXACT


def test_interleave_puts_pixel_ij_of_phase_pq_at_2i_plus_p_2j_plus_q() -> None:
    image = torch.randn(2, 3, 4, 6)
    phases = [image[:, :, p::2, q::2] for p in range(2) for q in range(2)]
    assert torch.equal(interleave(phases), image)


def test_a_gate_takes_its_branch_and_skip_at_once() -> None:
    gate, s, skip = SE(20), torch.randn(2, 20, 3, 3), torch.randn(2, 20, 3, 3)
    first, _, second, _ = gate.se
    weights = SqueezeExcite(*(t.detach() for t in (first.weight, first.bias, second.weight, second.bias)))
    assert error(gate_and_add(s, skip, weights, REFERENCE), skip + gate(s)) < EXACT
    assert error(gate_and_add(s.clone(), skip, None, REFERENCE), skip + s) < EXACT


PRIMITIVES = [
    ("mconv_e3k3g0",), ("mconv_e6k5g0",), ("mconv_e6k11g0",), ("mconv_e3k5g8",),
    ("res_elu", "res_elu"), ("res_bnelu", "res_bnelu"), ("res_bnswish", "res_bnswish"),
    ("res_bnswish", "res_bnswish5"), ("res_bnswish",),
]  # fmt: skip


@pytest.mark.parametrize("use_se", [True, False], ids=["se", "plain"])
@pytest.mark.parametrize("resample", ["none", "up", "down"])
@pytest.mark.parametrize("primitives", PRIMITIVES, ids="+".join)
def test_a_frozen_cell_is_the_cell(primitives: tuple[str, ...], resample: str, use_se: bool) -> None:
    out_channels = {"none": 8, "up": 4, "down": 16}[resample]
    cell = disturb(Cell(primitives, 8, out_channels, resample=resample, use_se=use_se))
    assert isinstance(cell, Cell)
    frozen = freeze_cell("cell", cell, torch.float64, REFERENCE)
    for sides in [(2, 4)] if resample == "down" else [(1, 1), (2, 3), (5, 4)]:
        x = torch.randn(2, 8, *sides, requires_grad=True)
        actual, expected = frozen(x), cell(x)
        assert error(actual, expected) < EXACT
        cotangent = torch.randn_like(expected)
        (gradient,) = torch.autograd.grad(actual, x, cotangent)
        assert error(gradient, torch.autograd.grad(expected, x, cotangent)[0]) < EXACT


@pytest.mark.parametrize("out_channels, downsample", [(4, False), (8, False), (4, True), (8, True)])
def test_a_frozen_energy_block_is_the_block(out_channels: int, downsample: bool) -> None:
    block = EnergyResidualBlock(4, out_channels, downsample=downsample)
    frozen = FrozenBlock("block", block, torch.float64, REFERENCE)
    for sides in [(2, 2), (6, 3), (5, 4)]:
        u = torch.randn(2, 4, *sides)  # what flows between frozen blocks is 1.1 times the live activation
        assert error(frozen(u), 1.1 * block(u / 1.1)) < EXACT


def test_a_dilated_convolution_behind_an_upsampling_is_refused() -> None:
    cell = disturb(Cell(("res_bnswish5", "res_bnswish"), 8, 4, resample="up", use_se=False))
    assert isinstance(cell, Cell)
    with pytest.raises(ValueError, match="vae.dec_tower.3 upsamples before a dilated convolution"):
        freeze_cell("vae.dec_tower.3", cell, torch.float64, REFERENCE)
