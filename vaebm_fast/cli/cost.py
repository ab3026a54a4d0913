"""`vaebm-fast cost`: FLOPs, memory traffic and minimum time of a chain step."""

from __future__ import annotations

from vaebm_fast.evaluation import cost as counting


def cost(*, preset: str) -> None:
    """Count the FLOPs and memory traffic of a preset's chain step, and its minimum time on two GPUs.

    Args:
        preset: Name of the preset, such as celeba_256.
    """
    print(counting.text(counting.cost(preset)))
