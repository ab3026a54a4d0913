"""Likelihood bounds of an NVAE on a source, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import NVAEConfig, whole_number
from vaebm_fast.data import ImageSource, quantise, to_tensor
from vaebm_fast.models.nvae import NVAE, bits_per_dim
from vaebm_fast.runtime.devices import without_autocast
from vaebm_fast.runtime.errors import UserError


@dataclass(frozen=True)
class Likelihood:
    """Means over a source, in `unit`: negative ELBO and importance-weighted bound, which never exceeds it."""

    elbo_bits_per_dim: float
    importance_weighted_bits_per_dim: float
    unit: str
    total_images: int
    importance_samples: int


def unit(config: NVAEConfig) -> str:
    """Description of this NVAE's bits per dimension and of what they are comparable with."""
    channels, height, width = config.counted_shape
    if config.likelihood == "gaussian":
        return (
            "bits per dimension of a density over pixels in [-1, 1], which may be negative; not comparable with "
            "published bits per dimension, which are of discrete pixels"
        )
    if config.likelihood == "bernoulli":
        return f"bits per dimension of {channels} x {height} x {width} binary pixels"
    return f"bits per dimension of {channels} x {height} x {width} pixels with {2**config.num_x_bits} levels each"


@torch.no_grad()
def evaluate_likelihood(
    vae: NVAE,
    source: ImageSource,
    *,
    importance_samples: int = 1,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Likelihood:
    """Both bounds over all images. Sample k of image i uses draw k of seed `seed` + i, for any batch size.

    Both use the same samples: -mean_k log w_k and log K - logsumexp_k log w_k with w_k = p(x, z_k) / q(z_k|x); they are
    equal for K = 1. Gaussian pixels are evaluated without VAEBM's floor. progress: show a bar if stderr is a terminal.
    """
    importance_samples = whole_number("importance_samples", importance_samples)
    batch_size, seed = whole_number("batch_size", batch_size), whole_number("seed", seed)
    for name, value in (("importance_samples", importance_samples), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1.")
    layout, device = vae.noise_layout, vae.prior_ftr0.device
    elbos, bounds = [], []
    with tqdm(total=len(source), unit="image", disable=None if progress else True) as bar:
        for rows, images in _in_order(source, batch_size, vae.config.num_x_bits):
            seeds, x = seed_tensor((seed + row for row in rows), device), images.to(device)
            noise = [
                layout.split(normal(seeds, k, Stream.TRAIN_POSTERIOR, layout.dim))[0] for k in range(importance_samples)
            ]
            with without_autocast(device):
                log_weights = vae.log_importance_weights(x, noise)
            elbos.append(-log_weights.mean(0))
            bounds.append(math.log(importance_samples) - log_weights.logsumexp(0))
            bar.update(len(rows))
    elbo, bound = (bits_per_dim(torch.cat(nats), vae.config.counted_shape).mean() for nats in (elbos, bounds))
    return Likelihood(float(elbo), float(bound), unit(vae.config), len(source), importance_samples)


def _in_order(source: ImageSource, batch_size: int, bits: int) -> Iterator[tuple[range, Tensor]]:
    for at in range(0, len(source), batch_size):
        rows = range(at, min(at + batch_size, len(source)))
        yield rows, quantise(to_tensor(source.read(np.asarray(rows))), bits)
