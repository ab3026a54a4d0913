"""A Langevin chain's settings, wherever they are given: presets, samplers, sampling jobs, training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vaebm_fast.config._fields import require
from vaebm_fast.runtime.errors import UserError

Potential = Literal["energy", "paper", "official"]
POTENTIALS: tuple[Potential, ...] = ("energy", "paper", "official")


def require_potential(potential: str) -> None:
    """Raise UserError unless the potential is one of POTENTIALS."""
    if potential not in POTENTIALS:
        raise UserError(f"Potential {potential!r} is not known; it is one of {', '.join(POTENTIALS)}.")


@dataclass(frozen=True)
class ChainConfig:
    """A chain of `steps` Langevin steps, by the names of `LangevinSampler`; no steps give the NVAE's own samples.

    Raises UserError for values that make no chain.
    """

    steps: int
    step_size: float | tuple[float, ...]  # h of all steps, or of each
    potential: Potential = "official"
    temperature: float = 1.0  # of the prior's standard deviations
    start_temperature: float = 1.0  # standard deviation of the noise that chains start from

    def __post_init__(self) -> None:
        require_potential(self.potential)
        for name in ("temperature", "start_temperature"):
            require_temperature(name, getattr(self, name))
        require(self.steps >= 0, f"steps is {self.steps}; it must be 0 or more.")
        for size in self._sizes:
            require(size > 0 and math.isfinite(size), f"step_size is {size}; it must be a positive number.")
        if isinstance(self.step_size, tuple) and len(self.step_size) != self.steps:
            count, steps = len(self.step_size), self.steps
            raise UserError(f"step_size holds {count} numbers; a chain of {steps} steps takes one, or {steps}.")

    @property
    def _sizes(self) -> Sequence[float]:
        return self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """h_k of every step."""
        return self.step_size if isinstance(self.step_size, tuple) else (float(self.step_size),) * self.steps


def require_temperature(name: str, value: float) -> None:
    """Raise UserError unless the value is a finite number from 0 up."""
    require(value >= 0 and math.isfinite(value), f"{name} is {value}; it must be a number from 0 up.")
