"""What both stages do with their images, their seeds and a run that diverges."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.by_hand import seen_by, seen_by_energy_update
from tests.helpers.trainers import SOURCE, TINY, TINY_ENERGY, energy_trainer, vae_trainer
from vaebm_fast.config import PRESETS, ReplayBuffer
from vaebm_fast.data import ArraySource, ImageSource, TorchLoader, open_source
from vaebm_fast.models import NVAE
from vaebm_fast.training import EnergyTrainer, VAETrainer
from vaebm_fast.training.guard import DivergedError, DivergenceGuard

RANDOM = ArraySource("random", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8))
STAGES = ("vae", "energy")


def seen_in_training(stage: str, source: ImageSource, steps: range, *, bits: int = 8, **augmentation: bool) -> Tensor:
    """The images [N, 1, 8, 8] that the encoder, or the energy network as data, sees at these steps of ten images."""
    config, digits = replace(TINY, num_x_bits=bits), PRESETS["digits"]
    loader = TorchLoader(source, 10, seed=5, **augmentation)
    if stage == "vae":
        training = replace(digits.vae_training, batch_size=10)
        vae_stage = VAETrainer(config, training, loader, seed=5)
        seen = [seen_by(vae_stage.vae.stem, partial(vae_stage.step, step))[0] for step in steps]
        return (torch.cat(seen) + 1) / 2
    short = replace(digits.energy_training, batch_size=10, chain=replace(digits.energy_training.chain, steps=1))
    energy_stage = EnergyTrainer(NVAE(config), TINY_ENERGY, short, loader, seed=5)
    energy_stage.initialize = lambda: None  # type: ignore[method-assign]
    return torch.cat(
        [seen_by_energy_update(energy_stage.update, partial(energy_stage.step, step))[0] for step in steps]
    )


def rows_of(images: Tensor | np.ndarray[Any, Any], levels: int) -> list[bytes]:
    """A key per image in [0, 1]: its pixels as whole numbers of 1 / levels."""
    scaled = levels * torch.as_tensor(images)
    assert float((scaled - scaled.round()).abs().max()) < 1e-4, f"pixels are multiples of 1/{levels}"
    return [bytes(row.numpy()) for row in scaled.round().byte().flatten(1)]


# Images.
@pytest.mark.parametrize("bits", [1, 5, 8])
@pytest.mark.parametrize("stage", STAGES)
def test_x_bits_quantise_the_images_that_a_network_sees(stage: str, bits: int) -> None:
    """floor(x 255 / 2^(8 - b)) / (2^b - 1): the top b bits of a byte."""
    seen = rows_of(seen_in_training(stage, RANDOM, range(4), bits=bits), 2**bits - 1)
    expected = [bytes(image) for image in (RANDOM.images >> (8 - bits)).reshape(40, 64)]
    assert sorted(seen) == sorted(expected), "an epoch is each image once"


@pytest.mark.parametrize("stage", STAGES)
def test_horizontal_flips_mirror_single_images_of_a_batch_anew_in_each_epoch(stage: str) -> None:
    plain = [bytes(image) for image in RANDOM.images.reshape(40, 64)]
    mirrored = [bytes(image) for image in RANDOM.images[:, :, ::-1].reshape(40, 64)]
    seen = rows_of(seen_in_training(stage, RANDOM, range(12), horizontal_flip=True), 255)
    flips = np.array([row in mirrored for row in seen])
    assert all(row in mirrored if flip else row in plain for row, flip in zip(seen, flips, strict=True))
    assert all(0 < batch.sum() < 10 for batch in flips.reshape(12, 10))
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(flips))
    assert len(np.unique(flips.reshape(3, 40), axis=0)) == 3, "by epoch"
    unasked = rows_of(seen_in_training(stage, RANDOM, range(4)), 255)
    assert sorted(unasked) == sorted(plain)


@pytest.mark.parametrize("stage", STAGES)
def test_random_crops_place_the_window_of_each_image_and_are_central_unless_asked_for(
    stage: str, tmp_path: Path
) -> None:
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8) * 10, (8, 24))
    for name in range(10):
        Image.fromarray(ramp.copy()).save(tmp_path / f"{name}.png")
    source = open_source(tmp_path, image_size=8, image_channels=1)

    def lefts(**augmentation: bool) -> list[list[int]]:
        """Left edges by epoch, whose batch is all ten images."""
        seen = seen_in_training(stage, source, range(3), **augmentation)
        return (255 * seen[:, 0, 0, 0] / 10).round().int().reshape(3, 10).tolist()

    assert lefts() == [[8] * 10] * 3
    cropped = lefts(random_crop=True)
    assert all(len(set(epoch)) > 3 for epoch in cropped) and len(set(map(tuple, cropped))) == 3
    assert {left for epoch in cropped for left in epoch} <= set(range(17))


# Seeds.
def test_both_stages_of_one_seed_have_different_noise() -> None:
    posterior = torch.cat([eps.flatten(1) for eps in vae_trainer().noise(0)], dim=1)[:8]
    starts = energy_trainer().start(0)
    assert not set(posterior.flatten().tolist()) & set(starts.flatten().tolist())


def test_training_chains_differ_from_sampling_chains_of_the_same_seed() -> None:
    trainer = energy_trainer()
    trainer.seed = 0  # whose first step has the seeds 0, ..., 7
    assert not torch.equal(trainer.start(0), trainer.sampler.start(range(8)))


# The guard.
class Counter:
    """A trainee whose state is one number."""

    value = 0

    def state_dict(self) -> dict[str, int]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("gap, allowed", [(11.0, 22), (-20.0, 6), (50.0, 2), (101.0, 0), (9.9, 1000)])
def test_a_lasting_gap_is_judged_by_its_exponential_mean_over_ten_steps(gap: float, allowed: int) -> None:
    """After n steps of one gap the mean of |gap| is |gap| (1 - 0.9^n), which may reach 10; again after a rollback."""
    guard = DivergenceGuard(Counter(), max_gap=10, max_rollbacks=5)
    for first in (0, 2000):
        verdicts = []
        for step in range(first, first + allowed + 1):
            guard.before_step(step)
            verdicts.append(guard.after_step(step, gap))
        assert verdicts == [False] * allowed + [abs(gap) > 10]


def test_snapshots_are_fifty_steps_apart_and_a_rollback_takes_the_older_one() -> None:
    trainee = Counter()
    guard = DivergenceGuard(trainee, max_gap=10, max_rollbacks=2)
    restored = []
    for step in range(299):
        guard.before_step(step)
        trainee.value = step + 1
        if guard.after_step(step, math.inf if step in (148, 149) else 1.0):
            restored.append(trainee.value)
    guard.before_step(299)
    with pytest.raises(DivergedError, match="after 2 rollbacks"):
        guard.after_step(299, math.inf)
    assert [*restored, trainee.value] == [50, 50, 200]


class Aliasing(Counter):
    """A trainee that keeps the loaded state itself and changes it in place, as torch's optimisers do."""

    def __init__(self) -> None:
        self.state = {"value": 7}

    def state_dict(self) -> dict[str, int]:
        return self.state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.state = state


