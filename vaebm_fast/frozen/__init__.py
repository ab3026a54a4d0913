"""The frozen pair: decoder and energy network with folded weights, differentiable only in their inputs."""

from vaebm_fast.frozen.pair import FrozenNVAE, FrozenVAEBM, freeze
from vaebm_fast.frozen.part import StaleWeightsError

__all__ = ["FrozenNVAE", "FrozenVAEBM", "StaleWeightsError", "freeze"]
