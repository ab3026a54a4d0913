"""Output formats: the files of one block, and the files assembled from all blocks.

Output is deterministic: every byte depends only on images and seeds (no dates, no owners, fixed order). File names
contain the zero-padded seed, so sorting by name sorts by seed.
"""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np
from PIL import Image

from vaebm_fast.sampling.folder import PARTS

Format = Literal["png", "zip", "tar", "npz", "npy"]
PER_GROUP = 1000  # images per sub-folder and per tar
COMPRESSION = 1  # PNG level: 6 gives files a tenth smaller and takes several times as long


@dataclass(frozen=True)
class Product:
    """An output file assembled from the images at positions first, ..., stop - 1."""

    name: str
    first: int
    stop: int


@dataclass(frozen=True)
class Part:
    """The file of a block, and the seeds of its images."""

    path: Path
    seeds: Sequence[int]


class Output:
    """One format, for seeds up to `largest` and images uint8 [H, W, C]; flat: PNG files without folders."""

    def __init__(self, format: Format, largest: int, image_shape: tuple[int, int, int], *, flat: bool = False) -> None:
        self.format, self._flat = format, flat
        self._digits = max(6, len(str(largest)))
        channels, height, width = image_shape
        self._image_shape = (height, width, channels)

    def encode(self, block: int, seeds: Sequence[int], images: np.ndarray) -> dict[str, bytes]:
        """The files of a block, images uint8 [n, H, W, C]: its PNG files, or one part of a later product."""
        if self.format in ("npz", "npy"):
            buffer = io.BytesIO()
            np.save(buffer, images)
            return {f"{PARTS}/{block:08d}.npy": buffer.getvalue()}
        pictures = {self._name(seed): _png(image) for seed, image in zip(seeds, images, strict=True)}
        if self.format == "png":
            return pictures
        return {f"{PARTS}/{block:08d}.zip": _zipped(pictures)}

    def products(self, total: int) -> list[Product]:
        """The files assembled from blocks; none for PNG, where blocks write the final files."""
        if self.format == "png":
            return []
        if self.format == "tar":
            starts = range(0, total, PER_GROUP)
            return [Product(f"samples-{at // PER_GROUP:05d}.tar", at, min(at + PER_GROUP, total)) for at in starts]
        return [Product(f"samples.{self.format}", 0, total)]

    def assemble(self, parts: Sequence[Part], wanted: Sequence[int], file: IO[bytes]) -> None:
        """Write a product: the images in `parts` whose seeds are in `wanted`, ascending."""
        if self.format == "zip":
            with zipfile.ZipFile(file, "w") as archive:
                for _, name, data in self._pictures(parts, wanted):
                    archive.writestr(_entry(name), data)
        elif self.format == "tar":
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
                for seed, name, data in self._pictures(parts, wanted):
                    key = name.rpartition("/")[2].removesuffix(".png")
                    _add(archive, f"{key}.json", json.dumps({"seed": seed}).encode() + b"\n")
                    _add(archive, f"{key}.png", data)
        elif self.format == "npy":
            self._write_rows(parts, wanted, file)
        else:
            with zipfile.ZipFile(file, "w") as archive:
                with archive.open(_entry("arr_0.npy"), "w", force_zip64=True) as rows:
                    self._write_rows(parts, wanted, rows)
                with archive.open(_entry("seeds.npy"), "w") as names:
                    np.save(names, np.array(wanted, dtype=np.uint64))

    def bytes_needed(self, images: int) -> int:
        """Bytes of the finished files: exact for arrays; half the raw size, approximately, for PNG photographs."""
        raw = images * int(np.prod(self._image_shape))
        return raw if self.is_exact else raw // 2

    @property
    def is_exact(self) -> bool:
        """Whether `bytes_needed` is exact."""
        return self.format in ("npz", "npy")

    def _name(self, seed: int) -> str:
        group = "" if self._flat else f"{seed - seed % PER_GROUP:0{self._digits}d}/"
        return f"{group}{seed:0{self._digits}d}.png"

    def _pictures(self, parts: Iterable[Part], wanted: Sequence[int]) -> Iterator[tuple[int, str, bytes]]:
        chosen = set(wanted)
        for part in parts:
            with zipfile.ZipFile(part.path) as archive:
                for seed in part.seeds:
                    if seed in chosen:
                        yield seed, self._name(seed), archive.read(self._name(seed))

    def _write_rows(self, parts: Iterable[Part], wanted: Sequence[int], file: IO[bytes]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(wanted), *self._image_shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts:
            file.write(np.load(part.path).tobytes())


def _png(image: np.ndarray) -> bytes:
    """Encode uint8 [H, W, C] as PNG, greyscale if C is 1; values are not rescaled."""
    buffer = io.BytesIO()
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    picture.save(buffer, "PNG", compress_level=COMPRESSION)
    return buffer.getvalue()


def _zipped(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(_entry(name), data)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    """An uncompressed entry with a fixed date, identical on every system."""
    entry = zipfile.ZipInfo(name)  # 1980-01-01
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))
