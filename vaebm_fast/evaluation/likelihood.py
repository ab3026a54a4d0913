"""Likelihood bounds of an NVAE on a source, in bits per dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaebm_fast.data import ImageSource, quantise, to_tensor
from vaebm_fast.models.nvae import NVAE, bits_per_dim
from vaebm_fast.noise import NoiseLayout, Stream, normal, seed_tensor


@dataclass(frozen=True)
class Likelihood:
    """Means over a source, in bits per dimension: the negative ELBO, and the tighter importance-weighted bound."""

    elbo_bits_per_dim: float
    importance_weighted_bits_per_dim: float
    total_images: int
    importance_samples: int


def _in_order(source: ImageSource, batch_size: int, bits: int) -> Iterator[tuple[range, Tensor]]:
    for at in range(0, len(source), batch_size):
        rows = range(at, min(at + batch_size, len(source)))
        yield rows, quantise(to_tensor(source.read(np.asarray(rows))), bits)


@torch.no_grad()
def evaluate_likelihood(
    vae: NVAE, source: ImageSource, *, importance_samples: int = 1, batch_size: int = 64, seed: int = 0
) -> Likelihood:
    """Both bounds over all images; noise of image i, sample k is draw k of seed `seed` + i, whatever the batch size.

    Gaussian pixels count without VAEBM's floor. For continuous pixels the figure is a density's and may be negative.
    """
    if importance_samples < 1:
        raise ValueError(f"importance_samples is {importance_samples}; at least one is needed.")
    layout, device = NoiseLayout(vae.latent_shapes, vae.image_shape), vae.prior_ftr0.device
    elbos, bounds = [], []
    for rows, images in _in_order(source, batch_size, vae.config.num_x_bits):
        seeds, x = seed_tensor((seed + row for row in rows), device), images.to(device)
        noise = [
            layout.split(normal(seeds, k, Stream.TRAIN_POSTERIOR, layout.dim))[0] for k in range(importance_samples)
        ]
        elbo = vae.elbo(x, noise[0], log_sigma_floor=None)
        elbos.append(elbo.reconstruction_loss + elbo.kl.sum(1))
        bounds.append(-vae.importance_weighted_bound(x, noise))
    return Likelihood(
        float(bits_per_dim(torch.cat(elbos), vae.image_shape).mean()),
        float(bits_per_dim(torch.cat(bounds), vae.image_shape).mean()),
        len(source),
        importance_samples,
    )
