"""Opens the image source of a name or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vaebm_fast.config import Transform
from vaebm_fast.data import idx
from vaebm_fast.data.containers import Split, open_container
from vaebm_fast.data.containers.find import MissingDataError
from vaebm_fast.data.containers.folder import FolderListing
from vaebm_fast.data.digit_sets import IDX_SUBSETS, digits, mnist, stacked_mnist
from vaebm_fast.data.images import check_transform
from vaebm_fast.data.prepared import is_prepared, prepared
from vaebm_fast.data.sources import ImageSource, StoredImages, check_shape
from vaebm_fast.runtime.files import expanded


def open_source(
    name_or_path: str | Path,
    *,
    image_size: int,
    image_channels: int,
    split: Split = "train",
    transform: Transform | None = None,
) -> ImageSource:
    """Open a source by name or path: square images of side `image_size` with 1 or 3 channels.

    "digits": scikit-learn's handwritten digits, see `digits` ("./digits" is a folder with that name);
    a folder that `prepare` wrote: see `prepared`; a folder with idx files, also in its raw/ or, if it holds no images,
    in one of its folders: see `mnist` and, for transform "stacked_mnist", `stacked_mnist`; anything else:
    `containers.open_container`. transform: see `images.transformed`; default: as fits the container.

    Raises ValueError or FileNotFoundError naming the source if it is missing, empty or has the wrong shape.
    """
    check_shape(image_size, image_channels, split)
    shape: dict[str, Any] = {"image_size": image_size, "image_channels": image_channels}
    if transform is not None:
        check_transform(transform)
    if name_or_path == "digits":
        return digits(**shape, split=split)
    root = expanded(os.fspath(name_or_path))
    if not root.exists():
        raise MissingDataError(f'{root} does not exist. Give a folder or file of images, or "digits".')
    if is_prepared(root):
        return prepared(root, **shape, split=split, transform=transform)
    if transform == "stacked_mnist":
        return stacked_mnist(root, **shape, split=split)
    if _holds_idx(root, below=False) or (_holds_idx(root, below=True) and not FolderListing(root).files):
        return mnist(root, **shape, split=split, transform=transform or "pad")
    return StoredImages(open_container(root, split, image_size), **shape, transform=transform)


def _holds_idx(root: Path, *, below: bool) -> bool:
    """Whether a folder has idx files, if `below` also in one of its folders."""
    subsets = IDX_SUBSETS.values()
    return root.is_dir() and any(idx.find_folder(root, subset, below=below) is not None for subset in subsets)
