"""Writes the images of a prepared set: one array, or webdataset shards. `prepared` describes the files."""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vaebm_fast.data.images import Pixels
from vaebm_fast.data.prepared import PER_SHARD, Format, shard_name
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import naming, replacing, sync

HEADER_BYTES = 128  # of an .npy file of images, however many there are
BLOCK, BLOCK_BYTES = 500, 1 << 26  # images between two saves of an array, at most
PNG_LEVEL = 1  # 6 gives files a tenth smaller and takes several times as long


StoredImage = tuple[Any, int | None]  # what is written of an image: pixels or an encoded file; its class


class Writer(Protocol):
    """Writes the images of a split in blocks; written again, a block replaces what came of it before.

    block: images of a block; the last one may have fewer. only_whole_blocks: others cannot be continued.
    """

    block: int
    only_whole_blocks: bool

    def require(self, images: int) -> None:
        """Raise UserError unless the first `images` are there."""

    def write(self, first: int, images: Sequence[StoredImage]) -> None:
        """Put the images from number `first` on the disk."""

    def finish(self, images: int) -> None:
        """Complete the files of this many images."""


class ArrayWriter:
    """An .npy file whose header is written at the end, when the number of images is known."""

    only_whole_blocks = False

    def __init__(self, path: Path, image_shape: tuple[int, int, int]) -> None:
        self._path, self._image_shape = path, image_shape
        self._image_bytes = math.prod(image_shape)
        self.block = max(1, min(BLOCK, BLOCK_BYTES // self._image_bytes))

    def require(self, images: int) -> None:
        """Raise UserError unless the file holds `images`."""
        there = self._path.stat().st_size if self._path.exists() else HEADER_BYTES
        if there < self._end(images):
            raise UserError(f"{self._path} is shorter than its journal says; remove its folder and begin anew.")

    def write(self, first: int, images: Sequence[StoredImage]) -> None:
        """Put the pixels of the images from number `first` on the disk; what followed is cut off."""
        self._path.touch()
        with naming(self._path), self._path.open("r+b") as file:
            file.truncate(self._end(first))
            file.seek(self._end(first))
            for pixels, _ in images:
                file.write(pixels.data)
        sync(self._path)

    def finish(self, images: int) -> None:
        """Write the header; cut off what follows the images."""
        header = io.BytesIO()
        shape = {"descr": "|u1", "fortran_order": False, "shape": (images, *self._image_shape)}
        np.lib.format.write_array_header_1_0(header, shape)
        if len(header.getvalue()) != HEADER_BYTES:
            raise RuntimeError(f"The header of {self._path} has {len(header.getvalue())} bytes, not {HEADER_BYTES}.")
        with naming(self._path), self._path.open("r+b") as file:
            file.write(header.getvalue())
            file.truncate(self._end(images))
        sync(self._path)

    def _end(self, images: int) -> int:
        return HEADER_BYTES + images * self._image_bytes


class ShardWriter:
    """Tar shards of PER_SHARD images each, KEY.png and KEY.cls; the key is the image's number."""

    block, only_whole_blocks = PER_SHARD, True

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split

    def require(self, images: int) -> None:
        """Raise UserError unless the shards of `images` are there."""
        for number in range(-(-images // PER_SHARD)):
            path = self._folder / shard_name(self._split, number)
            if not path.exists():
                raise UserError(f"{path} is missing; remove its folder and begin anew.")

    def write(self, first: int, images: Sequence[StoredImage]) -> None:
        """Write the shard that begins with image `first`."""
        path = self._folder / shard_name(self._split, first // PER_SHARD)
        with (
            replacing(path, durable=True) as temporary,
            tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as shard,
        ):
            for number, (data, label) in enumerate(images, first):
                _add(shard, f"{number:08d}.png", data)
                if label is not None:
                    _add(shard, f"{number:08d}.cls", str(label).encode())

    def finish(self, images: int) -> None:
        """Nothing: every shard is complete."""


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    shard.addfile(entry, io.BytesIO(data))


def open_writer(folder: Path, split: str, format: Format, image_shape: tuple[int, int, int]) -> Writer:
    """The writer of a split's images (H, W, C)."""
    return ArrayWriter(folder / f"{split}.npy", image_shape) if format == "array" else ShardWriter(folder, split)


def png_file(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
