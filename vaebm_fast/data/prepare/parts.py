"""The splits of a source: published, or a fixed share that is held out."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vaebm_fast.config import Transform
from vaebm_fast.data.containers import Container, Split, StoredArray
from vaebm_fast.data.containers.find import NoHeldOutError
from vaebm_fast.data.images import CELEBA_SIZE, decoding
from vaebm_fast.data.opening import open_source
from vaebm_fast.data.prepare.options import PrepareOptions
from vaebm_fast.data.sources import ArraySource, ImageSource, StoredImages
from vaebm_fast.runtime.errors import UserError

HELD_OUT_KEY = 2712  # of the fixed shuffle that chooses held-out images


@dataclass(frozen=True)
class Part:
    """The images of a split: those at `indices` of the container.

    transform: what is left to do; made_by: the whole way from what was stored, for the manifest.
    """

    split: Split
    container: Container
    transform: Transform
    indices: Sequence[int]
    made_by: Transform


def parts_of(source: str | Path, options: PrepareOptions) -> list[Part]:
    """The splits of the source: published, or by options.held_out."""

    def opened(split: Split) -> ImageSource:
        return open_source(
            source,
            image_size=options.size,
            image_channels=options.channels,
            split=split,
            transform=options.transform,
        )

    train = opened("train")
    if options.transform is None and isinstance(train, StoredImages):
        _tell_of_celeba(train)
    try:
        held_out = opened("held_out")
    except NoHeldOutError:
        return _chosen_parts(train, options.held_out)
    if options.held_out:
        raise UserError(f"{source} has held-out images of its own; leave --held-out away.")
    return [_part("train", train, range(len(train))), _part("held_out", held_out, range(len(held_out)))]


def _chosen_parts(train: ImageSource, share: float) -> list[Part]:
    """The training images and, of a source without a published split, the share of them that is held out."""
    chosen = _held_out(len(train), share)
    if chosen.all():
        raise UserError(f"held_out is {share}, which leaves none of {len(train)} images to train on.")
    parts = [_part("train", train, np.flatnonzero(~chosen)), _part("held_out", train, np.flatnonzero(chosen))]
    return [part for part in parts if len(part.indices)]


def _part(split: Split, source: ImageSource, indices: Sequence[int] | npt.NDArray[np.int64]) -> Part:
    if isinstance(source, StoredImages):
        return Part(split, source.container, source.transform, indices, source.transform)  # type: ignore[arg-type]
    assert isinstance(source, ArraySource)
    stored = StoredArray(Path(source.name), source.images, source.labels)
    return Part(split, stored, "square", indices, source.transform)  # type: ignore[arg-type]


def _tell_of_celeba(source: StoredImages) -> None:
    """Warn of images that may be CelebA's aligned ones and are not cropped to their box."""
    try:
        with decoding(source.container.read(0), 3) as pixels:
            is_celeba = pixels.shape[1::-1] == CELEBA_SIZE
    except Exception:  # named when its turn comes
        return
    if is_celeba:
        warnings.warn(
            f"{source.name} has images of 178x218, as CelebA's aligned ones: published figures are of --transform "
            "celeba, which crops them to their box first.",
            stacklevel=4,
        )


def _held_out(total: int, share: float) -> npt.NDArray[np.bool_]:
    """Which images are held out: a fixed choice of round(share * total)."""
    order = np.argsort(np.random.Philox(key=HELD_OUT_KEY).random_raw(total), kind="stable")
    chosen = np.zeros(total, np.bool_)
    chosen[order[: round(share * total)]] = True
    return chosen
