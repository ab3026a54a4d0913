"""What a training step reads: its batch of images and its noise, both functions of the step's number."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from vaebm_fast.data import ImageSource, batches, quantise
from vaebm_fast.noise import seed_tensor

MOST_WORKERS = 8  # each keeps a batch in memory


class UnreadableDataError(ValueError):
    """A step's images could not be read. They are read first, so nothing of that step has been done."""


class StepData:
    """`data(step)` is the step's batch, float32 [N, C, H, W] in [0, 1], reduced to `bits`, on `device`.

    `workers` threads (by default one per core, MOST_WORKERS at most) read ahead, a batch each, while steps are asked
    for in turn, and change nothing in what comes out; any other step may be asked for too. Raises UnreadableDataError.
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
        except (ValueError, OSError) as error:
            raise UnreadableDataError(str(error)) from error
        return quantise(batch, self._bits).to(self._device, memory_format=torch.channels_last)


def step_seeds(seed: int, step: int, batch: int, device: torch.device) -> Tensor:
    """A noise seed per image of a step, [N]: image j of step t is number t N + j of the run's 2^64 seeds.

    Runs whose seeds differ by less than 2^24 share none within 2^40 images.
    """
    first = (seed << 40) + step * batch
    return seed_tensor(((first + j) % 2**64 for j in range(batch)), device)
