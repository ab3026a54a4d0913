"""Training of both stages, one process: `VAETrainer` and `EnergyTrainer` under one loop, `train`."""

from vaebm_fast.training.energy import EnergyTrainer
from vaebm_fast.training.loop import RunOptions, train
from vaebm_fast.training.vae import VAETrainer

__all__ = ["EnergyTrainer", "RunOptions", "VAETrainer", "train"]
