"""Training batches of a set that lives on the device: one gather, crop and mirror kernel each, no work of the host."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vaebm_fast.config import whole_number
from vaebm_fast.data.images import Pixels
from vaebm_fast.data.loader import PlannedLoader
from vaebm_fast.data.sources import ImageSource, StoredImages
from vaebm_fast.ops.gather_images import gather_images
from vaebm_fast.runtime.errors import UserError

CHUNK = 64  # images read at once by a thread


class _Epoch(NamedTuple):
    """An epoch's choices on the device, [N] each: the image, whether it is mirrored, top and left of the window."""

    order: Tensor
    flip: Tensor
    top: Tensor
    left: Tensor


class ResidentLoader(PlannedLoader):
    """A `Loader` that reads every image once, at the first batch, and keeps all on `device`: uint8 [M, H, W, C].

    With random_crop images keep their long side, which must be the same for all. Other arguments: `PlannedLoader`.
    Raises UserError if the images do not fit on the device.
    """

    def __init__(
        self, source: ImageSource, batch_size: int, *, device: torch.device | str = "cpu", **options: Any
    ) -> None:
        super().__init__(source, batch_size, **options)
        self._device = torch.device(device)
        self._images: Tensor | None = None
        self._is_closed = False
        self._epoch = lru_cache(maxsize=2)(self._choices)

    def batch(self, step: int) -> Tensor:
        """This rank's rows of the global batch of `step`: uint8 [n, H, W, C]. Raises UnreadableDataError."""
        step = whole_number("step", step)
        if self._is_closed:
            raise RuntimeError("The loader is closed.")
        if self._images is None:
            with self._reading(step):
                self._images = self._load()
        epoch, number = divmod(step, self.plan.batches_per_epoch)
        begin = number * self.plan.batch_size
        rows = slice(begin + self._rows.start, begin + self._rows.stop)
        order, flip, top, left = (choice[rows] for choice in self._epoch(epoch))
        return gather_images(self._images, order, flip, top, left, size=self.source.image_shape[1])

    def close(self) -> None:
        """Free the images; no batch can be read afterwards."""
        self._images = None
        self._is_closed = True
        self._epoch.cache_clear()

    def _choices(self, epoch: int) -> _Epoch:
        assert self._images is not None
        choices, size = self.plan.epoch(epoch), self.source.image_shape[1]
        spare = np.array([side - size + 1 for side in self._images.shape[1:3]])
        starts = np.floor((choices.crop if self._crop else np.full_like(choices.crop, 0.5)) * spare).astype(np.int64)
        flip = choices.flip if self._flip else np.zeros_like(choices.flip)
        parts = (choices.order.astype(np.int64), flip, starts[:, 0], starts[:, 1])
        return _Epoch(*(torch.from_numpy(np.ascontiguousarray(part)).to(self._device) for part in parts))

    def _load(self) -> Tensor:
        """All images on the device, read with threads; a bar shows if that takes a while and stderr is a terminal."""
        shape = (len(self.source), *self._read_chunk(range(1)).shape[1:])
        _require_room(self._device, int(np.prod(shape)))
        images = torch.empty(shape, dtype=torch.uint8, device=self._device)
        chunks = [range(at, min(at + CHUNK, len(self.source))) for at in range(0, len(self.source), CHUNK)]
        with ThreadPoolExecutor() as pool:
            results = zip(chunks, pool.map(self._read_chunk, chunks), strict=True)
            for chunk, pixels in tqdm(results, "loading images", len(chunks), delay=2, disable=None, leave=False):
                images[chunk.start : chunk.stop].copy_(torch.from_numpy(pixels))
        return images

    def _read_chunk(self, chunk: range) -> Pixels:
        """uint8 [n, H, W, C], uncropped with random_crop."""
        if not (self._crop and isinstance(self.source, StoredImages)):
            return self.source.read(np.array(chunk))
        images = [self.source.fitted(index) for index in chunk]
        shapes = {image.shape[:2] for image in images} | {self.source.fitted(0).shape[:2]}
        if len(shapes) > 1:
            found = ", ".join(f"{width}x{height}" for height, width in sorted(shapes)[:3])
            raise UserError(
                f"{self.source.name} has images of several shapes ({found}, ...), which cannot be cached on a device "
                "for random crops; use --cache host or none."
            )
        return np.stack(images)


def _require_room(device: torch.device, needed: int) -> None:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if needed > free:
            raise UserError(
                f"The images take {needed / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free; use --cache host or "
                "none."
            )
