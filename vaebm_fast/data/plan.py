"""Order, flips and crops of the images in an epoch, determined by (seed, epoch, number of images).

All randomness comes from raw Philox words keyed by (seed, purpose) with the epoch in the counter: numpy guarantees that
these never change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vaebm_fast.data.sources import ImageSource
from vaebm_fast.runtime.errors import UserError

ORDER, FLIP, CROP = range(3)  # purposes of random words


@dataclass(frozen=True)
class EpochPlan:
    """Random choices for one epoch over n images, by position in the epoch."""

    order: npt.NDArray[np.int64]  # [n], a permutation of the images
    flip: npt.NDArray[np.bool_]  # [n], true with probability 1/2
    crop: npt.NDArray[np.float64]  # [n, 2], uniform in [0, 1): vertical and horizontal position of the window


def plan_epoch(seed: int, epoch: int, total_images: int) -> EpochPlan:
    """The plan of an epoch, determined by the three arguments."""

    def words(purpose: int, total: int) -> npt.NDArray[np.uint64]:
        key = np.array([seed, purpose], np.uint64)
        counter = np.array([0, 0, epoch, 0], np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(total)

    return EpochPlan(
        order=np.argsort(words(ORDER, total_images), kind="stable"),
        flip=(words(FLIP, total_images) >> np.uint64(63)).astype(np.bool_),
        crop=((words(CROP, 2 * total_images) >> np.uint64(11)) * 2.0**-53).reshape(-1, 2),
    )


def batches_per_epoch(source: ImageSource, batch_size: int) -> int:
    """len(source) // batch_size; the incomplete last batch is dropped. Raises ValueError if no batch remains."""
    if not 1 <= batch_size <= len(source):
        raise UserError(
            f"batch_size is {batch_size}; it must be at least 1 and at most {len(source)}, the size of {source.name}."
        )
    return len(source) // batch_size
