"""Frozen dataclasses that configure models, training runs and presets; `PRESETS` is the table of named settings.

Fields that exist as arguments in published NVAE checkpoints (`num_latent_scales`, `num_groups_per_scale`, ...) keep
those names and meanings. This package owns names, defaults and validation. Its only code that handles tensors is
`NoiseLayout`, which splits an image's noise vector.
"""

from vaebm_fast.config._fields import PlainFields, plain, to_json, whole_number
from vaebm_fast.config.chain import POTENTIALS, ChainConfig, Potential, require_potential, require_temperature
from vaebm_fast.config.energy import (
    ENERGY_ARCHS,
    EnergyArch,
    EnergyBlock,
    EnergyConfig,
    energy_from_json,
    find_energy_arch,
    format_blocks,
    parse_blocks,
)
from vaebm_fast.config.noise_layout import NoiseLayout
from vaebm_fast.config.nvae import CELL_PLANS, ArchInstance, CellPlan, Likelihood, NVAEConfig, nvae_from_json
from vaebm_fast.config.presets import PRESETS, Preset, Transform, find_preset
from vaebm_fast.config.training import EnergyTraining, Placement, ReplayBuffer, ReplayDtype, VAETraining

__all__ = [
    "CELL_PLANS",
    "ENERGY_ARCHS",
    "POTENTIALS",
    "PRESETS",
    "ArchInstance",
    "CellPlan",
    "ChainConfig",
    "EnergyArch",
    "EnergyBlock",
    "EnergyConfig",
    "EnergyTraining",
    "Likelihood",
    "NVAEConfig",
    "NoiseLayout",
    "PlainFields",
    "Placement",
    "Potential",
    "Preset",
    "ReplayBuffer",
    "ReplayDtype",
    "Transform",
    "VAETraining",
    "energy_from_json",
    "find_energy_arch",
    "find_preset",
    "format_blocks",
    "nvae_from_json",
    "parse_blocks",
    "plain",
    "require_potential",
    "require_temperature",
    "to_json",
    "whole_number",
]
