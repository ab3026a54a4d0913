"""A folder of image files, flat or nested, as a source of square images, with decoded images kept while they fit.

How a file becomes pixels is the business of `images`; which folder is meant by a name, that of `sources`.
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
    """Every file under `root` with an image's extension in any case, ordered by its path relative to `root`.

    Raises ValueError where there is none, and OSError where a folder may not be listed.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = [Path(folder, name) for folder, _, names in os.walk(root, onerror=refuse) for name in names]
    files = [path for path in found if path.suffix.lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{root} holds no images: of {len(found)} files none ends in {', '.join(sorted(EXTENSIONS))}.")
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


class ImageFolder:
    """The images under a folder, each resized on its short side and cropped to a square. An `ImageSource`.

    Decoded and resized, yet uncropped, images stay in memory until `cache_bytes` are full; the others are decoded anew.
    A file that cannot be read raises ValueError with its name when it is asked for; none is ever left out.
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
        """uint8 [n, H, W, C]; `crop` [n, 2] in [0, 1) places each window (vertical, horizontal), else it is central."""
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
