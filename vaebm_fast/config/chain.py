"""Settings of a Langevin chain, shared by presets, samplers, sampling jobs and training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vaebm_fast.config._fields import PlainFields, require
from vaebm_fast.runtime.errors import UserError

Potential = Literal["energy", "paper", "official"]
POTENTIALS: tuple[Potential, ...] = ("energy", "paper", "official")


def require_potential(potential: str) -> None:
    """Raise UserError unless the potential is one of POTENTIALS."""
    if potential not in POTENTIALS:
        raise UserError(f"Potential {potential!r} is not known; it must be one of {', '.join(POTENTIALS)}.")


@dataclass(frozen=True)
class ChainConfig(PlainFields):
    """A chain of `steps` Langevin steps, named as in `LangevinSampler`; with 0 steps, samples are the NVAE's.

    Raises UserError for invalid values.
    """

    steps: int
    step_size: float | tuple[float, ...]  # h, shared by all steps or one per step
    potential: Potential = "official"
    temperature: float = 1.0  # scales the prior's standard deviations
    start_temperature: float = 1.0  # standard deviation of the starting noise

    def __post_init__(self) -> None:
        super().__post_init__()
        require_potential(self.potential)
        for name in ("temperature", "start_temperature"):
            require_temperature(name, getattr(self, name))
        require(self.steps >= 0, f"steps is {self.steps}; it must be 0 or more.")
        for size in self._sizes:
            is_positive = isinstance(size, (int, float)) and size > 0 and math.isfinite(size)
            require(is_positive, f"step_size is {size}; it must be a positive number.")
        if isinstance(self.step_size, tuple) and len(self.step_size) != self.steps:
            count, steps = len(self.step_size), self.steps
            raise UserError(f"step_size has {count} values; a chain of {steps} steps needs 1 or {steps}.")

    @property
    def _sizes(self) -> Sequence[float]:
        return self.step_size if isinstance(self.step_size, tuple) else (self.step_size,)

    @property
    def step_sizes(self) -> tuple[float, ...]:
        """h_k for every step k."""
        sizes = tuple(map(float, self._sizes))
        return sizes if isinstance(self.step_size, tuple) else sizes * self.steps


def require_temperature(name: str, value: float) -> None:
    """Raise UserError unless the value is finite and at least 0."""
    require(value >= 0 and math.isfinite(value), f"{name} is {value}; it must be finite and at least 0.")
