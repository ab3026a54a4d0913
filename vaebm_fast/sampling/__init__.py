"""Sampling jobs: seeds to images on disk, with many processes, resumable and reproducible. `vaebm-fast sample`.

`job` runs a job. `options` and `seeds` resolve its settings, `folder` and `manifest` own the output folder, `plan`
finds the missing blocks, `blocks` computes them, `writer` and `outputs` write them, `journal` records them, `assembly`
and `summary` finish the job.
"""

from vaebm_fast.sampling.folder import SamplingError
from vaebm_fast.sampling.job import run_job
from vaebm_fast.sampling.options import SampleOptions

__all__ = ["SampleOptions", "SamplingError", "run_job"]
