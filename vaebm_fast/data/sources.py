"""Image sources: their interface, the built-in digits, MNIST-like idx files, and lookup by name or path.

A source returns uint8 images by index; `loader` owns order, batches and devices.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vaebm_fast.data import idx
from vaebm_fast.data.folder import EXTENSIONS, FolderListing, ImageFolder, is_hidden
from vaebm_fast.data.images import Pixels, resize_short_side
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import expanded

Split = Literal["train", "held_out"]

HELD_OUT_FOLDERS = ("held_out", "validation", "val", "test")
IDX_SUBSETS = {"train": "train", "held_out": "t10k"}
DIGITS_SPLIT_KEY = 1797


class MissingDataError(UserError, FileNotFoundError):
    """The requested data does not exist."""


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
    """An `ImageSource` of square images in memory: uint8 [n, H, W, C]."""

    name: str
    images: Pixels
    labels: npt.NDArray[np.int64] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        _, height, width, channels = self.images.shape
        return (channels, height, width)

    def __len__(self) -> int:
        return len(self.images)

    def digest(self, without: Collection[str] = ()) -> str:
        """SHA-256 of shape and pixels; `without` has no effect, because these images have no names."""
        return self._digest

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


def open_source(
    name_or_path: str | Path, *, image_size: int, image_channels: int, split: Split = "train"
) -> ImageSource:
    """Open a source by name or path: square images of side `image_size` with 1 or 3 channels.

    "digits": scikit-learn's handwritten digits, see `digits` ("./digits" is a folder with that name);
    a folder with idx files, also in its raw/ or, if it holds no images, in one of its folders: see `mnist`;
    any other folder: its image files. If it contains `train/` and one of `held_out/`, `validation/`, `val/`, `test/`,
    each split reads its own subfolder; otherwise all files are the train split and there is no held-out split.

    Raises ValueError or FileNotFoundError naming the source if it is missing, empty or has the wrong shape.
    """
    _check_shape(image_size, image_channels, split)
    if name_or_path == "digits":
        return digits(image_size=image_size, image_channels=image_channels, split=split)
    root = expanded(os.fspath(name_or_path))
    if not root.exists():
        raise MissingDataError(f'{root} does not exist. Give a folder of images or idx files, or "digits".')
    if not root.is_dir():
        raise UserError(f"{root} is a file. Give the folder that contains the images or idx files.")
    if _holds_idx(root, below=False) or (_holds_idx(root, below=True) and not FolderListing(root).files):
        return mnist(root, image_size=image_size, image_channels=image_channels, split=split)
    return ImageFolder(_split_folder(root, split), image_size=image_size, image_channels=image_channels)


def digits(*, image_size: int = 8, image_channels: int = 1, split: Split = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: v = round(255 v16 / 16) for v16 in 0..16; labels 0..9.

    Other sizes are resized with the antialiased triangle filter. A fixed shuffle splits them into 898 for training and
    899 held out.
    """
    _check_shape(image_size, image_channels, split)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    # Raw Philox words: numpy guarantees that these never change; its shuffles may.
    shuffle = np.argsort(np.random.Philox(key=DIGITS_SPLIT_KEY).random_raw(len(grey)), kind="stable")
    half = len(grey) // 2
    chosen = shuffle[:half] if split == "train" else shuffle[half:]
    images = np.stack([resize_short_side(image, image_size) for image in grey[chosen]])
    return ArraySource(
        f"digits, {split} half", np.repeat(images, image_channels, axis=3), bunch.target[chosen].astype(np.int64)
    )


def mnist(folder: Path, *, image_size: int = 32, image_channels: int = 1, split: Split = "train") -> ArraySource:
    """Images of `train-*` (train) or `t10k-*` (held out) idx files, zero-padded on all sides to `image_size`.

    28x28 becomes 32x32 with two pixels per side. Labels are read from `*-labels-idx1-ubyte` if it exists. The files are
    in `folder`, its raw/, or the raw/ of one of its folders; `idx.find_idx` lists their names.
    Raises FileNotFoundError or ValueError naming the file if it is missing, damaged or has the wrong shape.
    """
    _check_shape(image_size, image_channels, split)
    subset, folder = IDX_SUBSETS[split], idx.find_folder(folder, IDX_SUBSETS[split]) or folder
    path = idx.find_idx(folder, subset, "images")
    if path is None:
        stem = f"{subset}-images-idx3-ubyte"
        otherwise = " Otherwise read the training images (--split train)." if split == "held_out" else ""
        raise MissingDataError(
            f"{folder} has neither {stem} nor {stem}.gz; the {split} split needs one of them.{otherwise}"
        )
    images = idx.read_images(path)
    count, rows, columns = images.shape
    if count == 0:
        raise UserError(f"{path} contains no images.")
    if rows != columns or image_size < rows or (image_size - rows) % 2:
        raise UserError(
            f"{path} contains {rows}x{columns} images, which equal padding on all sides cannot extend to "
            f"{image_size}x{image_size}. Images are padded, not resized: try size {rows} or {rows + 4}."
        )
    border = (image_size - rows) // 2
    padded = np.pad(images, ((0, 0), (border, border), (border, border)))[..., None]
    return ArraySource(
        f"{folder}, {path.name}", np.repeat(padded, image_channels, axis=3), _mnist_labels(folder, subset, count)
    )


def _mnist_labels(folder: Path, subset: str, count: int) -> npt.NDArray[np.int64] | None:
    path = idx.find_idx(folder, subset, "labels")
    if path is None:
        return None
    labels = idx.read_labels(path)
    if len(labels) != count:
        raise UserError(f"{path} contains {len(labels)} labels for {count} images; the files do not match.")
    return labels.astype(np.int64)


def _holds_idx(root: Path, *, below: bool) -> bool:
    return any(idx.find_folder(root, subset, below=below) is not None for subset in IDX_SUBSETS.values())


def _split_folder(root: Path, split: Split) -> Path:
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    has_both = held_out is not None and (root / "train").is_dir()
    if split == "train" and not has_both:
        return root
    if held_out is None or not has_both:
        raise UserError(
            f"{root} has no held-out images. Split it into the folders train and {' or '.join(HELD_OUT_FOLDERS)}, "
            "or read the training images (--split train)."
        )
    chosen = root / "train" if split == "train" else held_out
    _tell_what_is_left_out(root, chosen, {"train", held_out.name})
    return chosen


def _tell_what_is_left_out(root: Path, chosen: Path, split_names: set[str]) -> None:
    """Warn of folders and images beside the folders of a split."""
    with os.scandir(root) as entries:
        left_out = sorted(
            entry.name
            for entry in entries
            if entry.name not in split_names and (os.path.isdir(entry) or Path(entry.name).suffix.lower() in EXTENSIONS)
            if not is_hidden(entry.name)
        )
    if left_out:
        warnings.warn(
            f"{root}: only {chosen.name}/ is read; {len(left_out)} folders and images beside it are left out, such as "
            f"{left_out[0]}.",
            stacklevel=3,
        )


def _check_shape(image_size: int, image_channels: int, split: str) -> None:
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1.")
    if image_channels not in (1, 3):
        raise UserError(f"image_channels is {image_channels}; it must be 1 (grey) or 3 (RGB).")
    if split not in IDX_SUBSETS:
        raise UserError(f"split is {split!r}; it must be train or held_out.")
