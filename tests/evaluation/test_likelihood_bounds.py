"""Likelihood bounds against their formulas written out: constants, quantised images, the floor, importance weights."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.builders import SMALL_NVAE, generic
from tests.helpers.trainers import TINY
from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.data import ArraySource
from vaebm_fast.evaluation.likelihood import evaluate_likelihood
from vaebm_fast.models import NVAE
from vaebm_fast.models.nvae import bits_per_dim

SOURCE = ArraySource("random", np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8))


def narrow_nvae(**changes: int) -> NVAE:
    """In evaluation mode; its pixels' log sigmas are below -2, where VAEBM's floor would show."""
    vae = NVAE(replace(SMALL_NVAE, **changes)).eval()
    with torch.no_grad():
        vae.image_conditional[1].bias[3:].sub_(2.5)
    return vae


def log_weights_by_hand(vae: NVAE, x: Tensor, samples: int, seed: int) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) [K, N], z from draw k of seed `seed` + i; no floor under log sigma."""
    layout = vae.noise_layout
    seeds, weights = seed_tensor(range(seed, seed + len(x))), []
    for k in range(samples):
        elbo = vae.elbo(x, layout.split(normal(seeds, k, Stream.TRAIN_POSTERIOR, layout.dim))[0])
        mu, log_sigma = (5 * torch.tanh(part / 5) for part in elbo.logits.chunk(2, dim=1))
        log_p_x = torch.distributions.Normal(mu, log_sigma.exp() + 0.01).log_prob(2 * x - 1).sum(dim=(1, 2, 3))
        weights.append(log_p_x + elbo.log_p - elbo.log_q)
    return torch.stack(weights)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("num_nf", [0, 1])
@torch.no_grad()
def test_both_bounds_are_those_written_out_on_quantised_images(num_nf: int, bits: int) -> None:
    vae = narrow_nvae(num_nf=num_nf, num_x_bits=bits)
    x = torch.from_numpy(SOURCE.images >> (8 - bits)).permute(0, 3, 1, 2).float() / (2**bits - 1)
    weights = log_weights_by_hand(vae, x, 3, seed=11).double()
    bits_of_nats = 1 / (math.log(2) * 3 * 16 * 16)
    found = evaluate_likelihood(vae, SOURCE, importance_samples=3, batch_size=4, seed=11)
    assert found.elbo_bits_per_dim == pytest.approx(-float(weights.mean()) * bits_of_nats, rel=1e-5)
    bound = weights.logsumexp(0) - math.log(3)
    assert found.importance_weighted_bits_per_dim == pytest.approx(-float(bound.mean()) * bits_of_nats, rel=1e-6)
    assert math.log(3) * bits_of_nats > 1e-4 * abs(found.importance_weighted_bits_per_dim), "log K shows"


@pytest.mark.parametrize("samples", [1, 2, 50])
def test_samples_of_equal_weight_leave_the_bound_where_it_is(samples: int) -> None:
    """With all weights 0, every pixel is 1 with probability 1/2, and the posterior is the prior: one bit per pixel."""
    vae = NVAE(replace(TINY, likelihood="bernoulli")).eval()
    for parameter in vae.parameters():
        parameter.data.zero_()
    source = ArraySource("random", SOURCE.images[:, :8, :8, :1])
    found = evaluate_likelihood(vae, source, importance_samples=samples)
    assert found.elbo_bits_per_dim == pytest.approx(1, abs=1e-5)
    assert found.importance_weighted_bits_per_dim == pytest.approx(1, abs=1e-5)
    x = torch.rand(3, 1, 8, 8).round()
    noise = [[torch.randn(3, *shape) for shape in vae.latent_shapes] for _ in range(samples)]
    with torch.no_grad():
        bound = vae.importance_weighted_bound(x, noise)
    assert bound.tolist() == pytest.approx([-64 * math.log(2)] * 3, abs=1e-4)


@torch.no_grad()
def test_the_mixture_of_an_nvae_has_as_many_levels_as_its_bits_say() -> None:
    """The probabilities of all colours of three bits sum to one."""
    vae = NVAE(replace(SMALL_NVAE, likelihood="logistic_mixture", num_mixture_dec=2, num_x_bits=3))
    levels = torch.arange(8, dtype=torch.float64) / 7
    colours = torch.cartesian_prod(levels, levels, levels)[:, :, None, None]
    logits = 0.5 * torch.randn(1, 20, 1, 1, dtype=torch.float64).expand(512, -1, -1, -1)
    assert float(vae.pixels(logits).log_prob(colours).exp().sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 4), (3, 32, 32)])
def test_bits_per_dim_divide_nats_by_log_two_pixels_and_channels(shape: tuple[int, int, int]) -> None:
    channels, height, width = shape
    nats = torch.tensor([1.0, -2.5]) * math.log(2) * channels * height * width
    assert bits_per_dim(nats, shape).tolist() == pytest.approx([1, -2.5])


@torch.no_grad()
def test_a_density_has_the_floor_unless_none_is_asked_for() -> None:
    vae = generic(narrow_nvae())
    x, eps_q = (
        torch.rand(2, 3, 16, 16, dtype=torch.float64),
        [torch.randn(2, *shape, dtype=torch.float64) for shape in vae.latent_shapes],
    )
    vae.image_conditional[1].bias[3:] -= 20
    floored, bare = vae.elbo(x, eps_q), vae.elbo(x, eps_q, log_sigma_floor=None)
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in bare.logits.chunk(2, dim=1))
    assert bool((log_sigma < -2).all())
    for elbo, sigma in ((floored, math.exp(-2) + 0.01), (bare, log_sigma.exp() + 0.01)):
        expected = torch.distributions.Normal(mu, sigma).log_prob(2 * x - 1).sum(dim=(1, 2, 3))
        torch.testing.assert_close(elbo.reconstruction_loss, -expected)
