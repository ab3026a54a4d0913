"""TFRecord files of raw images: Glow's (CelebA-HQ, several files, HWC) and ProGAN's (one file a resolution, CHW).

A record is: length, uint64 little-endian; masked CRC-32C of these 8 bytes; the data; their masked CRC-32C. The data are
a tf.train.Example, of which the features `shape` and `data` are read.
Sources: TensorFlow's guide "TFRecord and tf.train.Example"; the protobuf encoding guide.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebm_fast.config import Transform
from vaebm_fast.data.containers.base import ByPosition, Indices, Labels, require_size
from vaebm_fast.data.images import Pixels
from vaebm_fast.runtime.errors import UserError

HEADER, FOOTER = 12, 4
VARINT, LENGTH_DELIMITED = 0, 2
FIXED = {1: 8, 5: 4}  # wire type: bytes
Value = int | bytes


class TFRecordImages:
    """The images of TFRecord files, file by file in their order, as a `Container` of raw images.

    Raises UserError if the package google-crc32c is missing, or if a file is truncated, damaged or empty.
    """

    labels: Labels | None = None  # reading them would mean reading every image
    transform: Transform = "square"
    is_encoded = False
    passed_over: Mapping[str, Sequence[str]] = {}

    def __init__(self, path: Path, files: Sequence[Path]) -> None:
        self.path, self._masked_crc = path, _masked_crc32c()
        self._places = [place for file in files for place in self._scan(ByPosition(file))]
        if not self._places:
            raise UserError(f"{path} contains no images.")
        self.names: Sequence[str] = Indices(len(self._places))

    def read(self, index: int) -> Pixels:
        """uint8 [H, W, C], checked by the record's CRC-32C."""
        return _image(self._example(index))

    def where(self, index: int) -> str:
        """The file, and the record's first byte."""
        file, at, _ = self._places[index]
        return f"{file.path}, record at byte {at - HEADER}"

    def _scan(self, file: ByPosition) -> Iterator[tuple[ByPosition, int, int]]:
        """(file, first byte, number of bytes) of the data of each record."""
        at = 0
        while at < file.size:
            header = file.read(at, min(HEADER, file.size - at))
            length, crc = struct.unpack("<QI", header) if len(header) == HEADER else (0, None)
            if crc != self._masked_crc(header[:8]):
                raise UserError(
                    f"{file.path} is damaged or no TFRecord file: the record at byte {at} has a bad header."
                )
            end = at + HEADER + length + FOOTER
            if end > file.size:
                raise UserError(f"{file.path} is truncated: the record at byte {at} ends at {end} of {file.size}.")
            yield file, at + HEADER, length
            at = end

    def _example(self, index: int) -> dict[str, list[Value]]:
        """The features of a record."""
        file, at, length = self._places[index]
        require_size(length)
        stored = file.read(at, length + FOOTER)
        data, crc = stored[:length], struct.unpack("<I", stored[length:])[0]
        if crc != self._masked_crc(data):
            raise UserError("its CRC-32C is wrong: it is damaged")
        try:
            return _features(data)
        except Exception as error:
            raise UserError("it is no tf.train.Example") from error


def _image(features: Mapping[str, Sequence[Value]]) -> Pixels:
    """uint8 [H, W, C] of the features `shape`, HWC or CHW, and `data`."""
    shape: list[Any] = list(features.get("shape", ()))
    [data] = features.get("data", ()) if len(features.get("data", ())) == 1 else [None]
    if len(shape) != 3 or not isinstance(data, bytes):
        raise UserError("it lacks the features `shape`, of three numbers, and `data`")
    if min(shape) < 1 or math.prod(shape) != len(data):
        raise UserError(f"it has {len(data)} bytes of pixels where its shape is {' x '.join(map(str, shape))}")
    pixels = np.frombuffer(data, np.uint8).reshape(shape)
    if shape[2] not in (1, 3) and shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.shape[2] not in (1, 3):
        raise UserError(f"its shape is {' x '.join(map(str, shape))}; no side is 1 or 3, a number of channels")
    return pixels


def _features(example: bytes) -> dict[str, list[Value]]:
    """{name: values} of a serialised tf.train.Example; values of float lists are left out."""
    found: dict[str, list[Value]] = {}
    for _, features in _fields(example, 1):
        for _, entry in _fields(features, 1):
            named = dict(_fields(entry))
            [(kind, values)] = _fields(named[2])
            if kind == 1:  # bytes_list
                found[named[1].decode()] = [value for _, value in _fields(values, 1)]
            elif kind == 3:  # int64_list
                found[named[1].decode()] = _integers(values)
    return found


def _fields(message: Any, only: int | None = None) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: an integer for a varint, else bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        value: Value
        if wire == VARINT:
            value, at = _varint(message, at)
        else:
            size = FIXED.get(wire)
            if wire == LENGTH_DELIMITED:
                size, at = _varint(message, at)
            if size is None or at + size > len(message):
                raise ValueError(f"wire type {wire} at byte {at}")
            value, at = message[at : at + size], at + size
        if only in (None, number):
            yield number, value


def _integers(int64_list: bytes) -> list[Value]:
    """The values of an int64_list, packed or not."""
    values: list[Value] = []
    for _, value in _fields(int64_list, 1):
        packed, at = value, 0
        if isinstance(packed, int):
            values.append(_signed(packed))
            continue
        while at < len(packed):
            number, at = _varint(packed, at)
            values.append(_signed(number))
    return values


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """(the number at `at`, the position after it): seven bits a byte, the lowest first."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _masked_crc32c() -> Any:
    """The function bytes -> masked CRC-32C: rotated right by 15 bits, plus 0xa282ead8."""
    try:
        import google_crc32c
    except ImportError as error:
        raise UserError(
            "TFRecord files need the package google-crc32c; `pip install google-crc32c` does it."
        ) from error

    def masked(data: bytes) -> int:
        crc: int = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    return masked
