"""Weights that make an error in any part of the frozen pair visible in the pair's gradient.

With default random weights the branch of a residual cell adds about 1% to its skip, and the energy network's gradient
vanishes beside that of log p: a wrong cell, or no energy network at all, stays below every bfloat16 tolerance.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import Potential
from vaebm_fast.models.layers import BatchNorm, Cell, InvertedResidual, WNConv2d
from vaebm_fast.models.vaebm import VAEBM

BRANCH_SCALE = 300.0  # of the last batch norm of each inverted residual of the decoder
MEAN_SPREAD, LOG_SIGMA = 0.1, -1.5  # of the pixels: with sigma = 0.23, x = -1 and 1 are far away


@torch.no_grad()
def make_sensitive(model: VAEBM) -> VAEBM:
    """Scale weights in place so that each cell's branch, and the energy, matter in the official gradient.

    The energy's gradient becomes as long as that of the rest, for one image of the model. Pixels stay clear of -1 and
    1, where a rounding error decides whether they are clamped and have a gradient. Returns `model`.
    """
    for cell in decoder_cells(model):
        if isinstance(cell._ops[0], InvertedResidual):
            last = cell._ops[0].conv[-1]
            assert isinstance(last, BatchNorm)
            last.bn.weight.mul_(BRANCH_SCALE)
    last_conv = model.vae.image_conditional[1]
    assert isinstance(last_conv, WNConv2d) and last_conv.bias is not None
    channels = model.image_shape[0]
    eps_z, _ = _start(model)
    means = model.vae.decode(eps_z).logits[:, :channels]
    last_conv.log_weight_norm.add_(math.log(MEAN_SPREAD) - means.std().log())
    last_conv.bias.zero_()
    last_conv.bias[channels:] = LOG_SIGMA
    whole, of_energy = _gradient(model, "official"), _gradient(model, "energy")
    model.energy.linear.weight.mul_((whole - of_energy).norm() / of_energy.norm())
    return model


def decoder_cells(model: VAEBM) -> list[Cell]:
    """The residual cells of the decoder, in the order of the forward pass."""
    towers = (model.vae.dec_tower, model.vae.post_process)
    return [cell for tower in towers for cell in tower.modules() if isinstance(cell, Cell)]


def _start(model: VAEBM) -> tuple[list[Tensor], Tensor]:
    """Noise of one image, that of seed 0."""
    return model.noise_layout.split(
        normal(seed_tensor(range(1), model.device), 0, Stream.CHAIN, model.noise_layout.dim)
    )


def _gradient(model: VAEBM, potential: Potential) -> Tensor:
    """Of one image, [D]."""
    _, gradients = model.potential_and_grad(*_start(model), potential)
    return torch.cat([gradient.flatten() for gradient in gradients])
