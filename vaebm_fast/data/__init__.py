"""Image input: sources (`sources`), training batches (`plan`, `loader`) and their conversion (`tensors`)."""

from vaebm_fast.data.digit_sets import digits, mnist, stacked_mnist
from vaebm_fast.data.loader import Loader, TorchLoader, UnreadableDataError, require_whole_batches
from vaebm_fast.data.opening import open_source
from vaebm_fast.data.plan import BatchPlan, batches_per_epoch
from vaebm_fast.data.sources import ArraySource, ImageSource, StoredImages
from vaebm_fast.data.tensors import quantise, to_input, to_tensor

__all__ = [
    "ArraySource",
    "BatchPlan",
    "ImageSource",
    "Loader",
    "StoredImages",
    "TorchLoader",
    "UnreadableDataError",
    "batches_per_epoch",
    "digits",
    "mnist",
    "open_source",
    "quantise",
    "require_whole_batches",
    "stacked_mnist",
    "to_input",
    "to_tensor",
]
