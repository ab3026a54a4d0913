"""A flat or nested folder of image files as a source of square images, with a cache of decoded images.

`images` decodes files; `sources` resolves names to folders.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vaebm_fast.data.images import Pixels, crop_square, read_image, resize_short_side
from vaebm_fast.runtime.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DEFAULT_CACHE_BYTES = 2 << 30


def image_files(root: Path) -> list[Path]:
    """All files under `root` with an image extension (case-insensitive), sorted by path relative to `root`.

    Raises ValueError if there are none, and OSError if a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = [Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names]
    files = [path for path in found if path.suffix.lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{root} has no images: none of {len(found)} files ends in {', '.join(sorted(EXTENSIONS))}.")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


class ImageFolder:
    """An `ImageSource` of the images under a folder, each resized by its short side and cropped to a square.

    Caches decoded, resized, uncropped images until `cache_bytes` is full; further images are decoded on each read.
    Reading an unreadable file raises ValueError with its name; no file is ever skipped.
    """

    labels: npt.NDArray[np.int64] | None = None

    def __init__(
        self, root: Path, *, image_size: int, image_channels: int, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.name = str(root)
        self.image_shape = (image_channels, image_size, image_size)
        self.files = image_files(root)
        self._free_bytes = cache_bytes
        self._cache: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.files)

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """uint8 [n, H, W, C]; `crop` [n, 2] in [0, 1) places each window (vertical, horizontal); default: centred."""
        channels, size, _ = self.image_shape
        places = np.full((len(indices), 2), 0.5) if crop is None else crop
        out = np.empty((len(indices), size, size, channels), np.uint8)
        for row, index in enumerate(indices.tolist()):
            out[row] = crop_square(self._resized(index), size, *places[row].tolist())
        return out

    def _resized(self, index: int) -> Pixels:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        channels, size, _ = self.image_shape
        pixels = resize_short_side(read_image(self.files[index], channels), size)
        with self._lock:
            if index not in self._cache and pixels.nbytes <= self._free_bytes:
                self._cache[index] = pixels
                self._free_bytes -= pixels.nbytes
        return pixels