def test_two_rollbacks_restore_the_same_snapshot() -> None:
    trainee = Aliasing()
    guard = DivergenceGuard(trainee, max_gap=10, max_rollbacks=5)
    for step in range(3):
        guard.before_step(step)
        trainee.state["value"] += 100
        assert guard.after_step(step, math.inf)
        assert trainee.state == {"value": 7}


@pytest.mark.parametrize("factor, rollbacks", [(0.999, 1), (1.001, 0)])
def test_energy_training_judges_the_gap_alone_by_its_threshold(factor: float, rollbacks: int) -> None:
    gap = abs(float(energy_trainer().step(0)["loss"]))
    trainer = energy_trainer(max_energy_gap=0.1 * factor * gap)
    if rollbacks:
        with pytest.warns(UserWarning, match="energy gap"):
            scalars = trainer.step(0)
    else:
        scalars = trainer.step(0)
    assert scalars["rollbacks"] == rollbacks


@pytest.mark.filterwarnings("ignore:Energy training diverged")
def test_each_rollback_halves_the_rate_restores_the_weights_and_empties_the_buffer() -> None:
    trainer = energy_trainer(max_energy_gap=1e-9, max_rollbacks=2, buffer=ReplayBuffer(size=16))
    assert trainer.buffer is not None
    start = {name: tensor.clone() for name, tensor in trainer.model.energy.state_dict().items()}
    trainer.initialize = lambda: None  # type: ignore[method-assign]
    rate = trainer.training.learning_rate
    for number in (1, 2):
        scalars = trainer.step(number - 1)
        assert scalars == {"learning_rate": rate / 2**number, "rollbacks": number}
        assert trainer.update.optimizer.param_groups[0]["lr"] == rate / 2**number
        assert len(trainer.buffer) == 0
        assert all(torch.equal(tensor, start[name]) for name, tensor in trainer.model.energy.state_dict().items())
    with pytest.raises(DivergedError):
        trainer.step(2)


def test_both_trainers_read_the_digits_of_their_seed() -> None:
    """The first batch of a seed is the same in both stages, and another for another seed."""
    batches = [trainer.images(0)[:8] for trainer in (vae_trainer(), energy_trainer())]
    assert torch.equal(*batches)
    other = VAETrainer(TINY, vae_trainer().training, TorchLoader(SOURCE, 128, seed=6), seed=6).images(0)[:8]
    assert not torch.equal(batches[0], other)
