"""A flat or nested folder of image files as a source of square images, with a cache of decoded images.

`images` decodes files; `sources` resolves names to folders.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from vaebm_fast.data.images import Pixels, UnreadableImageError, crop_square, read_image, resize_short_side
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import file_sha256

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# What operating systems, network disks and archivers leave in folders; so is every name that begins with a dot.
SYSTEM_FOLDERS = (
    *("@eadir", "@recycle", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found"),
    "system volume information",
)
DEFAULT_CACHE_BYTES = 2 << 30
HIDDEN, NO_IMAGE, SPECIAL, TWICE, NOWHERE = (
    "hidden or of the system",
    f"without an image's ending ({' '.join(sorted(EXTENSIONS))})",
    "not regular files",
    "links to folders that are read already",
    "links to what cannot be reached",
)


Result = TypeVar("Result")


class FolderListing:
    """The image files under `root`, sorted by their names relative to it, and what was passed over.

    Image files are regular files with an ending of EXTENSIONS in any case. Links to folders are followed; each folder
    is read once, by its own name if it has one here. Hidden and system files and folders are passed over. folders:
    device and inode of those that were read. passed_over: {reason: file names}.
    Raises UserError for an image that links to nothing, OSError if a folder cannot be listed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.passed_over: dict[str, list[str]] = {}
        self.folders: set[tuple[int, int]] = set()
        found: list[tuple[str, Path]] = []
        links = [root]
        while links:  # links lead on after all folders that are really here
            found_links: list[Path] = []
            for link in sorted(links):
                if _identity(link) in self.folders:
                    self._pass_over(TWICE, [link])
                else:
                    found += [(self._name(path), path) for path in self._walk(link, found_links)]
            links = found_links
        self.names = [name for name, _ in sorted(found)]
        self.files = [path for _, path in sorted(found)]

    @property
    def total_passed_over(self) -> int:
        """The number of files and links passed over."""
        return sum(map(len, self.passed_over.values()))

    @property
    def reasons(self) -> str:
        """How many files were passed over, for each reason, with an example."""
        return "; ".join(f"{len(names)} {why}, such as {names[0]}" for why, names in self.passed_over.items())

    def _walk(self, top: Path, links: list[Path]) -> Iterator[Path]:
        """The images under `top` in folders that were not read; adds the links to folders to `links`."""
        for parent, folders, names in os.walk(top, onerror=_refuse):
            folder = Path(parent)
            self.folders.add(_identity(folder))
            for path in (folder / name for name in sorted(folders)):
                if is_hidden(path.name):
                    self._pass_over(HIDDEN, (Path(at, name) for at, _, inner in os.walk(path) for name in inner))
                elif path.is_symlink():
                    links.append(path)
            folders[:] = [name for name in folders if not (is_hidden(name) or (folder / name).is_symlink())]
            folders[:] = [name for name in folders if _identity(folder / name) not in self.folders]
            for path in (folder / name for name in sorted(names)):
                if is_hidden(path.name):
                    self._pass_over(HIDDEN, [path])
                elif path.suffix.lower() not in EXTENSIONS:
                    self._pass_over(NOWHERE if path.is_symlink() and not path.exists() else NO_IMAGE, [path])
                elif not _is_regular(path):
                    self._pass_over(SPECIAL, [path])
                else:
                    yield path

    def _pass_over(self, why: str, paths: Iterable[Path]) -> None:
        names = [self._name(path) for path in paths]
        if names:
            self.passed_over.setdefault(why, []).extend(names)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()


