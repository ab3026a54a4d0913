"""What all containers of images have in common: the protocol, arrays, and files read by position."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from vaebm_fast.config import Transform
from vaebm_fast.data.images import EXTENSIONS, MAX_FILE_BYTES, Pixels, Record
from vaebm_fast.runtime.errors import UserError

Labels = npt.NDArray[np.int64]
# What operating systems, network disks and archivers leave in folders; so is every name that begins with a dot.
SYSTEM_FOLDERS = (
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found"),
    "system volume information",
)
HIDDEN, NO_IMAGE = "hidden or of the system", f"without an image's ending ({' '.join(sorted(EXTENSIONS))})"


class Container(Protocol):
    """A finite, ordered set of stored images, encoded or raw; an index always gives the same image.

    Thread-safe. Files are opened by their path in each process, so that it may be forked.
    """

    @property
    def path(self) -> Path:
        """The file or folder that was opened."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """The name of each image, without repetition."""
        ...

    @property
    def labels(self) -> Labels | None:
        """One class per image; None without classes."""
        ...

    @property
    def transform(self) -> Transform:
        """How images become square unless the user says otherwise."""
        ...

    @property
    def is_encoded(self) -> bool:
        """Whether images are stored as files to be decoded, not as pixels."""
        ...

    @property
    def passed_over(self) -> Mapping[str, Sequence[str]]:
        """{reason: names of what was found and is no image of the set}."""
        ...

    def read(self, index: int) -> Record:
        """The image: an encoded file, or uint8 [H, W, C] with C 1 or 3."""
        ...

    def where(self, index: int) -> str:
        """The image's place, for messages."""
        ...


class StoredArray:
    """A `Container` of raw images of one shape, in memory or mapped: uint8 [N, H, W, C], named by their index."""

    is_encoded = False
    passed_over: Mapping[str, Sequence[str]] = {}

    def __init__(self, path: Path, images: Pixels, labels: Labels | None = None, transform: Transform = "square"):
        if not len(images):
            raise UserError(f"{path} contains no images.")
        if labels is not None and len(labels) != len(images):
            raise UserError(f"{path} has {len(labels)} labels for {len(images)} images; the files do not match.")
        self.path, self.images, self.labels, self.transform = path, images, labels, transform
        self.names: Sequence[str] = Indices(len(images))

    def read(self, index: int) -> Pixels:
        """uint8 [H, W, C]."""
        return self.images[index]

    def where(self, index: int) -> str:
        """The path and the image's index."""
        return f"{self.path}, image {index}"


class Indices(Sequence[str]):
    """The names "0", "1", ... as a sequence that takes no memory."""

    def __init__(self, total: int) -> None:
        self._range = range(total)

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return str(self._range[index])


class ByPosition:
    """A file whose bytes are read by position, from any thread and process; refuses one that has changed.

    It is opened for each read, so that there may be any number of such files.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._then = path, _state(path.stat())
        self.size = self._then[0]

    def read(self, at: int, size: int) -> bytes:
        """`size` bytes from `at`. Raises OSError if the file was changed since this was made, or ends before."""
        with self.path.open("rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, at)
            while 0 < len(data) < size and (more := os.pread(file.fileno(), size - len(data), at + len(data))):
                data += more
            if _state(os.fstat(file.fileno())) != self._then or len(data) < size:
                raise OSError(errno.ESTALE, "the file was rewritten while it was read; start again", str(self.path))
        return data


def _state(file: os.stat_result) -> tuple[int, int, int]:
    return file.st_size, file.st_mtime_ns, file.st_ino


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or of the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def why_no_image(name: str) -> str | None:
    """Why an archive's entry of this name (a path with /) is no image of the set; None if it may be one."""
    if any(map(is_hidden, name.split("/"))):
        return HIDDEN
    return None if os.path.splitext(name)[1].lower() in EXTENSIONS else NO_IMAGE


def summary(passed_over: Mapping[str, Sequence[str]]) -> str:
    """How many files were passed over, for each reason, with an example."""
    return "; ".join(f"{len(names)} {why}, such as {names[0]}" for why, names in passed_over.items())


def require_size(size: int) -> None:
    """Raise UserError if an encoded image of `size` bytes is too large to be read."""
    if size > MAX_FILE_BYTES:
        raise UserError(f"it has {size:,} bytes; images of at most {MAX_FILE_BYTES:,} are read")
