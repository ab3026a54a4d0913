"""Stage 1's step against the same step written out in plain torch, and what its trainer gives to it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.builders import SMALL_NVAE
from tests.helpers.by_hand import (
    Adamax,
    Vectors,
    batchnorm_sum,
    largest_change_error,
    seen_by,
    spectral_sum,
    start_vectors,
)
from tests.helpers.trainers import SOURCE, TINY, vae_trainer
from vaebm_fast.config import VAETraining
from vaebm_fast.data import ArraySource, TorchLoader
from vaebm_fast.models import NVAE
from vaebm_fast.models.layers import ActivatedConv
from vaebm_fast.training import VAETrainer
from vaebm_fast.training.losses import balanced_kl
from vaebm_fast.training.vae import VAEUpdate

# Three groups of latents: one at the top, two below, so that their balancing weights differ.
CONFIG = replace(SMALL_NVAE, image_size=8, num_channels_enc=4, num_channels_dec=4, ada_groups=True)
# 100 steps in 10 epochs. Every number is exaggerated, and none is a default.
TRAINING = VAETraining(
    learning_rate=8e-3,
    learning_rate_min=2e-3,
    warmup_epochs=2,
    weight_decay=0.3,
    adamax_eps=0.05,
    weight_decay_norm=0.2,
    weight_decay_norm_init=3.0,
    kl_anneal_portion=0.5,
    kl_const_portion=0.04,
    kl_const_coeff=0.07,
    mixed_precision=False,
)
STEPS = (1, 34, 80)  # in the warm-up; while the KL is annealed; after that
RATES = (
    8e-3 * 2 / 20,
    2e-3 + 6e-3 * (1 + math.cos(math.pi * 14 / 80)) / 2,
    2e-3 + 6e-3 * (1 + math.cos(math.pi * 60 / 80)) / 2,
)
KL_COEFFS = (0.07, (34 - 4) / 50, 1.0)


def generic_nvae(num_nf: int) -> NVAE:
    """Gammas whose largest is one only, log sigmas of pixels below -2, and a convolution that is nearly 0."""
    vae = NVAE(replace(CONFIG, num_nf=num_nf))
    for layer in vae.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, -1.5, 1.5)
            nn.init.normal_(layer.bias)
    with torch.no_grad():
        vae.image_conditional[1].bias[3:] -= 2.5
        vae.post_process[0]._ops[0].conv[4].weight.mul_(1e-5)
    return vae


def loss_by_hand(vae: NVAE, x: Tensor, eps_q: list[Tensor], coeff: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss without regularisers, and reconstruction and KL per image."""
    elbo = vae.elbo(x, eps_q)
    mu, log_sigma = (5 * torch.tanh(part / 5) for part in elbo.logits.chunk(2, dim=1))
    pixels = torch.distributions.Normal(mu, log_sigma.exp() + 0.01)  # no floor under log sigma
    reconstruction = -pixels.log_prob(2 * x - 1).sum(dim=(1, 2, 3))
    weights = torch.ones(3)
    if coeff < 1:
        alpha = torch.tensor([1.0, 4 / 2, 4 / 2])  # (2^i)^2 / groups of the scale, i = 0 at the top
        weights = (elbo.kl.detach().abs().mean(0) + 0.01) / alpha
        weights = weights / weights.mean()
    return (reconstruction + coeff * (weights * elbo.kl).sum(1)).mean(), reconstruction, elbo.kl.sum(1)


def step_by_hand(
    vae: NVAE,
    optimizer: Adamax,
    vectors: Vectors,
    x: Tensor,
    eps_q: list[Tensor],
    rate: float,
    coeff: float,
    wdn: float,
) -> dict[str, float]:
    loss, reconstruction, kl = loss_by_hand(vae, x, eps_q, coeff)
    spectral, batchnorm = spectral_sum(vae, vectors), batchnorm_sum(vae)
    vae.zero_grad()
    (loss + wdn * (spectral + batchnorm)).backward()
    optimizer.step(rate)
    values = {
        "loss": loss,
        "reconstruction_loss": reconstruction.mean(),
        "kl": kl.mean(),
        "bits_per_dim": (reconstruction + kl).mean() / (math.log(2) * 8 * 8 * 3),
        "spectral": spectral,
        "batchnorm": batchnorm,
    }
    return {"learning_rate": rate, "kl_coeff": coeff} | {name: float(value.detach()) for name, value in values.items()}