class ImageFolder:
    """An `ImageSource` of the images under a folder (`FolderListing`), each resized by its short side and cropped.

    Caches decoded, resized, uncropped images until `cache_bytes` is full; further images are decoded on each read.
    Reading an unreadable file raises UnreadableImageError. Warns of files that were passed over.
    """

    labels: npt.NDArray[np.int64] | None = None

    def __init__(
        self, root: Path, *, image_size: int, image_channels: int, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.name, self.root = str(root), root
        self.image_shape = (image_channels, image_size, image_size)
        listing = FolderListing(root)
        if not listing.files:
            raise UserError(_no_images(listing))
        if listing.passed_over:
            total = listing.total_passed_over
            passed_over = f"{total} file{'s' * (total > 1)} passed over: {listing.reasons}"
            warnings.warn(f"{root}: {len(listing.files)} images, {passed_over}.", stacklevel=2)
        self.files, self.names, self._folders = listing.files, listing.names, listing.folders
        self._contents: list[bytes] | None = None
        self._free_bytes = cache_bytes
        self._cache: dict[int, Pixels] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.files)

    def digest(self, without: Collection[str] = ()) -> str:
        """SHA-256 of every image's name, size and SHA-256, in order; of those in `without` only the name counts.

        Reads every file the first time. Raises OSError, naming the file, if one cannot be read.
        """
        if self._contents is None:
            self._contents = self._of_every_file("identifying the images", _size_and_sha256, self.files)
        sha = hashlib.sha256()
        for name, content in zip(self.names, self._contents, strict=True):
            sha.update(os.fsencode(name) + b"\0" + (b"" if name in without else content) + b"\n")
        return sha.hexdigest()

    def find_unreadable(self) -> list[str]:
        """Names of all images whose files are damaged now; reads every file, with threads."""

        def is_damaged(index: int) -> bool:
            try:
                read_image(self.files[index], self.image_shape[0])
            except UnreadableImageError as error:
                return error.is_damaged
            return False

        broken = self._of_every_file("reading every image", is_damaged, range(len(self)))
        return [name for name, fault in zip(self.names, broken, strict=True) if fault]

    def _of_every_file(self, title: str, function: Callable[[Any], Result], arguments: Sequence[Any]) -> list[Result]:
        """The function of every file, with threads; a bar shows if that takes a while and stderr is a terminal."""
        with ThreadPoolExecutor() as pool:
            results = pool.map(function, arguments)
            return list(tqdm(results, title, len(self), delay=2, disable=None, unit="file", leave=False))

    def would_read(self, folder: Path) -> bool:
        """Whether image files in this folder, which need not exist, would belong to the source."""
        folder = folder.resolve()
        for parent in (folder, *folder.parents):
            if parent.is_dir() and _identity(parent) in self._folders:
                return not any(map(is_hidden, folder.relative_to(parent).parts))
        return False

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        """uint8 [n, H, W, C]; `crop` [n, 2] in [0, 1) places each window (vertical, horizontal); default: centred."""
        channels, size, _ = self.image_shape
        places = np.full((len(indices), 2), 0.5) if crop is None else crop
        out = np.empty((len(indices), size, size, channels), np.uint8)
        for row, index in enumerate(indices.tolist()):
            out[row] = crop_square(self._resized(index), size, *places[row].tolist())
        return out

    def _resized(self, index: int) -> Pixels:
        cached = self._cache.get(index)
        if cached is not None:
            return cached
        channels, size, _ = self.image_shape
        pixels = resize_short_side(read_image(self.files[index], channels, self.names[index]), size)
        with self._lock:
            if index not in self._cache and pixels.nbytes <= self._free_bytes:
                self._cache[index] = pixels
                self._free_bytes -= pixels.nbytes
        return pixels


def _refuse(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    there = folder.stat()
    return there.st_dev, there.st_ino


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden or of the system."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise UserError(
            f"{path} links to {os.readlink(path)}, which cannot be reached; restore it, or remove the link "
            "for a new run."
        ) from error


def _size_and_sha256(path: Path) -> bytes:
    return f"{path.stat().st_size}\0{file_sha256(path)}".encode()


def _no_images(listing: FolderListing) -> str:
    total = listing.total_passed_over
    found = f"none of its {total} files is one: {listing.reasons}" if total else "it is empty"
    hint = ""
    if any("ubyte" in name for names in listing.passed_over.values() for name in names):
        hint = " Files of MNIST's kind are recognised as train-images-idx3-ubyte, with or without .gz."
    return f"{listing.root} has no images: {found}.{hint}"
