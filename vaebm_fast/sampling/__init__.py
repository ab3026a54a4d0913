"""Seeds to images on disk: many processes, resumable, the same files however it is run. `vaebm-fast sample`.

`job` runs it: `options` say what is asked, `folder` is where it goes, `manifest` what it must stay equal to, `journal`
what is finished, `outputs` the formats, `blocks` the computing, `writer` the writing beside it, `ranks` the processes.
"""

from vaebm_fast.sampling.folder import SamplingError
from vaebm_fast.sampling.job import run_job
from vaebm_fast.sampling.options import SampleOptions

__all__ = ["SampleOptions", "SamplingError", "run_job"]
