"""Reads idx files (MNIST and similar): a big-endian header, then raw uint8; optionally gzip-compressed.

Headers: magic 2051, count, rows, columns for images; magic 2049, count for labels; each number is four bytes.
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from vaebm_fast.runtime.errors import UserError

IMAGES_MAGIC = 2051
LABELS_MAGIC = 2049


def find_idx(folder: Path, stem: str) -> Path | None:
    """`folder/stem` if it exists, else `folder/stem.gz`, else None."""
    candidates = (folder / stem, folder / f"{stem}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [n, rows, columns]. Raises ValueError, naming the file, for a wrong magic number or length."""
    return _read(path, IMAGES_MAGIC, "images", header_numbers=4)


def read_labels(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [n]. Raises ValueError, naming the file, for a wrong magic number or length."""
    return _read(path, LABELS_MAGIC, "labels", header_numbers=2)


def _read(path: Path, magic: int, what: str, header_numbers: int) -> npt.NDArray[np.uint8]:
    data = _bytes(path)
    header_bytes = 4 * header_numbers
    if len(data) < header_bytes:
        raise UserError(f"{path} is truncated: {len(data)} bytes cannot hold the {header_bytes}-byte idx header.")
    found, *shape = np.frombuffer(data, ">u4", header_numbers).tolist()
    if found != magic:
        raise UserError(f"{path} is not an idx file of {what}: its magic number is {found}, not {magic}.")
    expected = math.prod(shape)
    if len(data) - header_bytes != expected:
        fault = "is truncated" if len(data) - header_bytes < expected else "is too long"
        raise UserError(
            f"{path} {fault}: its header specifies {' x '.join(map(str, shape))} = {expected} bytes of {what}, "
            f"but {len(data) - header_bytes} follow."
        )
    return np.frombuffer(data, np.uint8, offset=header_bytes).reshape(shape)


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a truncated or damaged gzip file ({error}). Download it again.") from error
