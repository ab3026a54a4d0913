"""Makes a checked data set of a source: every image decoded and hashed once, the damaged ones left out by name.

Damage is what Pillow refuses (a PNG's check sums among it), what a container's own check sums show, and a JPEG whose
coded stream no encoder writes (see `jpeg`), which decoders pass over silently. Not found: flipped bits of a JPEG that
leave a valid stream, such as in the value of a coefficient, and those of WebP, GIF, TIFF and BMP files, which have no
check sums. `prepared` describes the files and opens them.

Here: `run` is the whole; `parts` finds the splits, `job` goes over the images of one, `writers` put them on the disk.
"""

from vaebm_fast.data.prepare.options import PrepareOptions
from vaebm_fast.data.prepare.run import prepare

__all__ = ["PrepareOptions", "prepare"]
