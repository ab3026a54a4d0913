"""`vaebm-fast cost`: what a chain step of a preset takes."""

from __future__ import annotations

from vaebm_fast.evaluation import cost as counting


def cost(*, preset: str) -> None:
    """Count what a chain step of a preset takes: FLOPs, memory traffic, and the least time of these on two GPUs.

    Args:
        preset: Name of the preset, such as celeba_256.
    """
    print(counting.text(counting.cost(preset)))
