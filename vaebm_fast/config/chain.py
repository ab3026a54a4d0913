"""The chain that samples a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Potential = Literal["energy", "paper", "official"]
POTENTIALS: tuple[Potential, ...] = ("energy", "paper", "official")


@dataclass(frozen=True)
class Sampling:
    """The published chain of a model at sampling time."""

    steps: int
    step_size: float
    potential: Potential = "official"
    temperature: float = 1.0
