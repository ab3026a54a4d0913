"""A flat or nested folder of image files."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from itertools import compress
from pathlib import Path

from vaebm_fast.config import Transform
from vaebm_fast.data.containers.archives import LABELS_FILE, labels_of
from vaebm_fast.data.containers.base import HIDDEN, NO_IMAGE, Labels, is_hidden, require_size, summary
from vaebm_fast.data.images import EXTENSIONS
from vaebm_fast.runtime.errors import UserError

SPECIAL, TWICE, NOWHERE = (
    "not regular files",
    "links to folders that are read already",
    "links to what cannot be reached",
)


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
        return summary(self.passed_over)

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
    """The image files under a folder (`FolderListing`) as a `Container`.

    only: which of its names belong to it, as the file `by` says; default: all. Raises UserError if none does.
    """

    labels: Labels | None
    transform: Transform = "square"
    is_encoded = True

    def __init__(
        self, listing: FolderListing, *, only: Callable[[str], bool] | None = None, by: Path | None = None
    ) -> None:
        self.path = listing.root
        if not listing.files:
            raise UserError(no_images(listing))
        chosen = [only is None or only(name) for name in listing.names]
        self.names = list(compress(listing.names, chosen))
        self.files = list(compress(listing.files, chosen))
        if not self.files:
            raise UserError(
                f"{self.path} has no images of this split: {by} puts none of its {len(chosen)} images there."
            )
        self.labels = None
        described = listing.root / LABELS_FILE
        if described.is_file():
            self.labels = labels_of(described.read_bytes(), self.names, str(described))
        known = {LABELS_FILE, *([] if by is None else [by.name])}
        others = {why: [name for name in names if name not in known] for why, names in listing.passed_over.items()}
        self.passed_over = {why: names for why, names in others.items() if names}
        self._folders = listing.folders

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        path = self.files[index]
        require_size(path.stat().st_size)
        return path.read_bytes()

    def where(self, index: int) -> str:
        """The file's path."""
        return str(self.files[index])

    def would_read(self, folder: Path) -> bool:
        """Whether image files in this folder, which need not exist, would belong to the source."""
        folder = folder.resolve()
        for parent in (folder, *folder.parents):
            if parent.is_dir() and _identity(parent) in self._folders:
                return not any(map(is_hidden, folder.relative_to(parent).parts))
        return False


def _refuse(error: OSError) -> None:
    raise error


def _identity(folder: Path) -> tuple[int, int]:
    there = folder.stat()
    return there.st_dev, there.st_ino


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as error:
        raise UserError(
            f"{path} links to {os.readlink(path)}, which cannot be reached; restore it, or remove the link "
            "for a new run."
        ) from error


def no_images(listing: FolderListing) -> str:
    """The message for a folder without images."""
    total = listing.total_passed_over
    found = f"none of its {total} files is one: {listing.reasons}" if total else "it is empty"
    hint = ""
    if any("ubyte" in name for names in listing.passed_over.values() for name in names):
        hint = " Files of MNIST's kind are recognised as train-images-idx3-ubyte, with or without .gz."
    return f"{listing.root} has no images: {found}.{hint}"
