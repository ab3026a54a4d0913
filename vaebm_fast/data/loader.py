"""Training batches: uint8 images to tensors on a device, prefetched by threads.

The batch of iteration i depends only on (source, batch size, seed, i), so a run resumes by starting at i. `plan` makes
the random choices; `sources` provides the images.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import count

import torch
from torch import Tensor

from vaebm_fast.data.images import Pixels
from vaebm_fast.data.plan import batches_per_epoch, plan_epoch
from vaebm_fast.data.sources import ImageSource
from vaebm_fast.runtime.errors import UserError

MOST_WORKERS = 8  # each holds a batch in memory


class UnreadableDataError(UserError):
    """The images of a step could not be read. Raised before the step changes any state."""


class StepData:
    """`data(step)` is the step's batch, float32 [N, C, H, W] in [0, 1], quantised to `bits`, on `device`.

    `workers` threads (default: one per core, at most MOST_WORKERS) prefetch one batch each for consecutive steps; steps
    may be requested in any order. Results do not depend on `workers`. Raises UnreadableDataError.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        seed: int,
        bits: int,
        horizontal_flip: bool,
        random_crop: bool,
        device: torch.device,
        workers: int | None = None,
    ) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._bits, self._device = bits, device
        self._flip, self._crop = horizontal_flip, random_crop
        self._workers = workers or min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        self._next_step = 0
        self._batches = self._from(0)

    def _from(self, step: int) -> Iterator[Tensor]:
        return batches(
            self.source,
            self.batch_size,
            seed=self.seed,
            start_iteration=step,
            horizontal_flip=self._flip,
            random_crop=self._crop,
            workers=self._workers,
        )

    def __call__(self, step: int) -> Tensor:
        if step != self._next_step:
            self._batches = self._from(step)
        self._next_step = step + 1
        try:
            batch = next(self._batches)
        except (UserError, OSError) as error:
            raise UnreadableDataError(str(error)) from error
        return quantise(batch, self._bits).to(self._device, memory_format=torch.channels_last)


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
    """Infinite training batches from `start_iteration`: float32 [batch_size, C, H, W] in [0, 1] on the CPU.

    Every epoch is a new permutation of the source, split into `batches_per_epoch`. `horizontal_flip` mirrors each image
    with probability 1/2; `random_crop` places the crop window of non-square images uniformly. `workers` threads
    prefetch one batch each; results do not depend on `workers`. Raises ValueError immediately for invalid arguments,
    and on reaching a batch with an unreadable file.
    """
    per_epoch = batches_per_epoch(source, batch_size)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed is {seed}; it must be in 0 .. 2^64 - 1.")
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1.")
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
    """floor(255 x / 2^(8 - b)) / (2^b - 1): the top b bits of each pixel, rescaled to [0, 1].

    x is float32 in [0, 1], of any shape; 8 bits return x unchanged. Raises ValueError unless bits is 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise UserError(f"bits is {bits}; it must be 1 to 8.")
    return x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)


def _in_order(read: Callable[[int], Tensor], start: int, workers: int) -> Iterator[Tensor]:
    """read(start), read(start + 1), ..., in order, each computed in advance by one of `workers` threads."""
    with ThreadPoolExecutor(workers, "vaebm-fast-data") as pool:
        pending = deque(pool.submit(read, start + ahead) for ahead in range(workers))
        for iteration in count(start + workers):
            batch = pending.popleft().result()
            pending.append(pool.submit(read, iteration))
            yield batch
