"""vaebm-fast: train, sample and evaluate VAEBM models (an NVAE plus an energy network) at the speed of the hardware."""

from vaebm_fast.chain import LangevinSampler
from vaebm_fast.checkpoint import load_energy, load_nvae, save_energy, save_nvae
from vaebm_fast.config import PRESETS
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork

__version__ = "0.1.0"
__all__ = [
    "NVAE",
    "PRESETS",
    "VAEBM",
    "EnergyNetwork",
    "FrozenVAEBM",
    "LangevinSampler",
    "freeze",
    "load_energy",
    "load_nvae",
    "save_energy",
    "save_nvae",
]
