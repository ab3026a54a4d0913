"""Sources of images: what a source is, the built-in digits, MNIST-like idx files, and which source a name means.

A source hands out uint8 images by index and knows nothing of order, batches or devices: that is `loader`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from vaebm_fast.data import idx
from vaebm_fast.data.folder import ImageFolder
from vaebm_fast.data.images import Pixels, resize_short_side
from vaebm_fast.runtime.errors import UserError

Split = Literal["train", "held_out"]

HELD_OUT_FOLDERS = ("held_out", "validation", "val", "test")
IDX_PREFIXES = {"train": "train", "held_out": "t10k"}
DIGITS_SPLIT_KEY = 1797


class MissingDataError(UserError, FileNotFoundError):
    """Data that was named and is not there."""


class ImageSource(Protocol):
    """A finite, ordered set of square images of one shape; reading the same index twice gives the same image."""

    @property
    def name(self) -> str:
        """What a person would call it."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """A class per image, [len(self)], where there are classes."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """The images at `indices` [n] as uint8 [n, H, W, C], an array of the caller's own.

        `crop` [n, 2] in [0, 1) places the window (vertical, horizontal) in images that are larger than the square;
        without it the window is in the centre. Several threads may read at once.
        """
        ...


@dataclass(frozen=True)
class ArraySource:
    """Images held in memory: uint8 [n, H, W, C], all of them already square. An `ImageSource`."""

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

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """uint8 [n, H, W, C]; there is nothing to crop."""
        return self.images[indices]


def open_source(
    name_or_path: str | Path, *, image_size: int, image_channels: int, split: Split = "train"
) -> ImageSource:
    """The images that a name or a path means, as squares of `image_size` pixels with 1 or 3 channels.

    "digits": scikit-learn's handwritten digits, see `digits` ("./digits" is a folder of that name);
    a folder with idx files: see `mnist`;
    any other folder: its image files. Where it has `train/` beside one of `held_out/`, `validation/`, `val/`, `test/`,
    each split reads its own; else all of it is the train split, and there is no held-out one.

    Raises ValueError or FileNotFoundError, naming what was asked for, where it is missing, empty or does not fit.
    """
    _check_shape(image_size, image_channels, split)
    if name_or_path == "digits":
        return digits(image_size=image_size, image_channels=image_channels, split=split)
    root = Path(name_or_path)
    if not root.exists():
        raise MissingDataError(f'There is no {root}. Name a folder of images or of idx files, or "digits".')
    if not root.is_dir():
        raise UserError(f"{root} is a file. Name the folder that holds the images or idx files.")
    if any(idx.find_idx(root, f"{prefix}-images-idx3-ubyte") for prefix in IDX_PREFIXES.values()):
        return mnist(root, image_size=image_size, image_channels=image_channels, split=split)
    return ImageFolder(_split_folder(root, split), image_size=image_size, image_channels=image_channels)


def digits(*, image_size: int = 8, image_channels: int = 1, split: Split = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: v = round(255 v16 / 16) for v16 in 0..16; labels 0..9.

    Other sizes by the antialiased triangle filter. A fixed shuffle parts them into 898 for training and 899 held out.
    """
    _check_shape(image_size, image_channels, split)
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    # Raw Philox words, because numpy promises that they never change; its shuffles may.
    shuffle = np.argsort(np.random.Philox(key=DIGITS_SPLIT_KEY).random_raw(len(grey)), kind="stable")
    half = len(grey) // 2
    chosen = shuffle[:half] if split == "train" else shuffle[half:]
    images = np.stack([resize_short_side(image, image_size) for image in grey[chosen]])
    return ArraySource(
        f"digits, {split} half", np.repeat(images, image_channels, axis=3), bunch.target[chosen].astype(np.int64)
    )


def mnist(folder: Path, *, image_size: int = 32, image_channels: int = 1, split: Split = "train") -> ArraySource:
    """The images of `train-*` (train) or `t10k-*` (held out) idx files, padded with zeros on all sides to `image_size`.

    28x28 becomes 32x32 by two pixels a side. Labels come with it where `*-labels-idx1-ubyte` is there.
    Raises FileNotFoundError or ValueError, naming the file, where it is missing, damaged or does not fit.
    """
    _check_shape(image_size, image_channels, split)
    stem = f"{IDX_PREFIXES[split]}-images-idx3-ubyte"
    path = idx.find_idx(folder, stem)
    if path is None:
        raise MissingDataError(f"{folder} has neither {stem} nor {stem}.gz, which hold the {split} split.")
    images = idx.read_images(path)
    count, rows, columns = images.shape
    if count == 0:
        raise UserError(f"{path} holds no images.")
    if rows != columns or image_size < rows or (image_size - rows) % 2:
        raise UserError(
            f"{path} holds {rows}x{columns} images, which padding equally on all sides cannot make "
            f"{image_size}x{image_size}. They are padded, not resized: try {rows} or {rows + 4}."
        )
    border = (image_size - rows) // 2
    padded = np.pad(images, ((0, 0), (border, border), (border, border)))[..., None]
    return ArraySource(
        f"{folder}, {path.name}", np.repeat(padded, image_channels, axis=3), _mnist_labels(folder, split, count)
    )


def _mnist_labels(folder: Path, split: Split, count: int) -> npt.NDArray[np.int64] | None:
    path = idx.find_idx(folder, f"{IDX_PREFIXES[split]}-labels-idx1-ubyte")
    if path is None:
        return None
    labels = idx.read_labels(path)
    if len(labels) != count:
        raise UserError(f"{path} holds {len(labels)} labels for {count} images; the two files do not belong together.")
    return labels.astype(np.int64)


def _split_folder(root: Path, split: Split) -> Path:
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    has_both = held_out is not None and (root / "train").is_dir()
    if split == "train":
        return root / "train" if has_both else root
    if held_out is None or not has_both:
        raise UserError(
            f"{root} has no held-out images. Part it into the folders train and {' or '.join(HELD_OUT_FOLDERS)}."
        )
    return held_out


def _check_shape(image_size: int, image_channels: int, split: str) -> None:
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; it must be at least 1.")
    if image_channels not in (1, 3):
        raise UserError(f"image_channels is {image_channels}; images are read with 1 (grey) or 3 (RGB).")
    if split not in IDX_PREFIXES:
        raise UserError(f"split is {split!r}; it is train or held_out.")
