"""Trainers of both stages on the built-in digits, small enough that a step takes milliseconds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vaebm_fast.config import PRESETS
from vaebm_fast.data import ImageSource, TorchLoader, digits
from vaebm_fast.models import NVAE
from vaebm_fast.models.building import building
from vaebm_fast.training import EnergyTrainer, VAETrainer

TINY = replace(
    PRESETS["digits"].nvae, num_channels_enc=4, num_channels_dec=4, num_groups_per_scale=1, num_latent_per_group=2
)
TINY_ENERGY = replace(PRESETS["digits"].energy, width=4)
QUIET: dict[str, Any] = {"progress": False, "log_every": 1, "grid_every": 10**6}
SOURCE = digits()


def vae_trainer(source: ImageSource = SOURCE, **changes: Any) -> VAETrainer:
    """Seven steps of stage 1."""
    training = replace(PRESETS["digits"].vae_training, epochs=1, batch_size=128, warmup_epochs=0, **changes)
    return VAETrainer(TINY, training, TorchLoader(source, 128, seed=5), seed=5)


def energy_trainer(**changes: Any) -> EnergyTrainer:
    """Six steps of stage 2 against an NVAE that knows nothing; `changes` to the training or to its chain."""
    options = {"iterations": 6, "batch_size": 8, "steps": 2, **changes}
    training = PRESETS["digits"].energy_training
    of_chain = {name: options.pop(name) for name in ("steps", "step_size", "potential") if name in options}
    training = replace(training, chain=replace(training.chain, **of_chain), **options)
    loader = TorchLoader(SOURCE, training.batch_size, seed=5)
    with building(0):
        vae = NVAE(TINY)
    return EnergyTrainer(vae, TINY_ENERGY, training, loader, seed=5)
