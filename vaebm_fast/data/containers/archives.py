"""Image files in a zip archive (as EDM and StyleGAN make them) and in tar shards (webdataset)."""

from __future__ import annotations

import json
import os
import tarfile
import threading
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vaebm_fast.config import Transform
from vaebm_fast.data.containers.base import ByPosition, Labels, require_size, summary, why_no_image
from vaebm_fast.runtime.errors import UserError

LABELS_FILE = "dataset.json"


class ZipImages:
    """The image files of a zip archive, sorted by name, as a `Container`.

    Labels are those of its dataset.json, {"labels": [[name, class], ...]}, if that names every image with a whole
    number. Raises UserError if the file is no zip archive, is damaged, or has no images.
    """

    transform: Transform = "square"
    is_encoded = True

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, threading.Lock()
        self._opened: tuple[int, zipfile.ZipFile] | None = None
        try:
            entries = {entry.filename: entry for entry in self._archive().infolist() if not entry.is_dir()}
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} cannot be read as a zip archive ({error}).") from error
        self.passed_over: dict[str, list[str]] = {}
        for name in sorted(set(entries) - {LABELS_FILE}):
            why = why_no_image(name)
            if why is not None:
                self.passed_over.setdefault(why, []).append(name)
                del entries[name]
        described = entries.pop(LABELS_FILE, None)
        if not entries:
            raise UserError(f"{path} has no images: {summary(self.passed_over) or 'it is empty'}.")
        self.names = sorted(entries)
        self._entries = [entries[name] for name in self.names]
        self.labels = None if described is None else self._labels(described)

    def read(self, index: int) -> bytes:
        """The entry's bytes, checked by its CRC-32."""
        entry = self._entries[index]
        require_size(entry.file_size)
        try:
            return self._archive().read(entry)  # never more than file_size
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise UserError(str(error) or "its compressed data end early") from error

    def where(self, index: int) -> str:
        """The archive and the entry."""
        return f"{self.path}, entry {self.names[index]}"

    def _archive(self) -> zipfile.ZipFile:
        """The archive, opened by this process: a forked one would move the file's position for its parent."""
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = os.getpid(), zipfile.ZipFile(self.path)
            return self._opened[1]

    def _labels(self, described: zipfile.ZipInfo) -> Labels | None:
        try:
            require_size(described.file_size)
            content = self._archive().read(described)
        except Exception as error:
            raise UserError(f"{self.path}: its {LABELS_FILE} is damaged ({error}).") from error
        return labels_of(content, self.names, f"{self.path}, {LABELS_FILE}")


