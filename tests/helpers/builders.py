"""Modules in a state that a test can learn from, and the published layout and formulas that they must match."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import DecoderCombiner

# 4 x 4 pixels in colour, two groups of latents.
TINY_NVAE = NVAEConfig(
    image_size=4,
    image_channels=3,
    num_latent_scales=2,
    num_groups_per_scale=1,
    num_latent_per_group=2,
    num_channels_enc=4,
    num_channels_dec=4,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)
TINY_ENERGY = EnergyConfig(image_size=4, image_channels=3, width=3, blocks=parse_blocks("1-1d 1-2"))
GREY_NVAE, GREY_ENERGY = replace(TINY_NVAE, image_channels=1), replace(TINY_ENERGY, image_channels=1)
# 16 x 16 pixels, two groups of latents on either scale.
SMALL_NVAE = NVAEConfig(
    image_size=16,
    num_latent_scales=2,
    num_groups_per_scale=2,
    num_latent_per_group=2,
    num_channels_enc=8,
    num_channels_dec=8,
    num_preprocess_cells=1,
    num_postprocess_cells=1,
    num_cell_per_cond_enc=1,
    num_cell_per_cond_dec=1,
)
SMALL_ENERGY = EnergyConfig(image_size=16, image_channels=3, width=4, blocks=parse_blocks("1-1d 1-2 2-2d"))


def generic(module: nn.Module) -> Any:
    """The module in eval mode and float64, with statistics and weights of its batch normalisations that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval().double()


def wn(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.weight", f"{name}.log_weight_norm"} | ({f"{name}.bias"} if bias else set())


def written_out_wn(state: dict[str, Tensor], name: str, x: Tensor, **options: Any) -> Tensor:
    weight = state[f"{name}.weight"]
    norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    effective = state[f"{name}.log_weight_norm"].exp() * weight / (norm + 1e-5)
    return F.conv2d(x, effective, state.get(f"{name}.bias"), **options)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def double_noise(vae: NVAE, batch: int) -> list[Tensor]:
    return [torch.randn(batch, *shape, dtype=torch.float64) for shape in vae.latent_shapes]


def tiny_grey_model() -> VAEBM:
    """26 noise elements per image; pixels on both sides of the clamp and log sigmas on both sides of the floor."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = VAEBM(NVAE(GREY_NVAE), EnergyNetwork(GREY_ENERGY)).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2)
        model.energy.initialize_from_data(torch.rand(8, 1, 4, 4))
    for cell in model.vae.dec_tower:
        if isinstance(cell, DecoderCombiner):
            cell.conv.log_weight_norm.data += 1
    head = model.vae.image_conditional[1]
    head.log_weight_norm.data += 2.5
    head.bias.data = torch.tensor([0.5, -2.5])
    model.energy.linear.weight.data *= 50
    return model


def noise_of(model: VAEBM, count: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Float64 noise of `count` images."""
    generator = torch.Generator().manual_seed(seed)
    *eps_z, eps_x = (
        torch.randn(count, *shape, dtype=torch.float64, generator=generator)
        for shape in (*model.latent_shapes, model.image_shape)
    )
    return eps_z, eps_x