@pytest.mark.parametrize("anneal", [False, True])
@pytest.mark.parametrize("num_nf", [0, 1])
def test_three_updates_are_those_written_out(num_nf: int, anneal: bool) -> None:
    vae = generic_nvae(num_nf)
    expected = copy.deepcopy(vae).train()
    training = replace(TRAINING, weight_decay_norm_anneal=anneal)
    update = VAEUpdate(vae.eval(), training, steps_per_epoch=10, total_steps=100)
    update.spectral.load_state_dict(start_vectors(vae))
    vectors, optimizer = start_vectors(vae), Adamax(expected, eps=0.05, weight_decay=0.3)
    for step, rate, coeff in zip(STEPS, RATES, KL_COEFFS, strict=True):
        x, eps_q = torch.rand(4, 3, 8, 8), [torch.randn(4, *shape) for shape in vae.latent_shapes]
        wdn = math.exp((1 - coeff) * math.log(3) + coeff * math.log(0.2)) if anneal else 0.2
        before = copy.deepcopy(expected)
        scalars = step_by_hand(expected, optimizer, vectors, x, eps_q, rate, coeff, wdn)
        found = update(x, eps_q, step)
        assert {name: float(found[name]) for name in scalars} == pytest.approx(scalars, rel=1e-5), step
        assert largest_change_error(before, vae, expected) < 1e-3, step


def test_balancing_weighs_a_group_by_the_mean_size_of_its_kl_and_passes_no_gradient() -> None:
    """Group means of |KL|: 2, 0.03, 1; their means without |.|: 0, 0.03, 1."""
    kl = torch.tensor([[2.0, 0.05, 0.5], [-2.0, 0.01, 1.5]], requires_grad=True)
    raw = torch.tensor([2.01 / 1, 0.04 / 2, 1.01 / 4])
    weights = raw / raw.mean()
    loss = balanced_kl(kl, 0.5, torch.tensor([1.0, 2.0, 4.0]))
    torch.testing.assert_close(loss, 0.5 * (kl * weights).sum(1))
    loss.backward(torch.tensor([1.0, -3.0]))
    torch.testing.assert_close(kl.grad, 0.5 * torch.tensor([[1.0], [-3.0]]) * weights)


@pytest.mark.parametrize("mixed, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_mixed_precision_runs_the_network_in_bfloat16_and_the_regularisers_in_float32(
    mixed: bool, dtype: torch.dtype
) -> None:
    vae = generic_nvae(0)
    training = replace(TRAINING, mixed_precision=mixed)
    update = VAEUpdate(vae, training, steps_per_epoch=10, total_steps=100)
    update.spectral.load_state_dict(start_vectors(vae))
    spectral = float(spectral_sum(copy.deepcopy(vae), start_vectors(vae)).detach())
    x, eps_q = torch.rand(4, 3, 8, 8), [torch.randn(4, *shape) for shape in vae.latent_shapes]
    found: list[Any] = []
    (features,) = seen_by(vae.enc0[1], lambda: found.append(update(x, eps_q, 1)))
    assert features.dtype == dtype
    assert float(found[0]["spectral"]) == pytest.approx(spectral, rel=1e-5)


# What the trainer gives to the update.
def given_to_update(trainer: VAETrainer, steps: int) -> list[tuple[Tensor, list[Tensor], int]]:
    """The arguments of the update at steps 0, 1, ..."""
    seen: list[tuple[Tensor, list[Tensor], int]] = []
    trainer.update = lambda *arguments: seen.append(arguments)  # type: ignore[assignment]
    for step in range(steps):
        trainer.step(step)
    return seen


def flat(eps_q: list[Tensor]) -> Tensor:
    return torch.cat([eps.flatten(1) for eps in eps_q], dim=1)


