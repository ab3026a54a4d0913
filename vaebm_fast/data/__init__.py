"""Image input: sources of images (`sources`) and training batches (`plan`, `loader`)."""

from vaebm_fast.data.loader import batches, quantise, to_tensor
from vaebm_fast.data.plan import batches_per_epoch
from vaebm_fast.data.sources import ArraySource, ImageSource, digits, mnist, open_source

__all__ = [
    "ArraySource",
    "ImageSource",
    "batches",
    "batches_per_epoch",
    "digits",
    "mnist",
    "open_source",
    "quantise",
    "to_tensor",
]
