"""The chain that samples a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vaebm_fast.runtime.errors import UserError

Potential = Literal["energy", "paper", "official"]
POTENTIALS: tuple[Potential, ...] = ("energy", "paper", "official")


def require_potential(potential: str) -> None:
    """Raise UserError unless the potential is one of POTENTIALS."""
    if potential not in POTENTIALS:
        raise UserError(f"Potential {potential!r} is not known; it is one of {', '.join(POTENTIALS)}.")


@dataclass(frozen=True)
class Sampling:
    """The published chain of a model at sampling time."""

    steps: int
    step_size: float
    potential: Potential = "official"
    temperature: float = 1.0
