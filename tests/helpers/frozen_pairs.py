"""Small pairs to freeze, and how far a frozen one may be from the plain modules."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import vaebm_fast as vf
from tests.helpers.golden import relative_error
from vaebm_fast.config import POTENTIALS, EnergyBlock, EnergyConfig, NVAEConfig, Potential
from vaebm_fast.frozen import FrozenVAEBM, freeze

FLOAT32_ERROR = 1e-5
FLOAT64_ERROR = 1e-11
TINY = dict(
    image_size=8,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=8,
    num_channels_dec=8,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
    num_preprocess_cells=1,
    num_postprocess_cells=2,
)
TINY_BLOCKS = (EnergyBlock(1, 1, True), EnergyBlock(1, 2), EnergyBlock(2, 2))


def build(config: NVAEConfig, blocks: Sequence[EnergyBlock] = TINY_BLOCKS) -> vf.VAEBM:
    """A VAEBM with BN statistics that matter, gammas of both signs, and an energy network that is not tiny."""
    energy = vf.EnergyNetwork(EnergyConfig(config.image_size, config.image_channels, 4, tuple(blocks)))
    model = vf.VAEBM(vf.NVAE(config), energy)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def tiny() -> vf.VAEBM:
    return build(NVAEConfig(**TINY))


def noise_of(model: vf.VAEBM | FrozenVAEBM, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """(eps_z, eps_x) as a chain's flat state gives them."""
    layout = model.noise_layout
    return layout.split(torch.randn(batch, layout.dim).to(dtype))


def largest_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert len(actual) == len(expected)
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def double(noise: tuple[Any, Tensor]) -> tuple[Any, Tensor]:
    return [eps.double() for eps in noise[0]], noise[1].double()


def assert_equals_plain_modules(
    model: vf.VAEBM, potentials: Sequence[Potential] = POTENTIALS, temperatures: Sequence[float] = (1.0, 0.7)
) -> None:
    """In float64 both agree to rounding, which shows the algebra; float32 stays at its own rounding."""
    truth = copy.deepcopy(model).double()
    frozen32, frozen64 = freeze(model), freeze(truth, torch.float64)
    noise = noise_of(model)
    noise64 = double(noise)
    for potential in potentials:
        for temperature in temperatures:
            u, gradients = truth.potential_and_grad(*noise64, potential, temperature)
            u64, gradients64 = frozen64.potential_and_grad(*noise64, potential, temperature)
            assert relative_error(u64, u) < FLOAT64_ERROR
            assert largest_error(gradients64, gradients) < FLOAT64_ERROR, (potential, temperature)
            u32, gradients32 = frozen32.potential_and_grad(*noise, potential, temperature)
            assert relative_error(u32, u) < FLOAT32_ERROR
            assert largest_error(gradients32, gradients) < FLOAT32_ERROR, (potential, temperature)
