"""LMDB databases of images: raw and encoded (NVAE), encoded under opaque keys (LSUN)."""

from __future__ import annotations

import errno
import math
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vaebm_fast.config import Transform
from vaebm_fast.data.containers.base import Labels, require_size
from vaebm_fast.data.images import Record
from vaebm_fast.runtime.errors import UserError

if TYPE_CHECKING:
    import lmdb

FILE = "data.mdb"
_opened: weakref.WeakValueDictionary[str, _Environment] = weakref.WeakValueDictionary()  # by path
_opening = threading.Lock()


class _Environment:
    """An open database; LMDB allows one per process and file."""

    def __init__(self, path: Path) -> None:
        self.process = os.getpid()
        self._lmdb = _lmdb()
        file = path / FILE if path.is_dir() else path
        try:
            self.handle: lmdb.Environment = self._lmdb.open(
                str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False, create=False
            )
            info, pages = self.handle.info(), self.handle.stat()
        except self._lmdb.Error as error:
            raise UserError(f"{file} cannot be read as an LMDB database ({str(error).rsplit(': ', 1)[-1]}).") from error
        expected, found = (info["last_pgno"] + 1) * pages["psize"], file.stat().st_size
        if found < expected:  # reading on would end the process by SIGBUS
            self.handle.close()
            raise UserError(f"{file} is truncated: it has {found:,} bytes of {expected:,}; copy it again.")


class LmdbImages:
    """The values of an LMDB database (a folder with data.mdb, or one file) as a `Container`.

    Keys that are the numbers 0, 1, ... in decimal give the order of the numbers, others that of their bytes. Values are
    encoded images, or, if they all have the length 3 s^2 and are no image files, raw RGB of side s. Opened by each
    process for itself. Raises UserError if the package lmdb is missing, or the database is damaged or empty.
    """

    labels: Labels | None = None
    transform: Transform = "square"
    passed_over: Mapping[str, Sequence[str]] = {}

    def __init__(self, path: Path) -> None:
        self.path = path
        self._environment: _Environment | None = None
        try:
            with self._handle().begin() as transaction:
                keys = list(transaction.cursor().iternext(values=False))
        except _lmdb().Error as error:
            raise UserError(f"{path} is damaged ({error}).") from error
        if not keys:
            raise UserError(f"{path} has no images: the database is empty.")
        numbers = [b"%d" % index for index in range(len(keys))]
        self._keys = numbers if keys == sorted(numbers) else keys
        self.names = [key.replace(b"\\", b"\\\\").decode("ascii", "backslashreplace") for key in self._keys]
        self._side = self._raw_side()
        self.is_encoded = self._side is None

    def read(self, index: int) -> Record:
        """The encoded image, or uint8 [s, s, 3]."""
        value = self._value(index)
        if self._side is None:
            return value
        if len(value) != 3 * self._side**2:
            raise UserError(f"it has {len(value)} bytes; others are raw RGB of {self._side}x{self._side}")
        return np.frombuffer(value, np.uint8).reshape(self._side, self._side, 3)

    def where(self, index: int) -> str:
        """The database and the key."""
        return f"{self.path}, key {self.names[index]}"

    def _value(self, index: int) -> bytes:
        with self._handle().begin(buffers=True) as transaction:
            value: Any = transaction.get(self._keys[index])
            if value is None:
                raise OSError(errno.ESTALE, "the database was changed while it was read; start again", str(self.path))
            require_size(len(value))
            return bytes(value)

    def _handle(self) -> lmdb.Environment:
        if self._environment is None or self._environment.process != os.getpid():
            place = os.path.realpath(self.path)
            with _opening:
                found = _opened.get(place)
                if found is not None and found.process != os.getpid():  # a fork's copy of its parent's
                    found.handle.close()
                    found = None
                self._environment = _opened[place] = found or _Environment(self.path)
        return self._environment.handle

    def _raw_side(self) -> int | None:
        """The side s if the first, middle and last value have 3 s^2 bytes each and are no image files."""
        values = [self._value(index) for index in {0, len(self._keys) // 2, len(self._keys) - 1}]
        side = math.isqrt(len(values[0]) // 3)
        same = all(len(value) == 3 * side**2 for value in values)
        return side if same and side and not all(map(is_image_file, values)) else None


def is_image_file(data: bytes) -> bool:
    """Whether the first bytes are those of a JPEG, PNG, WebP, BMP, GIF or TIFF file."""
    webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return webp or data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"GIF8", b"II*\0", b"MM\0*"))


def _lmdb() -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise UserError("LMDB databases need the package lmdb; `pip install lmdb` installs it.") from error
    return lmdb
