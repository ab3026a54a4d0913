"""Presets and energy networks, by their published sizes and formulas; the meta device holds no numbers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.builders import swish, wn, written_out_wn
from vaebm_fast.config import ENERGY_ARCHS, PRESETS, EnergyConfig, parse_blocks
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import Cell


# Presets and energy networks, by their published sizes; the meta device holds no numbers.
@pytest.mark.parametrize(
    ("preset", "latents"),
    [("cifar10", 153_600), ("celeba_64", 134_400), ("lsun_church_64", 134_400), ("celeba_256", 1_745_920)],
)
def test_presets_have_the_published_noise(preset: str, latents: int) -> None:
    with torch.device("meta"):
        model = VAEBM.from_preset(preset)
    layout = model.noise_layout
    assert layout.latent_dim == latents
    assert layout.dim == latents + 3 * model.image_shape[1] ** 2
    assert not model.training


def test_the_decoder_of_celeba_256_has_44_inverted_residuals_most_weights_at_low_resolution() -> None:
    with torch.device("meta"):
        vae = NVAE(PRESETS["celeba_256"].nvae)
    cells = [cell for cell in (*vae.dec_tower, *vae.post_process) if isinstance(cell, Cell)]
    weights = [sum(m.weight.numel() for m in cell._ops.modules() if isinstance(m, nn.Conv2d)) for cell in cells]
    assert len(cells) == 44
    assert sum(weights[-20:]) / 1e6 == pytest.approx(3, abs=0.5)  # at 64x64 and above
    assert sum(weights[:24]) / 1e6 == pytest.approx(121, abs=0.5)


@pytest.mark.parametrize(
    ("arch", "millions"), [("cifar_32", 5.1), ("celeba_64", 4.3), ("lsun_64", 5.8), ("celeba_256", 14.2)]
)
def test_energy_networks_have_the_published_sizes(arch: str, millions: float) -> None:
    with torch.device("meta"):
        energy = EnergyNetwork(ENERGY_ARCHS[arch].config())
    assert round(sum(parameter.numel() for parameter in energy.parameters()) / 1e6, 1) == millions


def written_out_energy(energy: EnergyNetwork, x: Tensor) -> Tensor:
    """E by the published formulas, from the state dictionary."""
    state = energy.state_dict()

    def conv(name: str, x: Tensor) -> Tensor:
        return written_out_wn(state, name, x, padding=state[f"{name}.weight"].shape[-1] // 2)

    h = swish(conv("conv1", x)) / 1.1
    for index, block in enumerate(energy.config.blocks):
        y = conv(f"blocks.{index}.conv2", swish(conv(f"blocks.{index}.conv1", h)) / 1.1)
        changes = block.downsample or block.in_channels != block.out_channels
        y = y + (conv(f"blocks.{index}.skip.0", h) if changes else h)
        h = swish(F.avg_pool2d(y, 2) if block.downsample else y) / 1.1
    return h.sum(dim=(2, 3)) @ state["linear.weight"][0] + state["linear.bias"]


@pytest.mark.parametrize(
    "config",
    [
        ENERGY_ARCHS["mnist"].config(image_channels=1, width=4),
        EnergyConfig(8, 1, 3, parse_blocks("1-1d 1-1 1-2d 2-2")),
        EnergyConfig(10, 3, 2, parse_blocks("1-3, 3-3d, 3-1d")),  # 10 -> 5 -> 2: pooling drops the odd row
        EnergyConfig(5, 2, 1, parse_blocks("1-1")),
    ],
    ids=["mnist", "digits", "odd", "single block"],
)
def test_energy_networks_of_any_blocks_compute_the_published_formulas_image_by_image(config: EnergyConfig) -> None:
    energy = EnergyNetwork(config).double()
    x = torch.rand(3, *config.image_shape, dtype=torch.float64)
    together = energy(x)
    assert together.shape == (3,)
    torch.testing.assert_close(together, written_out_energy(energy, x))
    torch.testing.assert_close(torch.cat([energy(image[None]) for image in x]), together)
    assert energy(x[:0]).shape == (0,)


def test_energy_networks_have_the_published_keys() -> None:
    expected = wn("conv1") | {"linear.weight", "linear.bias"}
    for block in range(3):
        expected |= wn(f"blocks.{block}.conv1") | wn(f"blocks.{block}.conv2")
    expected |= wn("blocks.0.skip.0", bias=False) | wn("blocks.2.skip.0", bias=False)  # block 1 changes nothing
    energy = EnergyNetwork(EnergyConfig(16, 3, 4, parse_blocks("1-1d 1-1 1-2")))
    assert set(energy.state_dict()) == expected
