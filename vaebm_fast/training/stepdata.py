"""What a training step reads: its batch of images and its noise, both functions of the step's number."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vaebm_fast.data import ImageSource, batches, quantise
from vaebm_fast.noise import seed_tensor


class UnreadableDataError(ValueError):
    """A step's images could not be read. They are read first, so nothing of that step has been done."""


class StepData:
    """`data(step)` is the step's batch, float32 [N, C, H, W] in [0, 1], reduced to `bits`, on `device`.

    Reads ahead while steps are asked for in turn; any other step may be asked for too. Raises UnreadableDataError.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        seed: int,
        bits: int,
        horizontal_flip: bool,
        device: torch.device,
    ) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self._bits, self._flip, self._device = bits, horizontal_flip, device
        self._next_step = 0
        self._batches = self._from(0)

    def _from(self, step: int) -> Iterator[Tensor]:
        return batches(self.source, self.batch_size, seed=self.seed, start_iteration=step, horizontal_flip=self._flip)

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
