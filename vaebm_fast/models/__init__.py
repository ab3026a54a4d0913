"""NVAE, the energy networks and the joint model in plain PyTorch: the reference for the fast paths."""

from vaebm_fast.models.energy import EnergyNetwork
from vaebm_fast.models.nvae import NVAE
from vaebm_fast.models.vaebm import VAEBM

__all__ = ["NVAE", "VAEBM", "EnergyNetwork"]
