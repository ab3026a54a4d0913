"""Langevin chains over any potential (`langevin`), counter-based noise (`noise`) and CUDA graphs (`graphs`)."""

from vaebm_fast.chain.graphs import Graphs
from vaebm_fast.chain.langevin import Chains, LangevinSampler, NonFiniteChainError, Trace, langevin_chain, to_uint8
from vaebm_fast.chain.noise import Stream, draw_tensor, normal, seed_tensor, step_seeds, uniform

__all__ = [
    "Chains",
    "Graphs",
    "LangevinSampler",
    "NonFiniteChainError",
    "Stream",
    "Trace",
    "draw_tensor",
    "langevin_chain",
    "normal",
    "seed_tensor",
    "step_seeds",
    "to_uint8",
    "uniform",
]