class TarImages:
    """The image files of tar shards, shard by shard in their order, as a `Container`.

    A class is read from KEY.cls beside KEY.jpg if every image has one. If shards repeat a name, the shard's name is put
    before it. Raises UserError if a shard is no uncompressed tar archive or is truncated, if several images share a key
    (the name up to its first dot, webdataset's rule), or if there is no image.
    """

    transform: Transform = "square"
    is_encoded = True

    def __init__(self, path: Path, shards: Sequence[Path]) -> None:
        self.path = path
        self.passed_over: dict[str, list[str]] = {}
        self._files = [ByPosition(shard) for shard in shards]
        self._places: list[tuple[ByPosition, str, int, int]] = []  # shard, entry, first byte, number of bytes
        classes: list[Mapping[str, str]] = []
        for file in self._files:
            images, found = self._scan(file)
            _require_one_per_key(file.path, images)
            self._places += [(file, name, *place) for name, place in images.items()]
            classes += [found] * len(images)
        if not self._places:
            raise UserError(f"{path} has no images: {summary(self.passed_over) or 'it is empty'}.")
        names = [name for _, name, *_ in self._places]
        if len(set(names)) < len(names):
            names = [f"{file.path.name}/{name}" for file, name, *_ in self._places]
        self.names = names
        self.labels = _classes([name for _, name, *_ in self._places], classes)

    def read(self, index: int) -> bytes:
        """The entry's bytes."""
        file, _, at, size = self._places[index]
        require_size(size)
        return file.read(at, size)

    def where(self, index: int) -> str:
        """The shard and the entry."""
        file, name, *_ = self._places[index]
        return f"{file.path}, entry {name}"

    def _scan(self, file: ByPosition) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
        """({entry: (first byte, number of bytes)} of the images, {key: class}); of equal names the last counts."""
        images: dict[str, tuple[int, int]] = {}
        classes: dict[str, str] = {}
        try:
            with tarfile.open(file.path, "r:") as archive:
                for entry in archive:
                    if entry.size < 0:
                        raise UserError(f"{file.path} is damaged: {entry.name!r} has a negative size.")
                    key, ending = os.path.splitext(entry.name)
                    why = why_no_image(entry.name.removeprefix("./"))
                    if not entry.isreg() or entry.issparse():
                        if not entry.isdir():
                            self.passed_over.setdefault("not regular files", []).append(entry.name)
                    elif ending == ".cls" and entry.size < 100:
                        classes[key] = file.read(entry.offset_data, entry.size).decode("latin-1").strip()
                    elif why is None:
                        images.pop(entry.name, None)
                        images[entry.name] = (entry.offset_data, entry.size)
                    elif ending not in (".json", ".txt"):  # what webdataset keeps beside images
                        self.passed_over.setdefault(why, []).append(entry.name)
                rest = (
                    file.read(archive.offset, min(file.size - archive.offset, 1 << 20))
                    if archive.offset < file.size
                    else b""
                )
                if rest.strip(b"\0"):
                    raise UserError(
                        f"{file.path} is damaged, or several archives in one: data follow byte {archive.offset}, where "
                        "the archive ends."
                    )
                if archive.offset >= file.size:
                    warnings.warn(f"{file.path} has no end-of-archive marker; it may be truncated.", stacklevel=5)
        except UserError:
            raise
        except Exception as error:  # damaged headers raise many types
            raise UserError(
                f"{file.path} cannot be read as an uncompressed tar archive ({error}); if it is compressed, "
                "decompress it first: images are read in any order."
            ) from error
        return images, classes


def labels_of(content: bytes, names: Sequence[str], where: str) -> Labels | None:
    """The classes of a dataset.json, {"labels": [[name, class], ...]}, int64 [n]; None if it has none.

    Warns, and returns None, unless it gives every image a whole number. Raises UserError if it is damaged.
    """
    try:
        pairs = json.loads(content).get("labels")
        classes: Mapping[str, Any] = dict(pairs or ())
    except Exception as error:  # of other shapes than pairs
        raise UserError(f"{where} is damaged ({error}).") from error
    if not classes:
        return None
    values = [classes.get(name) for name in names]
    if any(not isinstance(value, int) or abs(value) >= 2**63 for value in values):
        warnings.warn(f"{where}: classes are left out, for not every image has a whole number.", stacklevel=5)
        return None
    return np.array(values, np.int64)


def _classes(names: Sequence[str], found: Sequence[Mapping[str, str]]) -> Labels | None:
    """The class of each image, of KEY.cls with the key up to the last dot, or else up to the first."""
    texts = [
        classes.get(os.path.splitext(name)[0], classes.get(key_of(name)))
        for name, classes in zip(names, found, strict=True)
    ]
    if not all(text is not None and text.isdecimal() and len(text) < 19 for text in texts):
        if any(text is not None for text in texts):
            warnings.warn("Classes are left out: not every image has a .cls file with a whole number.", stacklevel=4)
        return None
    return np.array([int(text or 0) for text in texts], np.int64)


def key_of(name: str) -> str:
    """webdataset's key of an entry: its name up to the first dot of its last part."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.')[0]}" if folder else base.split(".")[0]


def _require_one_per_key(path: Path, names: Mapping[str, object]) -> None:
    """Raise UserError if webdataset would put two images into one sample."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(key_of(name), name)
        if other != name:
            raise UserError(
                f"{path}: {other} and {name} are one sample for webdataset, because a key ends at the first dot; "
                "rename them, or keep one image per key."
            )
