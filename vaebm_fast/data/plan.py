"""Order, flips and crops of training images: per epoch, from (seed, epoch, number of images), and per batch.

All randomness comes from raw Philox words keyed by (seed, purpose) with the epoch in the counter: numpy guarantees that
these never change.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from vaebm_fast.config import whole_number
from vaebm_fast.data.sources import ImageSource
from vaebm_fast.runtime.errors import UserError

ORDER, FLIP, CROP = range(3)  # purposes of random words


@dataclass(frozen=True)
class EpochPlan:
    """Random choices for n positions: of an epoch, or of a batch in it."""

    order: npt.NDArray[np.int64]  # [n], indices into the source; a permutation over an epoch
    flip: npt.NDArray[np.bool_]  # [n], true with probability 1/2
    crop: npt.NDArray[np.float64]  # [n, 2], uniform in [0, 1): vertical and horizontal position of the window

    def part(self, positions: slice) -> EpochPlan:
        """The choices at these positions."""
        return EpochPlan(self.order[positions], self.flip[positions], self.crop[positions])


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


class BatchPlan:
    """The global batch of every step, determined by (seed, number of images, batch_size).

    Every epoch is a new permutation of the source, split into `batches_per_epoch`. Raises UserError for invalid
    arguments.
    """

    def __init__(self, source: ImageSource, batch_size: int, seed: int) -> None:
        batch_size, seed = whole_number("batch_size", batch_size), whole_number("seed", seed)
        self.batches_per_epoch = batches_per_epoch(source, batch_size)
        if not 0 <= seed < 2**64:
            raise UserError(f"seed is {seed}; it must be in 0 .. 2^64 - 1.")
        self.batch_size, self.seed = batch_size, seed
        self._epoch = lru_cache(maxsize=2)(partial(plan_epoch, seed, total_images=len(source)))

    def rows_of_rank(self, rank: int, world: int) -> slice:
        """The rows of a global batch that belong to `rank` of `world` ranks: contiguous, the same number for each."""
        if not 0 <= rank < world:
            raise UserError(f"rank is {rank}; it must be at least 0 and below {world}, the number of ranks.")
        if self.batch_size % world:
            raise UserError(f"batch_size is {self.batch_size}; {world} ranks need a multiple of {world}.")
        share = self.batch_size // world
        return slice(rank * share, (rank + 1) * share)

    def epoch(self, number: int) -> EpochPlan:
        """The choices of a whole epoch."""
        return self._epoch(number)

    def batch(self, step: int, rows: slice = slice(None)) -> EpochPlan:
        """The choices for these rows of the global batch of `step`."""
        epoch, index = divmod(step, self.batches_per_epoch)
        start = index * self.batch_size
        return self._epoch(epoch).part(slice(start, start + self.batch_size)).part(rows)