def test_every_image_of_every_step_has_posterior_noise_of_its_own() -> None:
    seen = given_to_update(vae_trainer(), 3)
    assert [step for _, _, step in seen] == [0, 1, 2]
    noise = torch.cat([flat(eps_q) for _, eps_q, _ in seen])
    assert len(noise.unique(dim=0)) == 3 * 128
    assert len(noise.unique()) > 0.99 * noise.numel(), "nor do its elements repeat"
    deviation = 1 / math.sqrt(noise.numel())
    assert abs(float(noise.mean())) < 5 * deviation and abs(float(noise.var()) - 1) < 5 * math.sqrt(2) * deviation


def test_posterior_noise_of_another_seed_is_another_and_an_images_number_decides_not_the_batch() -> None:
    training = replace(vae_trainer().training, batch_size=64)
    half, other = (VAETrainer(TINY, training, TorchLoader(SOURCE, 64, seed=seed), seed=seed) for seed in (5, 6))
    whole = flat(vae_trainer().noise(1))
    halves = torch.cat([flat(half.noise(2)), flat(half.noise(3))])
    assert torch.equal(whole, halves)
    assert not set(flat(other.noise(2)).flatten().tolist()) & set(halves.flatten().tolist())


def test_warm_up_and_annealing_count_the_epochs_of_the_source() -> None:
    """40 images, batches of 8: five steps per epoch, 50 in all; 10 warm up, and the KL is annealed until step 25.05."""
    training = replace(TRAINING, epochs=10, batch_size=8, kl_const_portion=1e-3, kl_const_coeff=1e-3)
    trainer = VAETrainer(TINY, training, TorchLoader(ArraySource("few", SOURCE.images[:40]), 8))
    assert trainer.total_steps == 50
    scalars = {step: trainer.step(step) for step in (0, 4, 9, 10, 30, 49)}
    rates = [8e-3 / 10, 8e-3 * 5 / 10, 8e-3, 8e-3, 5e-3, 2e-3 + 3e-3 * (1 + math.cos(math.pi * 39 / 40))]
    coeffs = [1e-3, (4 - 0.05) / 25, (9 - 0.05) / 25, (10 - 0.05) / 25, 1, 1]
    assert [found["learning_rate"] for found in scalars.values()] == pytest.approx(rates)
    assert [found["kl_coeff"] for found in scalars.values()] == pytest.approx(coeffs)
    assert trainer.update.optimizer.param_groups[0]["lr"] == pytest.approx(rates[-1])


def outputs_during(module: nn.Module, run: Any) -> list[Tensor]:
    outputs: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: outputs.append(output.detach()))
    run()
    hook.remove()
    return outputs


def test_a_fresh_res_elu_network_is_initialised_on_its_first_batch_and_never_again() -> None:
    """Each convolution of a cell then gives mean 0 and standard deviation 1/5 per channel on that batch."""
    config = replace(TINY, arch_instance="res_elu")
    options: dict[str, Any] = {"mixed_precision": False, "warmup_epochs": 0, "weight_decay": 0.0, "batch_size": 32}
    still = VAETraining(learning_rate=1e-30, learning_rate_min=0.0, **options)
    trainer = VAETrainer(config, still, TorchLoader(SOURCE, 32, seed=5), seed=5)
    trainer.step(0)
    cells = [cell for cell in trainer.vae.modules() if isinstance(cell, ActivatedConv)]
    assert len(cells) > 10
    x, eps_q = trainer.images(0), trainer.noise(0)
    for cell in cells:
        (output,) = outputs_during(cell.conv_0, lambda: trainer.vae.elbo(x, eps_q))
        std = output.std(dim=(0, 2, 3))
        torch.testing.assert_close(std, torch.full_like(std, 0.2), rtol=2e-3, atol=0)
        assert float(output.mean(dim=(0, 2, 3)).abs().max()) < 1e-3
    before = copy.deepcopy(trainer.vae.state_dict())
    trainer.step(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.vae.state_dict().items())


def test_samples_on_the_way_are_mean_images_in_evaluation_mode_and_change_nothing() -> None:
    trainer = vae_trainer()
    trainer.step(0)
    trainer.vae.train()
    before = copy.deepcopy(trainer.vae.state_dict())
    first, second = trainer.sample_images(), trainer.sample_images()
    assert first.shape == (16, 8, 8, 1) and torch.equal(first, second)
    assert len(np.unique(first.numpy(), axis=0)) == 16
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.vae.state_dict().items())
