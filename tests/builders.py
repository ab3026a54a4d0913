"""Modules in a state that a test can learn from, and the published layout and formulas that they must match."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vaebm_fast.config import EnergyConfig, NVAEConfig, parse_blocks

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
