"""Laws of the encoder's inverse autoregressive flows: their masks, their triangular Jacobians, their volume."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vaebm_fast.models.flows import FlowCell, FlowNetwork, PairedFlow, channel_mask, masked_conv
from vaebm_fast.models.layers import WNConv2d

LATENTS, HEIGHT, WIDTH = 3, 4, 3
SIZE = LATENTS * HEIGHT * WIDTH


def strengthened(flow: nn.Module) -> nn.Module:
    """The flow in float64 with convolutions large enough that every dependence it allows shows in the Jacobian."""
    generator = torch.Generator().manual_seed(1)
    for conv in flow.modules():
        if isinstance(conv, WNConv2d):
            conv.weight.data = torch.randn(conv.weight.shape, generator=generator)
            conv.log_weight_norm.data.fill_(0.5)
    return flow.double()


def jacobian(flow: nn.Module) -> Tensor:
    """d flow(z) / d z with elements in raster order: pixels row by row, channels within a pixel; [SIZE, SIZE]."""
    z = torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def in_raster_order(flat: Tensor) -> Tensor:
        return flow(flat.reshape(1, HEIGHT, WIDTH, LATENTS).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten()

    return torch.autograd.functional.jacobian(in_raster_order, z)


def mirrored(matrix: Tensor) -> Tensor:
    """Rows and columns with the pixels in reverse order and the channels in theirs."""
    order = torch.arange(SIZE).reshape(HEIGHT * WIDTH, LATENTS).flip(0).flatten()
    return matrix[order][:, order]


@pytest.mark.parametrize("mirror", [False, True])
def test_jacobian_of_a_cell_is_exactly_unit_triangular_in_its_raster_order(mirror: bool) -> None:
    matrix = jacobian(strengthened(FlowCell(LATENTS, mirror=mirror)))
    matrix = mirrored(matrix) if mirror else matrix
    assert torch.equal(matrix.diagonal(), torch.ones(SIZE, dtype=torch.float64))
    assert torch.equal(matrix.triu(1), torch.zeros(SIZE, SIZE, dtype=torch.float64))


@pytest.mark.parametrize("mirror", [False, True])
def test_an_element_depends_on_its_neighbours_before_it(mirror: bool) -> None:
    matrix = jacobian(strengthened(FlowCell(LATENTS, mirror=mirror)))
    matrix = mirrored(matrix) if mirror else matrix
    blocks = matrix.reshape(HEIGHT * WIDTH, LATENTS, HEIGHT * WIDTH, LATENTS) != 0
    row, column = torch.tril_indices(LATENTS, LATENTS, -1)
    assert bool(blocks.diagonal(dim1=0, dim2=2)[row, column].all()), "earlier channels of its own pixel"
    for pixel in range(1, HEIGHT * WIDTH):
        neighbour = pixel - 1 if pixel % WIDTH else pixel - WIDTH  # to the left, or above
        assert bool(blocks[pixel, :, neighbour, :].all()), "every channel of earlier pixels"


def test_a_pair_keeps_the_volume_and_lets_every_pixel_depend_on_every_other() -> None:
    matrix = jacobian(strengthened(PairedFlow(LATENTS)))
    sign, log_det = torch.linalg.slogdet(matrix)
    assert float(sign) == 1
    assert abs(float(log_det)) < 1e-10
    pixels = matrix.reshape(HEIGHT * WIDTH, LATENTS, HEIGHT * WIDTH, LATENTS).ne(0).any(3).any(1)
    assert bool(pixels.all())


def test_the_second_cell_is_the_first_turned_by_half_a_turn() -> None:
    pair = strengthened(PairedFlow(LATENTS))
    turned = {k: v.flip(2, 3) if k.endswith(".weight") else v for k, v in pair.cell1.state_dict().items()}
    pair.cell2.load_state_dict(turned)
    z = torch.randn(2, LATENTS, HEIGHT, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(pair.cell2(z.flip(2, 3)), pair.cell1(z).flip(2, 3))


@pytest.mark.parametrize("zero_diagonal", [False, True])
def test_equal_channels_give_a_triangular_mask(zero_diagonal: bool) -> None:
    expected = torch.ones(5, 5).tril(-1 if zero_diagonal else 0)
    assert torch.equal(channel_mask(5, 5, zero_diagonal=zero_diagonal), expected)


@pytest.mark.parametrize("zero_diagonal", [False, True])
def test_unequal_channels_repeat_the_triangle_in_consecutive_blocks(zero_diagonal: bool) -> None:
    triangle = channel_mask(4, 4, zero_diagonal=zero_diagonal)
    wide = channel_mask(24, 4, zero_diagonal=zero_diagonal)
    assert torch.equal(wide, triangle.repeat_interleave(6, dim=0))
    assert torch.equal(channel_mask(4, 24, zero_diagonal=zero_diagonal), triangle.repeat_interleave(6, dim=1))


def test_channel_counts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"to divide the other; they are 4 and 6\."):
        channel_mask(6, 4, zero_diagonal=False)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("zero_diagonal", [False, True])
def test_mask_of_a_kernel_is_ones_before_the_centre_and_zeros_after_it(zero_diagonal: bool, mirror: bool) -> None:
    centre_of = {
        False: channel_mask(12, 2, zero_diagonal=zero_diagonal),
        True: torch.full((12, 1), 0.0 if zero_diagonal else 1.0),
    }
    for depthwise, centre in centre_of.items():
        conv = masked_conv(
            12 if depthwise else 2, 12, 5, depthwise=depthwise, zero_diagonal=zero_diagonal, mirror=mirror
        )
        assert conv.mask is not None
        mask = (conv.mask.flip(2, 3) if mirror else conv.mask).flatten(2)  # [Cout, Cin / groups, 25], centre at 12
        assert bool((mask[:, :, :12] == 1).all()) and bool((mask[:, :, 13:] == 0).all())
        assert torch.equal(mask[:, :, 12], centre)


def test_the_norm_is_taken_of_the_masked_weight() -> None:
    conv = masked_conv(2, 12, 3, zero_diagonal=True, mirror=True)
    assert conv.mask is not None
    norm = (conv.weight * conv.mask).flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_weight_norm.flatten(), torch.log(norm + 1e-2))
    effective = conv.effective_weight()
    torch.testing.assert_close(
        effective.flatten(1).norm(dim=1), conv.log_weight_norm.flatten().exp() * norm / (norm + 1e-5)
    )
    assert bool((effective[conv.mask == 0] == 0).all())
    before = effective.detach().clone()
    conv.weight.data[conv.mask == 0] = 1e6  # what the mask hides never matters
    assert torch.equal(conv.effective_weight(), before)


def test_the_last_layer_starts_ten_times_smaller() -> None:
    conv = FlowCell(LATENTS, mirror=False).mu.conv_0
    assert conv.mask is not None
    norm = (conv.weight * conv.mask).flatten(1).norm(dim=1)
    torch.testing.assert_close(conv.log_weight_norm.flatten(), torch.log(norm + 1e-2) + torch.log(torch.tensor(0.1)))


def test_masks_are_not_in_the_state_dict_and_keys_are_the_published_ones() -> None:
    expected = {
        f"cell{cell}.{entry}"
        for cell in (1, 2)
        for entry in (
            "conv.convz.0.weight",
            "conv.convz.0.log_weight_norm",
            "conv.convz.2.weight",
            "conv.convz.2.log_weight_norm",
            "mu.conv_0.weight",
            "mu.conv_0.bias",
            "mu.conv_0.log_weight_norm",
        )
    }
    assert set(PairedFlow(LATENTS).state_dict()) == expected


def test_the_hidden_layers_are_six_times_as_wide_and_the_second_is_depthwise() -> None:
    first, _, second, _ = FlowNetwork(LATENTS, mirror=False).convz
    assert tuple(first.weight.shape) == (6 * LATENTS, LATENTS, 3, 3)
    assert tuple(second.weight.shape) == (6 * LATENTS, 1, 5, 5)
