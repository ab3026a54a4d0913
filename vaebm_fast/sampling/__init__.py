"""`vaebm-fast sample`: resumable multi-process sampling; the files do not depend on the number of processes.

`job` runs it. `options`: command options. `folder`: output folder and lock. `manifest`: saved settings. `journal`:
finished blocks. `outputs`: file formats. `blocks`: computation. `writer`: background writing.
"""

from vaebm_fast.sampling.folder import SamplingError
from vaebm_fast.sampling.job import run_job
from vaebm_fast.sampling.options import SampleOptions

__all__ = ["SampleOptions", "SamplingError", "run_job"]
