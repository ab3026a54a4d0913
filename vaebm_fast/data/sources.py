"""Image sources: square images of one shape by index, from memory or from a container.

`containers` reads what is stored, `images` decodes and resizes, `opening` finds the source at a path, `loader` owns
order, batches and devices.
"""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vaebm_fast.config import Transform
from vaebm_fast.data.containers import Container
from vaebm_fast.data.containers.base import summary
from vaebm_fast.data.images import (
    Pixels,
    Record,
    UnfitImageError,
    UnreadableImageError,
    crop_square,
    decoding,
    transformed,
)
from vaebm_fast.runtime.errors import UserError

IDX_SUBSETS = {"train": "train", "held_out": "t10k"}
DIGITS_SPLIT_KEY = 1797
STACKED_KEY = 1000
DEFAULT_CACHE_BYTES = 2 << 30

Result = TypeVar("Result")


class ImageSource(Protocol):
    """A finite, ordered set of square images of one shape; an index always returns the same image."""

    @property
    def name(self) -> str:
        """Human-readable name."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """One class per image, [len(self)]; None without classes."""
        ...

    @property
    def transform(self) -> Transform:
        """How stored images become square; "square" if they are square already."""
        ...

    def __len__(self) -> int: ...

    def digest(self, without: Collection[str] = ()) -> str:
        """SHA-256 that identifies the images and their order, wherever they lie. Constant.

        Of images named in `without`, the content does not count.
        """
        ...

    def find_unreadable(self) -> list[str]:
        """Names of all images that cannot be read; reads every image."""
        ...

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """The images at `indices` [n] as a new array, uint8 [n, H, W, C].

        `crop` [n, 2] in [0, 1) places the window (vertical, horizontal) in images larger than the square; the default
        is the centre. Thread-safe.
        """
        ...


@dataclass(frozen=True)
class ArraySource:
    """An `ImageSource` of square images in memory or mapped: uint8 [n, H, W, C]."""

    name: str
    images: Pixels
    labels: npt.NDArray[np.int64] | None = None
    sha256: str | None = None  # the digest, where it is known already
    transform: Transform = "square"

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self, without: Collection[str] = ()) -> str:
        """`sha256`, or else that of shape and pixels; `without` has no effect, because these images have no names."""
        return self.sha256 or self._digest

    def find_unreadable(self) -> list[str]:
        """None: the images are in memory."""
        return []

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(repr(self.images.shape).encode())
        sha.update(np.ascontiguousarray(self.images).data)
        return sha.hexdigest()

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """uint8 [n, H, W, C]; `crop` has no effect on square images."""
        return self.images[indices]


class StoredImages:
    """An `ImageSource` of what a container stores, decoded, transformed, resized and cropped.

    transform: see `images.transformed`; default: the container's own. sha256: the digest, if it is known. Caches
    decoded, resized, uncropped images until `cache_bytes` is full; further images are decoded on each read. Reading an
    unreadable image raises UnreadableImageError. Warns of files that were passed over.
    """

    def __init__(
        self,
        container: Container,
        *,
        image_size: int,
        image_channels: int,
        transform: Transform | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        sha256: str | None = None,
    ) -> None:
        self.container, self.name, self.labels = container, str(container.path), container.labels
        self.image_shape = (image_channels, image_size, image_size)
        self.transform: Transform = transform or container.transform
        if container.passed_over:
            total = sum(map(len, container.passed_over.values()))
            passed_over = f"{total} file{'s' * (total > 1)} passed over: {summary(container.passed_over)}"
            warnings.warn(f"{container.path}: {len(self)} images, {passed_over}.", stacklevel=2)
        self._sha256 = sha256
        self._contents: list[bytes] | None = None
        self.cache_bytes, self._cached_bytes = cache_bytes, 0
        self._cache: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.container.names)

    def digest(self, without: Collection[str] = ()) -> str:
        """SHA-256 of every image's name, size and SHA-256, in order; of those in `without` only the name counts.

        Reads every image the first time. Raises OSError, naming the file, if one cannot be read.
        """
        if self._sha256 is not None:
            return self._sha256
        if self._contents is None:
            self._contents = self._of_every_image("identifying the images", self._content)
        sha = hashlib.sha256()
        for name, content in zip(self.container.names, self._contents, strict=True):
            sha.update(name.encode(errors="surrogateescape") + b"\0" + (b"" if name in without else content) + b"\n")
        return sha.hexdigest()

    def _content(self, index: int) -> bytes:
        try:
            size, sha256 = identity(self.container.read(index))
        except OSError:
            raise
        except Exception as error:  # damage in an archive: it identifies the image, and reading it will be refused
            return f"unreadable: {error}".encode()
        return f"{size}\0{sha256}".encode()

    def find_unreadable(self) -> list[str]:
        """Names of all images that are damaged now; reads every image, with threads."""

        def is_damaged(index: int) -> bool:
            try:
                self.fitted(index)
            except UnreadableImageError as error:
                return error.is_damaged
            return False

        broken = self._of_every_image("reading every image", is_damaged)
        return [name for name, fault in zip(self.container.names, broken, strict=True) if fault]

    def _of_every_image(self, title: str, function: Callable[[int], Result]) -> list[Result]:
        """The function of every index, with threads; a bar shows if that takes a while and stderr is a terminal."""
        with ThreadPoolExecutor() as pool:
            results = pool.map(function, range(len(self)))
            return list(tqdm(results, title, len(self), delay=2, disable=None, unit="image", leave=False))

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """uint8 [n, H, W, C]; `crop` [n, 2] in [0, 1) places each window (vertical, horizontal); default: centred."""
        channels, size, _ = self.image_shape
        places = np.full((len(indices), 2), 0.5) if crop is None else crop
        out = np.empty((len(indices), size, size, channels), np.uint8)
        for row, index in enumerate(indices.tolist()):
            out[row] = crop_square(self._cached(index), size, *places[row].tolist())
        return out

    def fitted(self, index: int) -> Pixels:
        """The image as uint8 [H, W, C], its shorter side of the source's size, not cropped. Not cached."""
        channels, size, _ = self.image_shape
        try:
            with decoding(self.container.read(index), channels) as pixels:
                return transformed(pixels, self.transform, size)
        except MemoryError:
            raise
        except UnfitImageError as error:
            raise unfit(self.container.where(index), self.transform, error) from error
        except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, ...
            raise UnreadableImageError(self.container.where(index), error, self.container.names[index]) from error

    def _cached(self, index: int) -> Pixels:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        pixels = self.fitted(index)
        with self._lock:
            if index not in self._cache and self._cached_bytes + pixels.nbytes <= self.cache_bytes:
                self._cache[index] = pixels
                self._cached_bytes += pixels.nbytes
        return pixels


def unfit(where: str, transform: Transform, error: UnfitImageError) -> UserError:
    """The error of an image that the transform does not fit."""
    return UserError(f"{where} does not fit transform {transform} ({error}); choose another one, such as square.")


def identity(record: Record) -> tuple[int, str]:
    """(number of bytes, SHA-256) of an encoded file; of raw pixels, the SHA-256 covers their shape too."""
    if isinstance(record, np.ndarray):
        sha = hashlib.sha256(repr(record.shape).encode())
        sha.update(np.ascontiguousarray(record).data)
        return record.nbytes, sha.hexdigest()
    return len(record), hashlib.sha256(record).hexdigest()


def check_shape(image_size: int, image_channels: int, split: str) -> None:
    """Raise UserError for an image size, number of channels or split that no source has."""
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1.")
    if image_channels not in (1, 3):
        raise UserError(f"image_channels is {image_channels}; it must be 1 (grey) or 3 (RGB).")
    if split not in IDX_SUBSETS:
        raise UserError(f"split is {split!r}; it must be train or held_out.")
