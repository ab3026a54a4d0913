"""Images in: where they come from (`sources`) and how they become training batches (`torch_loader`)."""

from vaebm_fast.data.sources import ArraySource, ImageSource, digits, mnist, open_source
from vaebm_fast.data.torch_loader import batches, batches_per_epoch, quantise, to_tensor

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
