"""Sets of digits: scikit-learn's, MNIST and its like from idx files, Stacked MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from vaebm_fast.config import Transform
from vaebm_fast.data import idx
from vaebm_fast.data.containers import Split
from vaebm_fast.data.containers.find import MissingDataError, NoHeldOutError
from vaebm_fast.data.images import resize_short_side
from vaebm_fast.data.sources import ArraySource, check_shape
from vaebm_fast.runtime.errors import UserError

IDX_SUBSETS = {"train": "train", "held_out": "t10k"}
DIGITS_SPLIT_KEY = 1797
STACKED_KEY = 1000


def digits(*, image_size: int = 8, image_channels: int = 1, split: Split = "train") -> ArraySource:
    """scikit-learn's 1797 handwritten digits, 8x8 grey: v = round(255 v16 / 16) for v16 in 0..16; labels 0..9.

    Other sizes are resized with the antialiased triangle filter. A fixed shuffle splits them into 898 for training and
    899 held out.
    """
    check_shape(image_size, image_channels, split)
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


def mnist(
    folder: Path,
    *,
    image_size: int = 32,
    image_channels: int = 1,
    split: Split = "train",
    transform: Transform = "pad",
) -> ArraySource:
    """Images of `train-*` (train) or `t10k-*` (held out) idx files, zero-padded on all sides to `image_size`.

    28x28 becomes 32x32 with two pixels per side; transform "square" resizes them instead. Labels are read from
    `*-labels-idx1-ubyte` if it exists. The files are in `folder`, its raw/, or the raw/ of one of its folders;
    `idx.find_idx` lists their names.
    Raises FileNotFoundError or ValueError naming the file if it is missing, damaged or has the wrong shape.
    """
    check_shape(image_size, image_channels, split)
    subset, folder = IDX_SUBSETS[split], idx.find_folder(folder, IDX_SUBSETS[split]) or folder
    path = idx.find_idx(folder, subset, "images")
    if path is None:
        stem = f"{subset}-images-idx3-ubyte"
        missing = f"{folder} has neither {stem} nor {stem}.gz; the {split} split needs one of them."
        if split == "held_out":
            raise NoHeldOutError(folder, f"{missing} Otherwise read the training images (--split train).")
        raise MissingDataError(missing)
    images = idx.read_images(path)
    count, rows, columns = images.shape
    if 0 in (count, rows, columns):
        raise UserError(f"{path} contains no images.")
    if transform == "pad":
        if rows != columns or image_size < rows or (image_size - rows) % 2:
            raise UserError(
                f"{path} contains {rows}x{columns} images, which equal padding on all sides cannot extend to "
                f"{image_size}x{image_size}. Images are padded, not resized: try size {rows} or {rows + 4}, or resize "
                'them with transform "square".'
            )
        border = (image_size - rows) // 2
        grey = np.pad(images, ((0, 0), (border, border), (border, border)))[..., None]
    elif transform == "square" and rows == columns:
        grey = np.stack([resize_short_side(image[..., None], image_size) for image in images])
    else:
        raise UserError(f"{path} contains {rows}x{columns} images, which transform {transform!r} does not fit.")
    labels = _mnist_labels(folder, subset, count)
    colours = np.repeat(grey, image_channels, axis=3)
    return ArraySource(f"{folder}, {path.name}", colours, labels, transform=transform)


def stacked_mnist(
    folder: Path, *, image_size: int = 32, image_channels: int = 3, split: Split = "train"
) -> ArraySource:
    """Stacked MNIST: images whose red, green and blue are three digits of `mnist`; labels 0 to 999, red first.

    As many images as there are digits; each channel holds every digit once, in an order of its own that never changes.
    Source: Metz et al., "Unrolled Generative Adversarial Networks", section 3.3.1, where triples are random.
    """
    if image_channels != 3:
        raise UserError(f"image_channels is {image_channels}; Stacked MNIST has 3.")
    single = mnist(folder, image_size=image_size, split=split)
    if single.labels is None:
        raise UserError(f"{single.name} has no labels, which the classes of Stacked MNIST need; add the labels' file.")
    total = len(single)
    words = np.random.Philox(key=STACKED_KEY).random_raw(3 * total).reshape(3, total)
    orders = np.argsort(words, axis=1, kind="stable")
    stacked = np.concatenate([single.images[order] for order in orders], axis=3)
    hundreds, tens, units = (single.labels[order] for order in orders)
    classes = 100 * hundreds + 10 * tens + units
    return ArraySource(f"{single.name}, stacked", stacked, classes, transform="stacked_mnist")


def _mnist_labels(folder: Path, subset: str, count: int) -> npt.NDArray[np.int64] | None:
    path = idx.find_idx(folder, subset, "labels")
    if path is None:
        return None
    labels = idx.read_labels(path)
    if len(labels) != count:
        raise UserError(f"{path} contains {len(labels)} labels for {count} images; the files do not match.")
    return labels.astype(np.int64)
