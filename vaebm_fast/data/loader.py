"""Training batches of uint8 images: what every loader has in common, and the one that reads ahead with threads.

A batch is a function of (plan, step, rank, world), so resuming needs no loader state. `plan` makes the random choices,
`sources` provides the images, `tensors` converts them to network inputs on the device. `dali` and `resident` are the
other loaders; `loading` chooses one.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vaebm_fast.config import whole_number
from vaebm_fast.data.images import UnreadableImageError, mirrored
from vaebm_fast.data.plan import BatchPlan, EpochPlan
from vaebm_fast.data.sources import ArraySource, ImageSource
from vaebm_fast.ops.gather_images import gather_images
from vaebm_fast.runtime.errors import UserError, sentence

MOST_WORKERS = 8  # each holds a batch in memory


class UnreadableDataError(UserError):
    """The images of a step could not be read. Raised before the step changes any state."""


class Loader(Protocol):
    """The training batches of one rank."""

    @property
    def plan(self) -> BatchPlan:
        """The images of every global batch."""
        ...

    @property
    def world(self) -> int:
        """Number of ranks that share a global batch."""
        ...

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the global batch of `step`: uint8 [n, H, W, C], on the CPU or the loader's device.

        A function of (plan, step, rank, world); steps may be requested in any order. Raises UnreadableDataError.
        """
        ...

    @property
    def unreadable(self) -> set[str]:
        """Names of the images that are damaged: only their names, not their content, identify the data.

        A resumed run adds those of its checkpoint, so that they can be replaced.
        """
        ...

    def find_unreadable(self) -> list[str]:
        """Names of all images that are damaged now, which are added to `unreadable`; reads every image."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON values that must match to resume: the data and its augmentation."""
        ...

    def close(self) -> None:
        """Stop reading ahead; no batch can be read afterwards."""
        ...


def require_whole_batches(loader: Loader, batch_size: int, seed: int) -> None:
    """Raise ValueError unless the loader has this batch size and seed, and one rank, as a trainer has."""
    plan = loader.plan
    if (plan.batch_size, plan.seed) != (batch_size, seed):
        raise ValueError(
            f"The loader has batch size {plan.batch_size} and seed {plan.seed}; "
            f"the trainer has batch size {batch_size} and seed {seed}."
        )
    if loader.world != 1:
        raise ValueError(f"The loader is one of {loader.world} ranks; training uses one process: give it world=1.")


class PlannedLoader:
    """What the loaders share: a source, its plan, this rank's rows, and what identifies the data.

    batch_size: images of the global batch; each of the `world` ranks takes the same number of contiguous rows.
    horizontal_flip: mirror each image with probability 1/2. random_crop: place the crop window of non-square images
    uniformly; the default is the centre. Raises UserError for invalid arguments.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        seed: int = 0,
        horizontal_flip: bool = False,
        random_crop: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.source = source
        self.plan, self.world = BatchPlan(source, batch_size, seed), world
        self._rows = self.plan.rows_of_rank(rank, world)
        self._flip, self._crop = bool(horizontal_flip), bool(random_crop)
        self.unreadable: set[str] = set()

    @contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Raise what goes wrong with images inside as UnreadableDataError, and note the names of damaged ones."""
        try:
            yield
        except UnreadableImageError as error:
            if error.is_damaged:
                self.unreadable.add(error.image)
            raise UnreadableDataError(error.fault) from error
        except (UserError, OSError) as error:
            raise UnreadableDataError(sentence(error)) from error
        except MemoryError as error:
            raise UnreadableDataError(f"The images of step {step} do not fit in memory.") from error

    def find_unreadable(self) -> list[str]:
        """Names of all images that are damaged now, which are added to `unreadable`; reads every image."""
        names = self.source.find_unreadable()
        self.unreadable.update(names)
        return names

    def settings(self) -> dict[str, Any]:
        """JSON values that must match to resume: number and digest of the images, transform, flips and crops."""
        settings = {
            "images": len(self.source),
            "data_sha256": self.source.digest(self.unreadable),
            "horizontal_flip": self._flip,
            "random_crop": self._crop,
            "transform": self.source.transform,
        }
        return {**settings, "unreadable": sorted(self.unreadable)} if self.unreadable else settings


class TorchLoader(PlannedLoader):
    """A `Loader` that reads a source with threads, ahead of the step requested last. Request batches from one thread.

    pinned: return page-locked memory, which a GPU copies asynchronously. workers: threads, each reading one step
    (default: one per core, at most MOST_WORKERS); results do not depend on it. Other arguments: `PlannedLoader`.
    """

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        *,
        pinned: bool = False,
        workers: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(source, batch_size, **options)
        self._pinned = pinned
        self._workers = min(MOST_WORKERS, len(os.sched_getaffinity(0))) if workers is None else workers
        if self._workers < 1:
            raise UserError(f"workers is {workers}; it must be at least 1.")
        self._pool = ThreadPoolExecutor(self._workers, "vaebm-fast-data")
        self._ahead: deque[Future[Tensor]] = deque()  # of the steps from self._next on
        self._next = 0

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the global batch of `step`: uint8 [n, H, W, C]. Raises UnreadableDataError."""
        step = whole_number("step", step)
        if step != self._next:
            self._drop()
        self._next = step + 1
        while len(self._ahead) <= self._workers:
            self._ahead.append(self._pool.submit(self._read, step + len(self._ahead)))
        with self._reading(step):
            return self._ahead.popleft().result()

    def close(self) -> None:
        """Stop reading ahead and end the threads, each after the batch that it is reading."""
        self._drop()
        self._pool.shutdown(cancel_futures=True)

    def _drop(self) -> None:
        """Forget the batches read ahead."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()

    def _read(self, step: int) -> Tensor:
        here = self.plan.batch(step, self._rows)
        if isinstance(self.source, ArraySource):
            batch = self._gathered(self.source, here)
        else:
            images = self.source.read(here.order, here.crop if self._crop else None)
            if self._flip:
                images[here.flip] = mirrored(images[here.flip])
            batch = torch.from_numpy(images)
        return batch.pin_memory() if self._pinned else batch

    def _gathered(self, source: ArraySource, here: EpochPlan) -> Tensor:
        """Gathered and mirrored in one pass."""
        order = torch.from_numpy(here.order.astype(np.int64))
        flip = torch.from_numpy(here.flip) if self._flip else torch.zeros(len(order), dtype=torch.bool)
        start = torch.zeros_like(order)
        return gather_images(torch.from_numpy(source.images), order, flip, start, start, size=source.image_shape[1])
