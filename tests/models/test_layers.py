"""Cells of every kind: their keys and what they compute, against formulas written out from the published layout."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.helpers.builders import generic, swish, wn, written_out_wn
from vaebm_fast.models.layers import Cell, InvertedResidual


# State dictionaries of cells, written out from the published layout.
def bn(name: str) -> set[str]:
    return {f"{name}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


MCONV_KEYS = (
    bn("conv.0.bn") | {"conv.1.conv.0.weight"} | bn("conv.1.conv.1") | {"conv.2.conv.0.weight"} | bn("conv.2.conv.1")
    | {"conv.3.weight"} | bn("conv.4.bn")
)  # fmt: skip
MCONV_UP_KEYS = (
    bn("conv.1.bn") | {"conv.2.conv.0.weight"} | bn("conv.2.conv.1") | {"conv.3.conv.0.weight"} | bn("conv.3.conv.1")
    | {"conv.4.weight"} | bn("conv.5.bn")
)  # fmt: skip
OP_KEYS = {
    "res_elu": wn("conv_0"),
    "res_bnelu": bn("bn.bn") | wn("conv_0"),
    "res_bnswish": bn("bn_act") | wn("conv_0"),
    "res_bnswish5": bn("bn_act") | wn("conv_0"),
    "mconv_e6k5g0": MCONV_KEYS,
    "mconv_e6k11g0": MCONV_KEYS,
    "mconv_e3k5g0": MCONV_KEYS,
    "mconv_e3k5g8": MCONV_KEYS,
}
SKIP_KEYS = {
    "none": set(),
    "down": wn("skip.conv_1") | wn("skip.conv_2") | wn("skip.conv_3") | wn("skip.conv_4"),
    "up": wn("skip.1", bias=False),
}
SE_KEYS = {"se.se.0.weight", "se.se.0.bias", "se.se.2.weight", "se.se.2.bias"}
RESAMPLES = ("none", "down", "up")


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize("primitive", OP_KEYS)
def test_cells_have_the_published_keys(primitive: str, resample: str) -> None:
    first = MCONV_UP_KEYS if primitive.startswith("mconv") and resample == "up" else OP_KEYS[primitive]
    ops = {f"_ops.0.{key}" for key in first} | {f"_ops.1.{key}" for key in OP_KEYS[primitive]}
    for use_se in (False, True):
        cell = Cell((primitive, primitive), 8, 16, resample=resample, use_se=use_se)
        assert set(cell.state_dict()) == ops | SKIP_KEYS[resample] | (SE_KEYS if use_se else set())


@pytest.mark.parametrize(
    ("primitive", "hidden", "kernel", "inputs_per_group"),
    [("mconv_e6k5g0", 48, 5, 1), ("mconv_e6k11g0", 48, 11, 1), ("mconv_e3k5g0", 24, 5, 1), ("mconv_e3k5g8", 24, 5, 3)],
)
def test_inverted_residuals_read_their_shape_from_their_name(
    primitive: str, hidden: int, kernel: int, inputs_per_group: int
) -> None:
    state = InvertedResidual(primitive, 8, 10, "none").state_dict()
    assert state["conv.1.conv.0.weight"].shape == (hidden, 8, 1, 1)
    assert state["conv.2.conv.0.weight"].shape == (hidden, inputs_per_group, kernel, kernel)
    assert state["conv.3.weight"].shape == (10, hidden, 1, 1)


@pytest.mark.parametrize(("channels", "hidden"), [(8, 4), (64, 4), (96, 6)])
def test_squeeze_and_excitation_is_a_sixteenth_wide_but_at_least_four(channels: int, hidden: int) -> None:
    state = Cell(("res_elu",), channels, channels, use_se=True).state_dict()
    assert state["se.se.0.weight"].shape == (hidden, channels)
    assert state["se.se.2.weight"].shape == (channels, hidden)


# What a cell computes, from its state dictionary by the published formulas.
def written_out_bn(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, gamma, beta = (
        state[f"{name}.{entry}"][None, :, None, None] for entry in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * gamma + beta


def written_out_op(state: dict[str, Tensor], name: str, primitive: str, x: Tensor, resample: str) -> Tensor:
    stride = 2 if resample == "down" else 1

    def upsampled(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) if resample == "up" else x

    if not primitive.startswith("mconv"):
        if primitive == "res_elu":
            x = F.elu(x)
        elif primitive == "res_bnelu":
            x = F.elu(written_out_bn(state, f"{name}.bn.bn", x))
        else:
            x = swish(written_out_bn(state, f"{name}.bn_act", x))
        reach = 2 if primitive == "res_bnswish5" else 1
        return written_out_wn(state, f"{name}.conv_0", upsampled(x), stride=stride, padding=reach, dilation=reach)
    kernel, groups = map(int, re.findall(r"k(\d+)g(\d+)", primitive)[0])
    at = 1 if resample == "up" else 0
    h = written_out_bn(state, f"{name}.conv.{at}.bn", upsampled(x))
    h = F.conv2d(h, state[f"{name}.conv.{at + 1}.conv.0.weight"])
    h = swish(written_out_bn(state, f"{name}.conv.{at + 1}.conv.1", h))
    depthwise = state[f"{name}.conv.{at + 2}.conv.0.weight"]
    h = F.conv2d(F.pad(h, [kernel // 2] * 4), depthwise, stride=stride, groups=groups or h.shape[1])
    h = swish(written_out_bn(state, f"{name}.conv.{at + 2}.conv.1", h))
    return written_out_bn(state, f"{name}.conv.{at + 4}.bn", F.conv2d(h, state[f"{name}.conv.{at + 3}.weight"]))


def written_out_cell(
    state: dict[str, Tensor], primitives: tuple[str, ...], x: Tensor, resample: str, use_se: bool
) -> Tensor:
    y = x
    for index, primitive in enumerate(primitives):
        y = written_out_op(state, f"_ops.{index}", primitive, y, resample if index == 0 else "none")
    if use_se:
        squeezed = torch.relu(F.linear(y.mean(dim=(2, 3)), state["se.se.0.weight"], state["se.se.0.bias"]))
        gate = torch.sigmoid(F.linear(squeezed, state["se.se.2.weight"], state["se.se.2.bias"]))
        y = y * gate[:, :, None, None]
    skip = x
    if resample == "up":
        bilinear = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        skip = written_out_wn(state, "skip.1", bilinear)
    elif resample == "down":
        phases = [(0, 0), (1, 1), (0, 1), (1, 0)]  # rows and columns of the pixels that conv_1 .. conv_4 see
        skip = torch.cat(
            [
                written_out_wn(state, f"skip.conv_{index}", swish(x)[:, :, row::2, column::2])
                for index, (row, column) in enumerate(phases, start=1)
            ],
            dim=1,
        )
    return skip + 0.1 * y


@pytest.mark.parametrize("resample", RESAMPLES)
@pytest.mark.parametrize(
    "primitives",
    [*((primitive,) for primitive in OP_KEYS), ("res_bnswish5", "res_bnswish"), ("res_bnswish", "res_bnswish5")],
    ids="-".join,
)
def test_cells_compute_the_published_formulas(primitives: tuple[str, ...], resample: str) -> None:
    out_channels = {"none": 8, "down": 18, "up": 4}[resample]  # 18: the last of the four skips takes the rest
    for use_se in (False, True):
        cell = generic(Cell(primitives, 8, out_channels, resample=resample, use_se=use_se))
        x = torch.randn(2, 8, 6, 4, dtype=torch.float64)
        expected = written_out_cell(cell.state_dict(), primitives, x, resample, use_se)
        torch.testing.assert_close(cell(x), expected)


@pytest.mark.parametrize("resample", RESAMPLES)
def test_the_depthwise_sees_zeros_outside_the_image_not_swish_of_the_bias(resample: str) -> None:
    op = generic(InvertedResidual("mconv_e3k5g0", 4, 4, resample))
    expand, depthwise = op.conv[-4].conv, op.conv[-3].conv
    expand[0].weight.data.zero_()  # so every hidden activation inside the image is one constant per channel
    depthwise[0].weight.data.fill_(1.0)
    seen: list[Tensor] = []
    depthwise[0].register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    op(torch.randn(1, 4, 12, 12, dtype=torch.float64))
    constant = F.silu(
        expand[1].bias - expand[1].running_mean / (expand[1].running_var + 1e-5).sqrt() * expand[1].weight
    )
    middle = seen[0].shape[-1] // 2
    torch.testing.assert_close(seen[0][0, :, middle, middle], 25 * constant)
    torch.testing.assert_close(seen[0][0, :, 0, 0], 9 * constant)
    torch.testing.assert_close(seen[0][0, :, 0, middle], 15 * constant)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Cell(("mconv_e3k5g8",), 5, 5, use_se=False), r"needs 5 channels x 3 to be a multiple of 8\."),
        (lambda: Cell(("mconv_e3k5",), 8, 8, use_se=False), r"Primitive 'mconv_e3k5' is not known\."),
        (lambda: Cell(("res_relu",), 8, 8, use_se=False), r"Primitive 'res_relu' is not known\."),
        (lambda: Cell(("res_elu",), 1, 2, resample="down", use_se=False), r"needs at least 4 output channels, not 2\."),
    ],
)
def test_cells_that_cannot_be_are_refused(build: Callable[[], Cell], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        build()
