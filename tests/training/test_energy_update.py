"""Stage 2's step against the same step written out in plain torch: its update, its chains, its replay buffer."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.builders import SMALL_ENERGY
from tests.helpers.by_hand import (
    ClippedAdam,
    largest_change_error,
    seen_by,
    seen_by_energy_update,
    spectral_sum,
    start_vectors,
)
from tests.helpers.trainers import SOURCE, TINY, TINY_ENERGY, energy_trainer
from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.chain.noise import Stream, normal, step_seeds
from vaebm_fast.config import PRESETS, ChainConfig, EnergyTraining, Potential, ReplayBuffer
from vaebm_fast.data import TorchLoader
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.models.layers import DecoderCombiner, WNConv2d
from vaebm_fast.training import EnergyTrainer
from vaebm_fast.training.energy import EnergyUpdate, clip_by_second_moment

TRAINING = EnergyTraining(
    learning_rate=5e-3, beta1=0.7, beta2=0.9, weight_decay=0.1, spectral_coeff=0.3, ema_decay=0.8, buffer=None
)


# The update.
def generic_energy() -> EnergyNetwork:
    """Slopes that the clip can cut, and a last bias whose gradient is its weight decay, of the size of Adam's eps."""
    energy = EnergyNetwork(SMALL_ENERGY)
    energy.initialize_from_data(torch.rand(8, 3, 16, 16))
    with torch.no_grad():
        energy.linear.weight.mul_(2)
        energy.linear.bias.fill_(1e-7)
    return energy


def step_by_hand(
    energy: EnergyNetwork, averaged: EnergyNetwork, optimizer: ClippedAdam, vectors: Any, images: tuple[Tensor, Tensor]
) -> dict[str, float]:
    energy_data, energy_negative = (energy(x).mean() for x in images)
    spectral = spectral_sum(energy, vectors)
    energy.zero_grad()
    (energy_data - energy_negative + 0.3 * spectral).backward()
    optimizer.step()
    with torch.no_grad():
        for average, weight in zip(averaged.parameters(), energy.parameters(), strict=True):
            average.copy_(0.8 * average + 0.2 * weight)
    loss = energy_data - energy_negative
    values = {"loss": loss, "spectral": spectral, "energy_data": energy_data, "energy_negative": energy_negative}
    return {name: float(value.detach()) for name, value in values.items()}


def test_three_updates_are_those_written_out() -> None:
    energy = generic_energy()
    expected, averaged = copy.deepcopy(energy), copy.deepcopy(energy)
    update = EnergyUpdate(energy, TRAINING)
    update.spectral.load_state_dict(start_vectors(energy))
    vectors = start_vectors(energy)
    optimizer = ClippedAdam(expected, lr=5e-3, betas=(0.7, 0.9), weight_decay=0.1)
    for step, contrast in enumerate((0.05, 1.0, 3.0)):
        images = torch.rand(8, 3, 16, 16), (0.5 - contrast * torch.rand(8, 3, 16, 16)).abs()
        before = copy.deepcopy(expected), copy.deepcopy(averaged)
        scalars = step_by_hand(expected, averaged, optimizer, vectors, images)
        found = update(*images)
        assert {name: float(found[name]) for name in scalars} == pytest.approx(scalars, rel=1e-4, abs=1e-5), step
        assert largest_change_error(before[0], energy, expected) < 1e-3, step
        assert largest_change_error(before[1], update.averaged, averaged) < 1e-3, step
        if step == 0:
            assert max(float(p.grad.abs().max()) for p in expected.parameters() if p.grad is not None) > 0.2
    assert optimizer.clipped[0] == 0 and min(optimizer.clipped[1:]) > 10, optimizer.clipped


def test_weight_norm_is_that_of_the_updated_weights() -> None:
    energy = generic_energy()
    found = EnergyUpdate(energy, TRAINING)(torch.rand(4, 3, 16, 16), torch.rand(4, 3, 16, 16))
    expected = math.sqrt(sum(float(parameter.detach().square().sum()) for parameter in energy.parameters()))
    assert float(found["weight_norm"]) == pytest.approx(expected, rel=1e-6)


# The chains and what becomes of them.
def trainer_with_sensitive_images(**changes: Any) -> EnergyTrainer:
    """Whose latents move the pixels' means, and whose pixels have sigmas on both sides of the floor."""
    torch.manual_seed(0)
    vae = NVAE(TINY)
    with torch.no_grad():
        for cell in vae.dec_tower:
            if isinstance(cell, DecoderCombiner):
                cell.conv.log_weight_norm.add_(1)
        head = vae.image_conditional[1]
        head.log_weight_norm.add_(1.5)
        head.bias[1:].sub_(2)
    training = replace(PRESETS["digits"].energy_training, iterations=6, batch_size=8, **changes)
    return EnergyTrainer(vae, TINY_ENERGY, training, TorchLoader(SOURCE, 8, seed=5), seed=5)


