"""vaebm-fast: train, sample and evaluate VAEBM models (an NVAE plus an energy network) at the speed of the hardware."""

import torch as _torch

from vaebm_fast import models as _models
from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.checkpoint import load_energy, load_nvae, save_energy, save_nvae
from vaebm_fast.config import PRESETS
from vaebm_fast.frozen import FrozenVAEBM
from vaebm_fast.frozen import freeze as _freeze
from vaebm_fast.models import NVAE, EnergyNetwork
from vaebm_fast.ops._backend import Backend as _Backend


class VAEBM(_models.VAEBM):
    __doc__ = _models.VAEBM.__doc__

    # Here, and not in `models`, because the compiled pair is built from the models and not the other way round.
    def freeze(self, dtype: _torch.dtype = _torch.float32, backend: _Backend = "auto") -> FrozenVAEBM:
        """The compiled pair, with the same `potential_and_grad`, `image` and `mean_image`; see `vaebm_fast.frozen`."""
        return _freeze(self, dtype, backend)


__version__ = "0.1.0"
__all__ = [
    "NVAE",
    "PRESETS",
    "VAEBM",
    "EnergyNetwork",
    "FrozenVAEBM",
    "LangevinSampler",
    "load_energy",
    "load_nvae",
    "save_energy",
    "save_nvae",
]
