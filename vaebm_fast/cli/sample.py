"""`vaebm-fast sample`: sample images, one per seed, into a folder."""

from __future__ import annotations

from typing import Annotated

import tyro

from vaebm_fast.sampling import SampleOptions, run_job


def sample(options: Annotated[SampleOptions, tyro.conf.arg(name="")]) -> int:
    """Sample images, one per seed, into a folder; rerun the same command to complete an interrupted job."""
    return run_job(options)
