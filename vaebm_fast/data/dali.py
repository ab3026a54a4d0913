"""Training batches decoded, resized, cropped and mirrored by NVIDIA DALI, which is fed the plan.

Order, reading ahead, resume and errors are `TorchLoader`'s: each of its threads runs a DALI pipeline of its own,
synchronously and on given inputs, so DALI has no state, sees no ranks, and a batch remains a function of the step.

Pixels equal `TorchLoader`'s bit for bit, except JPEG files that are resized (on a CPU; see `docs/data.md` for bounds):
DALI resizes in floating point and weights the image's border otherwise than Pillow, which rounds between its passes.
Everything else that is not an upright JPEG of moderate size (PNG, GIF, 16 bits, EXIF orientation, ...) is decoded and
resized by Pillow and handed over uncompressed (PNM); DALI reads some of these otherwise and refuses GIF.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from vaebm_fast.data.images import LARGE_PIXELS, TURNS, Pixels, box_of, crop_square, resized_sides
from vaebm_fast.data.loader import TorchLoader
from vaebm_fast.data.sources import StoredImages

# Pillow's (19595 R + 38470 G + 7471 B + 2^15) >> 16: the float32 sums are exact, and DALI rounds halves up.
LUMA = [19595 / 65536, 38470 / 65536, 7471 / 65536]


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1, enable_conditionals=True)
def _of_files(size: int, channels: int, on_gpu: bool):  # type: ignore[no-untyped-def]
    """Encoded files to uint8 [n, size, size, channels].

    box: top, left, height, width of the part that is kept; sides: height and width after resizing; start: top and left
    of the window.
    """
    files = fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True)
    box = fn.external_source(name="box", dtype=types.INT32, ndim=1)
    is_boxed = fn.external_source(name="is_boxed", dtype=types.BOOL, ndim=0)
    sides = fn.external_source(name="sides", dtype=types.FLOAT, ndim=1)
    is_resized = fn.external_source(name="is_resized", dtype=types.BOOL, ndim=0)
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    # Only a GPU's decoder needs to be told to upsample colours as libjpeg does.
    device = {"device": "mixed", "jpeg_fancy_upsampling": True} if on_gpu else {"device": "cpu"}
    image = fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False, **device)
    if is_boxed:
        image = fn.slice(image, start=box[0:2], shape=box[2:4], axis_names="HW")
    if channels == 1:
        image = fn.coord_transform(image, M=LUMA, dtype=types.UINT8)
    if is_resized:  # resizing to the same size would take five times as long as decoding
        image = fn.resize(image, size=sides)  # the antialiased triangle filter
    return fn.flip(fn.slice(image, start=start, shape=(size, size), axis_names="HW"), horizontal=flip)


@pipeline_def(exec_dynamic=True, prefetch_queue_depth=1)
def _of_pixels(on_gpu: bool):  # type: ignore[no-untyped-def]
    """Raw uint8 [n, H, W, C], mirrored where `flip` is 1."""
    pixels = fn.external_source(name="pixels", dtype=types.UINT8, layout="HWC", no_copy=True)
    flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
    return fn.flip(pixels.gpu() if on_gpu else pixels, horizontal=flip)


class DaliLoader(TorchLoader):
    """A `Loader` with the plan of `TorchLoader` and DALI's decoders.

    device: "cpu", or a CUDA device, where JPEG files are decoded and batches returned. threads: of the pipeline of each
    worker. Other arguments: `TorchLoader`.
    """

    def __init__(self, *arguments: Any, device: torch.device | str = "cpu", threads: int = 1, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._device, self._threads = torch.device(device), threads
        self._idle: deque[Any] = deque()  # pipelines; one runs in one thread at a time

    def close(self) -> None:
        """Also end the pipelines and their threads."""
        super().close()
        self._idle.clear()

    def _read(self, step: int) -> Tensor:
        here = self.plan.batch(step, self._rows)
        flip = (here.flip if self._flip else np.zeros_like(here.flip)).astype(np.int32)
        crop = here.crop if self._crop else None
        if isinstance(self.source, StoredImages):
            places = np.full((len(here.order), 2), 0.5) if crop is None else crop
            rows = zip(here.order.tolist(), places.tolist(), strict=True)
            inputs = _inputs([_row(self.source, index, *place) for index, place in rows])
        else:
            inputs = {"pixels": self.source.read(here.order, crop)}
        try:
            pipeline = self._idle.pop() if self._idle else self._pipeline(len(flip))
        except IndexError:  # another thread took the last one
            pipeline = self._pipeline(len(flip))
        try:
            output = pipeline.run(**inputs, flip=flip)[0]
        except RuntimeError:  # an image that DALI refuses, and does not name; the pipeline is not used again
            return super()._read(step).to(self._device)
        batch: Tensor = from_dlpack(output.as_tensor())  # memory of its own, freed with the tensor
        self._idle.append(pipeline)
        return batch.pin_memory() if self._pinned and self._device.type == "cpu" else batch

    def _pipeline(self, rows: int) -> Any:
        on_gpu = self._device.type == "cuda"
        device_id = (self._device.index or 0) if on_gpu else None
        options = {"batch_size": rows, "num_threads": self._threads, "device_id": device_id, "on_gpu": on_gpu}
        channels, size, _ = self.source.image_shape
        return _of_files(size, channels, **options) if isinstance(self.source, StoredImages) else _of_pixels(**options)


@dataclass(frozen=True)
class _Row:
    """What DALI is given for an image: a file, the part of it to keep, its sides after resizing, the window."""

    file: Pixels
    box: tuple[int, int, int, int]
    whole: tuple[int, int]
    sides: tuple[int, int]
    start: tuple[int, int]


def _inputs(rows: Sequence[_Row]) -> dict[str, Any]:
    """The inputs of the pipeline of files."""
    return {
        "files": [row.file for row in rows],
        "box": np.array([row.box for row in rows], np.int32),
        "is_boxed": np.array([row.box != (0, 0, *row.whole) for row in rows]),
        "sides": np.array([row.sides for row in rows], np.float32),
        "is_resized": np.array([row.sides != row.box[2:] for row in rows]),
        "start": np.array([row.start for row in rows], np.int32),
    }


def _row(source: StoredImages, index: int, vertical: float, horizontal: float) -> _Row:
    """The file itself if DALI reads it as Pillow does; otherwise the window that Pillow makes of it, as PNM.

    Raises UnreadableImageError.
    """
    size = source.image_shape[1]
    try:
        record = source.container.read(index)
        if isinstance(record, bytes) and source.transform in ("square", "celeba") and record[:2] == b"\xff\xd8":
            with Image.open(io.BytesIO(record), formats=("JPEG",)) as image:
                whole = (image.height, image.width)
                turned = image.getexif().get(ExifTags.Base.Orientation) in TURNS
            if not turned and whole[0] * whole[1] <= LARGE_PIXELS:
                box = box_of(source.transform, *whole)
                height, width = resized_sides(*box[2:], size)
                if height * width <= LARGE_PIXELS:
                    start = (int(vertical * (height - size + 1)), int(horizontal * (width - size + 1)))
                    return _Row(np.frombuffer(record, np.uint8), box, whole, (height, width), start)
    except Exception:  # damaged or missing: Pillow's way names it
        pass
    window = crop_square(source.fitted(index), size, vertical, horizontal)
    header = b"P%d\n%d %d\n255\n" % (6 if window.shape[2] == 3 else 5, size, size)
    file = np.frombuffer(header + window.tobytes(), np.uint8)
    return _Row(file, (0, 0, size, size), (size, size), (size, size), (0, 0))