def steepen(trainer: EnergyTrainer) -> None:
    """Make the energy bend the trainer's chains."""
    with torch.no_grad():
        trainer.model.energy.linear.weight.mul_(300)


def chain_by_hand(trainer: EnergyTrainer, step: int, *, steps: int, h: float, potential: Potential) -> Tensor:
    """eps [N, D] after the Langevin steps of a training step, on the plain model as it is now."""
    layout = trainer.model.noise_layout
    seeds, eps = step_seeds(5, step, 8, torch.device("cpu")), trainer.start(step)
    for k in range(1, steps + 1):
        _, gradients = trainer.model.potential_and_grad(*layout.split(eps), potential)
        gradient = layout.join(gradients[:-1], gradients[-1])
        eps = eps - h / 2 * gradient + math.sqrt(h) * normal(seeds, k, Stream.TRAIN_CHAIN, layout.dim)
    return eps


@pytest.mark.parametrize("potential, h", [("official", 2e-4), ("paper", 0.05)])
@pytest.mark.parametrize("mean", [True, False])
def test_negatives_are_images_of_chains_at_the_present_energy(mean: bool, potential: Potential, h: float) -> None:
    chain, buffer = ChainConfig(3, h, potential), ReplayBuffer(size=16, max_probability=0.5, anneal_steps=0)
    trainer = trainer_with_sensitive_images(buffer=buffer, chain=chain, use_mean_negatives=mean)
    assert trainer.buffer is not None
    trainer.step(0)

    @torch.no_grad()
    def written_out() -> tuple[Tensor, Tensor]:
        eps = chain_by_hand(trainer, 1, steps=3, h=h, potential=potential)
        eps_z, eps_x = trainer.sampler.noise_layout.split(eps)
        images = trainer.model.mean_image(eps_z) if mean else trainer.model.image(eps_z, eps_x)
        return images, eps[:, : trainer.sampler.noise_layout.latent_dim]

    other, _ = written_out()
    steepen(trainer)
    images, latents = written_out()
    assert float((images - other).abs().max()) > 5e-4, "another energy gives other images"
    found = trainer.negatives(1)
    torch.testing.assert_close(found, images, rtol=0, atol=2e-5)
    assert not found.requires_grad
    kept = trainer.buffer.gather(torch.arange(8, 16))
    torch.testing.assert_close(kept, latents, rtol=0, atol=1e-4)


def test_an_update_gets_the_steps_images_and_the_ends_of_the_steps_chains() -> None:
    trainer, other = energy_trainer(), energy_trainer()
    positive, negative = seen_by_energy_update(trainer.update, lambda: trainer.step(1))
    assert not positive.requires_grad and not negative.requires_grad
    assert torch.equal(negative, other.negatives(1))
    pixels = (255 * positive).round().byte().flatten(1)
    images = {bytes(image.flatten()) for image in SOURCE.images}
    assert all(bytes(row.numpy()) in images for row in pixels)
    other, _ = seen_by_energy_update(trainer.update, lambda: trainer.step(2))
    assert not torch.equal(positive, other)


def test_the_nvae_stays_in_evaluation_mode_and_as_it_is() -> None:
    vae = NVAE(TINY).train()
    training = replace(PRESETS["digits"].energy_training, batch_size=8, chain=ChainConfig(2, 0.15, "paper"))
    before = copy.deepcopy(vae.state_dict())
    trainer = EnergyTrainer(vae, TINY_ENERGY, training, TorchLoader(SOURCE, training.batch_size))
    for step in range(2):
        trainer.step(step)
    assert not any(module.training for module in trainer.model.vae.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.vae.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.vae.parameters())


def test_every_chain_of_every_step_starts_from_noise_of_its_own() -> None:
    starts = torch.cat([energy_trainer().start(step) for step in range(3)])
    assert len(starts.unique(dim=0)) == 3 * 8
    assert len(starts.unique()) > 0.99 * starts.numel()
    deviation = 1 / math.sqrt(starts.numel())
    assert abs(float(starts.mean())) < 5 * deviation and abs(float(starts.var()) - 1) < 5 * math.sqrt(2) * deviation


# The replay buffer.
def filled(size: int, **changes: Any) -> EnergyTrainer:
    """Row i of the buffer is i + 100."""
    trainer = energy_trainer(buffer=ReplayBuffer(size=size, **changes))
    assert trainer.buffer is not None
    rows = 100 + torch.arange(float(size))[:, None]
    trainer.buffer.push(rows.expand(-1, trainer.sampler.noise_layout.latent_dim))
    return trainer


