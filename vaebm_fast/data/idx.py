"""Reads idx files (MNIST and similar): a big-endian header, then raw uint8; optionally gzip-compressed.

Headers: magic 2051, count, rows, columns for images; magic 2049, count for labels; each number is four bytes.
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from vaebm_fast.data.containers.base import is_hidden
from vaebm_fast.runtime.errors import UserError

IMAGES_MAGIC = 2051
LABELS_MAGIC = 2049


def find_idx(folder: Path, subset: str, what: Literal["images", "labels"]) -> Path | None:
    """The file of `subset`, train or t10k, in `folder`; None if there is none.

    Names are those of the original (train-images-idx3-ubyte) and of common copies (train-images.idx3-ubyte; a folder
    with the file of the same name in it), each also with .gz.
    """
    kind = 3 if what == "images" else 1
    names = [f"{subset}-{what}{mark}idx{kind}-ubyte" for mark in "-."]
    nested = [f"{name}/{name}" for name in names]
    candidates = (folder / f"{name}{end}" for name in (*names, *nested) for end in ("", ".gz"))
    return next((path for path in candidates if os.path.isfile(path)), None)


def find_folder(root: Path, subset: str, *, below: bool = True) -> Path | None:
    """The folder with the images of `subset`: `root`, its raw/, or if `below` one of its folders, or the raw/ of one.

    None if there is none. Raises UserError if several of its folders have them.
    """

    def first(*folders: Path) -> Path | None:
        return next((folder for folder in folders if find_idx(folder, subset, "images")), None)

    here = first(root, root / "raw")
    if here is not None or not below:
        return here
    with os.scandir(root) as entries:
        inner = sorted(Path(entry.path) for entry in entries if not is_hidden(entry.name) and os.path.isdir(entry))
    found = [folder for path in inner if (folder := first(path, path / "raw")) is not None]
    if len(found) > 1:
        raise UserError(f"{root} holds several data sets: {', '.join(map(str, found))}. Name one of these folders.")
    return found[0] if found else None


def read_images(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [n, rows, columns]. Raises ValueError, naming the file, for a wrong magic number or length."""
    return _read(path, IMAGES_MAGIC, "images", header_numbers=4)


def read_labels(path: Path) -> npt.NDArray[np.uint8]:
    """uint8 [n]. Raises ValueError, naming the file, for a wrong magic number or length."""
    return _read(path, LABELS_MAGIC, "labels", header_numbers=2)


def _read(path: Path, magic: int, what: str, header_numbers: int) -> npt.NDArray[np.uint8]:
    header_bytes = 4 * header_numbers
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(header_bytes)
            if len(header) < header_bytes:
                raise UserError(
                    f"{path} is truncated: {len(header)} bytes cannot hold the {header_bytes}-byte idx header."
                )
            found, *shape = np.frombuffer(header, ">u4", header_numbers).tolist()
            if found != magic:
                raise UserError(f"{path} is not an idx file of {what}: its magic number is {found}, not {magic}.")
            expected = math.prod(shape)
            data = _at_most(file, expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        if path.suffix != ".gz" or (isinstance(error, OSError) and error.errno):
            raise
        raise UserError(f"{path} is a truncated or damaged gzip file ({error}). Download it again.") from error
    if len(data) != expected:
        fault = "is truncated" if len(data) < expected else "is too long"
        follow = f"{len(data)} follow" if len(data) < expected else "more follow"
        raise UserError(
            f"{path} {fault}: its header specifies {' x '.join(map(str, shape))} = {expected} bytes of {what}, but "
            f"{follow}."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _at_most(file: Any, size: int) -> bytes:
    """Up to `size` bytes; a header that claims more than there is takes no memory for it."""
    parts: list[bytes] = []
    while size and (part := file.read(min(size, 1 << 24))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
