"""Single-process training of both stages: `VAETrainer` and `EnergyTrainer`, run by `train`."""

from vaebm_fast.training.energy import EnergyTrainer
from vaebm_fast.training.loop import RunOptions, train
from vaebm_fast.training.vae import VAETrainer

__all__ = ["EnergyTrainer", "RunOptions", "VAETrainer", "train"]
