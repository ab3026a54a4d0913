"""Batches for training: the order, flips and crops of every epoch, and the way from uint8 to a tensor.

Iteration i of a run is a function of (source, batch size, seed, i) alone, so resuming is starting at i. All randomness
is raw Philox words keyed by (seed, purpose) with the epoch in the counter: numpy promises that those never change.
Where images come from is left to `sources`; devices, to whoever trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vaebm_fast.data.images import Pixels
from vaebm_fast.data.sources import ImageSource

ORDER, FLIP, CROP = range(3)  # the purposes of random words


@dataclass(frozen=True)
class EpochPlan:
    """What chance decides in one epoch over n images, by position in the epoch."""

    order: npt.NDArray[np.int64]  # [n], a permutation of the images
    flip: npt.NDArray[np.bool_]  # [n], true half of the time
    crop: npt.NDArray[np.float64]  # [n, 2], uniform in [0, 1): vertical and horizontal place of the window


def plan_epoch(seed: int, epoch: int, total_images: int) -> EpochPlan:
    """The plan of an epoch, a function of the three arguments alone."""

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
    """len(source) // batch_size: the last, smaller batch is left out. Raises ValueError where that leaves none."""
    if not 1 <= batch_size <= len(source):
        raise ValueError(
            f"batch_size is {batch_size}; it must be at least 1 and at most {len(source)}, the images of {source.name}."
        )
    return len(source) // batch_size


def batches(
    source: ImageSource,
    batch_size: int,
    *,
    seed: int,
    start_iteration: int = 0,
    horizontal_flip: bool = False,
    random_crop: bool = False,
    workers: int = 1,
) -> Iterator[Tensor]:
    """Training batches without end: float32 [batch_size, C, H, W] in [0, 1] on the CPU, from `start_iteration` on.

    Every epoch is a new permutation of the source, cut into `batches_per_epoch`. `horizontal_flip` mirrors each image
    with probability 1/2; `random_crop` places the window of images that are not square uniformly. `workers` threads
    read ahead, one batch each, and change nothing in what comes out. Raises ValueError at once for arguments that do
    not fit, and in place of a batch when one of its files cannot be read.
    """
    per_epoch = batches_per_epoch(source, batch_size)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}; it must be in 0 .. 2^64 - 1.")
    if workers < 1:
        raise ValueError(f"workers is {workers}; at least one thread must read.")
    plan = lru_cache(maxsize=2)(partial(plan_epoch, seed, total_images=len(source)))

    def read(iteration: int) -> Tensor:
        epoch, batch = divmod(iteration, per_epoch)
        here, rows = plan(epoch), slice(batch * batch_size, (batch + 1) * batch_size)
        images = source.read(here.order[rows], here.crop[rows] if random_crop else None)
        if horizontal_flip:
            flip = here.flip[rows]
            images[flip] = images[flip, :, ::-1]
        return to_tensor(images)

    return _in_order(read, start_iteration, workers)


def to_tensor(images: Pixels) -> Tensor:
    """uint8 [n, H, W, C] -> float32 [n, C, H, W], contiguous: images / 255."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def quantise(x: Tensor, bits: int) -> Tensor:
    """floor(255 x / 2^(8 - b)) / (2^b - 1): the top b bits of each pixel, spread over [0, 1] again.

    x is float32 in [0, 1], of any shape; eight bits leave it as it is. Raises ValueError for other than 1 to 8 bits.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; images are quantised to 1 to 8 bits.")
    return x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)


def _in_order(read: Callable[[int], Tensor], start: int, workers: int) -> Iterator[Tensor]:
    """read(start), read(start + 1), ..., each computed by one of `workers` threads ahead of its turn."""
    with ThreadPoolExecutor(workers, "vaebm-fast-data") as pool:
        pending = deque(pool.submit(read, start + ahead) for ahead in range(workers))
        for iteration in count(start + workers):
            batch = pending.popleft().result()
            pending.append(pool.submit(read, iteration))
            yield batch
