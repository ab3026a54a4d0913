"""`vaebm-fast sample`: images, one per seed, in a folder."""

from __future__ import annotations

from typing import Annotated

import tyro

from vaebm_fast.sampling import SampleOptions, run_job


def sample(options: Annotated[SampleOptions, tyro.conf.arg(name="")]) -> int:
    """Sample images, one per seed, into a folder; the same command, run again, completes what is missing there."""
    return run_job(options)