def test_a_chain_from_the_buffer_has_kept_latents_and_its_own_fresh_pixels() -> None:
    trainer, fresh = filled(16, max_probability=0.5, anneal_steps=0), energy_trainer()
    latents = trainer.sampler.noise_layout.latent_dim
    starts, expected = (torch.cat([t.start(step) for step in range(20)]) for t in (trainer, fresh))
    assert torch.equal(starts[:, latents:], expected[:, latents:])
    kept = starts[:, 0] >= 100
    assert 40 < int(kept.sum()) < 120
    assert sum(0 < int(batch.sum()) < 8 for batch in kept.reshape(20, 8)) > 15, "chosen per chain, not per batch"
    assert torch.equal(starts[~kept], expected[~kept])
    assert bool((starts[kept, :latents] == starts[kept, :1]).all()), "one row of the buffer each"


def test_every_row_of_the_buffer_is_taken_equally_often() -> None:
    trainer = filled(16, max_probability=0.4, anneal_steps=0)
    first = torch.cat([trainer.start(step)[:, 0] for step in range(500)])
    rows = torch.bincount((first[first >= 100] - 100).long(), minlength=16)
    expected = 500 * 8 * 0.4 / 16
    assert len(rows) == 16
    assert bool(((rows - expected).abs() < 4.5 * math.sqrt(expected)).all()), rows.tolist()


def test_the_first_step_takes_nothing_from_the_buffer_where_its_probability_is_annealed() -> None:
    trainer = filled(16, max_probability=1.0, anneal_steps=1)
    latents = trainer.sampler.noise_layout.latent_dim
    assert torch.equal(trainer.start(0), energy_trainer().start(0))
    assert bool((trainer.start(1)[:, :latents] >= 100).all())


def test_each_step_adds_the_latents_of_its_chains() -> None:
    trainer = energy_trainer(buffer=ReplayBuffer(size=20))
    assert trainer.buffer is not None
    sizes, kept = [], []
    for step in range(3):
        trainer.step(step)
        sizes.append(len(trainer.buffer))
        kept.append(trainer.buffer.gather(torch.tensor([0, 4])))
    assert sizes == [8, 16, 20]
    assert kept[0].shape == (2, trainer.sampler.noise_layout.latent_dim)
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[1][1], kept[2][1])
    assert not torch.equal(kept[1][0], kept[2][0]), "the oldest four make room"


# Initialisation and samples on the way.
def test_a_fresh_energy_network_is_initialised_on_five_batches_taken_as_one_and_never_again() -> None:
    """Each convolution then gives standard deviation 1/5 per channel on them, and mean 0 where it has a bias."""
    trainer = energy_trainer(learning_rate=1e-30, weight_decay=0.0, init_batches=5)
    trainer.step(0)
    energy = trainer.model.energy
    images = torch.cat([trainer.images(step) for step in range(5)])
    convs = [module for module in energy.modules() if isinstance(module, WNConv2d)]
    assert len(convs) == 1 + 2 * 4 + 2 and len(images) == 40
    for conv in convs:
        (x,) = seen_by(conv, lambda: energy(images))
        output = conv(x).detach()
        std = output.std(dim=(0, 2, 3))
        torch.testing.assert_close(std, torch.full_like(std, 0.2), rtol=2e-3, atol=0)
        if conv.bias is not None:
            assert float(output.mean(dim=(0, 2, 3)).abs().max()) < 1e-3
    before = copy.deepcopy(energy.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.update.averaged.state_dict().items())
    trainer.step(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in energy.state_dict().items())


def test_samples_on_the_way_are_those_of_the_averaged_network() -> None:
    trainer = energy_trainer(ema_decay=0.5, steps=3, step_size=0.05)
    trainer.step(0)
    with torch.no_grad():
        trainer.update.averaged.linear.weight.mul_(300)
    images = []
    for energy in (trainer.update.averaged, trainer.model.energy):
        sampler = LangevinSampler(VAEBM(trainer.model.vae, energy), steps=3, step_size=0.05, potential="paper")
        images.append(sampler.sample(range(16)))
    assert torch.equal(trainer.sample_images(), images[0])
    assert not torch.equal(images[0], images[1])


def test_the_clip_is_the_same_under_any_default_dtype() -> None:
    """Adam keeps its step number in the default dtype, and the powers of float32 and float64 numbers differ."""
    clipped = []
    for dtype in (torch.float32, torch.float64):
        parameter = torch.nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.Adam([parameter], betas=(0.9, 0.999))
        parameter.grad = torch.full_like(parameter, 1e6)
        moments = torch.linspace(1, 2, 1000)
        optimizer.state[parameter] = {"step": torch.tensor(7.0, dtype=dtype), "exp_avg_sq": moments}
        clip_by_second_moment(optimizer)
        clipped.append(parameter.grad.clone())
    assert torch.equal(*clipped)
