"""Opens the container at a path: says what it is by its content, and which part of it is the split."""

from __future__ import annotations

import os
import re
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from vaebm_fast.data.containers import arrays
from vaebm_fast.data.containers.archives import TarImages, ZipImages
from vaebm_fast.data.containers.base import Container, is_hidden
from vaebm_fast.data.containers.folder import FolderListing, ImageFolder, no_images
from vaebm_fast.data.containers.lmdb_store import FILE as LMDB_FILE
from vaebm_fast.data.containers.lmdb_store import LmdbImages
from vaebm_fast.data.containers.tfrecord import TFRecordImages
from vaebm_fast.data.images import EXTENSIONS
from vaebm_fast.runtime.errors import UserError

Split = Literal["train", "held_out"]

TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("held_out", "validation", "val", "valid", "test", "testing")
KINDS = {  # ending of a container: its kind
    ".zip": "zip",
    ".tar": "tar",
    ".tfrecord": "tfrecord",
    ".tfrecords": "tfrecord",
    ".npz": "npz",
    ".npy": "npy",
    ".mat": "mat",
    ".lmdb": "lmdb",
    ".mdb": "lmdb",
}
READ = (
    "a folder of images, a zip or tar archive, an LMDB database, TFRecord files, .npy, .npz, SVHN's .mat, CIFAR, MNIST"
)
RESOLUTION = re.compile(r"-r(\d\d)(?:-s-(\d{4})-of-(\d{4}))?\.tfrecords?$")
CELEBA_PARTITION = "list_eval_partition.txt"  # CelebA's published split: image file, then 0 train, 1 validation, 2 test


class MissingDataError(UserError, FileNotFoundError):
    """The requested data does not exist."""


class NoHeldOutError(MissingDataError):
    """The data has no held-out split."""

    def __init__(self, path: Path, message: str | None = None) -> None:
        super().__init__(
            message
            or f"{path} has no held-out images. Split it into the folders train and {' or '.join(HELD_OUT_NAMES)}, or "
            "read the training images (--split train)."
        )


def open_container(path: Path, split: Split, image_size: int) -> Container:
    """The images of the split at a path, a file or folder; READ lists what is recognised.

    image_size: which of several resolutions of TFRecord files is read. A folder with a `train` beside a `held_out`,
    `validation`, `val`, `valid` or `test`, as folders or in the names of its files, has two splits; anything else is
    one of training images. Raises UserError, naming the path, for what is missing, empty, damaged or not recognised.
    """
    if path.is_file():
        if split == "held_out":
            raise NoHeldOutError(path)
        return _open_files(path, kind_of(path), [path])
    layout = _cifar(path)
    if layout is not None:
        return arrays.cifar_images(*layout, split)
    if (path / LMDB_FILE).is_file():
        if split == "held_out":
            raise NoHeldOutError(path)
        return LmdbImages(path)
    part = _folder_of_split(path, split)
    if part is not None:
        return open_container(part, "train", image_size)
    listing = FolderListing(path)
    return _folder(listing, split) if listing.files else _containers_in(listing, split, image_size)


def kind_of(path: Path) -> str:
    """What kind of container a file is, by its content. Raises UserError if it is none."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(b"MATLAB 5.0") or head.startswith(b"MATLAB 7.3"):
        return "mat"
    if head[16:20] == b"\xde\xc0\xef\xbe":
        return "lmdb"
    if head.startswith(b"PK"):
        return "npz" if path.suffix.lower() == ".npz" else "zip"
    kind = KINDS.get(path.suffix.lower())
    if kind == "tfrecord" or (kind == "tar" and not head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))):
        return kind
    if not head:
        raise UserError(f"{path} is empty.")
    if tarfile.is_tarfile(path) and head[257:262] == b"ustar":
        return "tar"
    if path.suffix.lower() in EXTENSIONS:
        raise UserError(f"{path} is one image; give the folder that contains the images.")
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
        raise UserError(f"{path} is compressed; unpack it first, because images are read in any order.")
    raise UserError(f"{path} is not recognised. Give {READ}.")


def _open_files(path: Path, kind: str, files: Sequence[Path]) -> Container:
    """The container of these files, all of one kind; `path` is what the user named."""
    if kind == "tar":
        return TarImages(path, files)
    if kind == "tfrecord":
        return TFRecordImages(path, files)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise UserError(f"{path} holds several data sets: {names}. Name one of them.")
    openers: dict[str, Callable[[Path], Container]] = {
        "zip": ZipImages,
        "lmdb": LmdbImages,
        "npy": arrays.npy_images,
        "npz": arrays.npz_images,
        "mat": arrays.svhn_images,
    }
    return openers[kind](files[0])


def _cifar(root: Path) -> tuple[Path, str] | None:
    """The folder with CIFAR's files, `root` or one in it, and their layout."""
    folders = [root, *(root / layout for layout in arrays.CIFAR_BATCHES)]
    found = [(folder, layout) for folder in folders if (layout := arrays.cifar_layout(folder)) is not None]
    if len(found) > 1 and found[0][0] != root:
        names = ", ".join(str(folder) for folder, _ in found)
        raise UserError(f"{root} holds several data sets: {names}. Name one of these folders.")
    return found[0] if found else None


def _folder_of_split(root: Path, split: Split) -> Path | None:
    """The folder of the split, if `root` has a folder train and one for held-out images; warns of what lies beside."""
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): entry.name for entry in entries if os.path.isdir(entry)}
    found = [
        next((folders[name] for name in names if name in folders), None) for names in (TRAIN_NAMES, HELD_OUT_NAMES)
    ]
    train, held_out = (None if name is None else root / name for name in found)
    if train is None or held_out is None:
        return None
    chosen = train if split == "train" else held_out
    with os.scandir(root) as entries:
        left_out = sorted(
            entry.name
            for entry in entries
            if entry.name not in (train.name, held_out.name)
            if os.path.isdir(entry) or Path(entry.name).suffix.lower() in EXTENSIONS
            if not is_hidden(entry.name)
        )
    if left_out:
        warnings.warn(
            f"{root}: only {chosen.name}/ is read; {len(left_out)} folders and images beside it are left out, such as "
            f"{left_out[0]}.",
            stacklevel=3,
        )
    return chosen


def _folder(listing: FolderListing, split: Split) -> ImageFolder:
    """A folder of images, split by CelebA's partition file in it or beside it, if there is one."""
    folders = (listing.root, listing.root.parent)
    partition = next((path for folder in folders if (path := folder / CELEBA_PARTITION).is_file()), None)
    if partition is None:
        if split == "held_out":
            raise NoHeldOutError(listing.root)
        return ImageFolder(listing)
    parts = dict(line.split() for line in partition.read_text(errors="replace").splitlines() if len(line.split()) == 2)
    wanted = {"train": "0", "held_out": "1"}[split]
    there = {name.rpartition("/")[2] for name in listing.names}
    missing = sorted(name for name, part in parts.items() if part == wanted and name not in there)
    if missing:
        warnings.warn(
            f"{listing.root} lacks {len(missing)} of the images that {partition.name} puts into this split, such as "
            f"{missing[0]}.",
            stacklevel=4,
        )
    return ImageFolder(listing, only=lambda name: parts.get(name.rpartition("/")[2]) == wanted, by=partition)


def _containers_in(listing: FolderListing, split: Split, image_size: int) -> Container:
    """The containers in a folder without images, of which all must be of one kind."""
    root = listing.root
    with os.scandir(root) as entries:
        paths = [
            Path(entry.path) for entry in sorted(entries, key=lambda entry: entry.name) if not is_hidden(entry.name)
        ]
    kinds: dict[str, list[Path]] = {}
    for path in paths:
        ending = ".mdb" if (path / LMDB_FILE).is_file() else path.suffix.lower() if path.is_file() else ""
        kind = KINDS.get(ending)
        if kind is not None:
            kinds.setdefault(kind, []).append(path)
    if not kinds:
        raise UserError(no_images(listing))
    if len(kinds) > 1:
        found = "; ".join(f"{len(files)} {kind}, such as {files[0].name}" for kind, files in kinds.items())
        raise UserError(f"{root} holds containers of several kinds: {found}. Name one of them.")
    [(kind, files)] = kinds.items()
    chosen = _of_split(root, files, split)
    if kind == "tfrecord":
        chosen = _of_resolution(root, chosen, image_size)
    return _open_files(chosen[0] if len(chosen) == 1 else root, kind, chosen)


def _of_split(root: Path, paths: list[Path], split: Split) -> list[Path]:
    """The paths whose names say the split (train-0.tar, church_outdoor_val_lmdb); all are of train if none does."""

    def named(name: str) -> list[Path]:
        return [path for path in paths if re.search(rf"(^|[^a-z]){name}([^a-z]|$)", path.name.lower())]

    train = next((found for name in TRAIN_NAMES if (found := named(name))), [])
    others = [[path for path in named(name) if path not in train] for name in HELD_OUT_NAMES]
    held_out = next((found for found in others if found), [])
    if not train or not held_out:
        if split == "held_out":
            raise NoHeldOutError(root)
        return paths
    left_out = sorted(path.name for path in set(paths) - set(train) - set(held_out))
    if left_out:
        warnings.warn(f"{root}: {', '.join(left_out[:3])} belong to no split and are left out.", stacklevel=4)
    return train if split == "train" else held_out


def _of_resolution(root: Path, files: list[Path], image_size: int) -> list[Path]:
    """Of files for several resolutions those of `image_size`, else of the next larger one, else of the largest.

    Raises UserError if one of several numbered files is missing.
    """
    marks = {file: match for file in files if (match := RESOLUTION.search(file.name))}
    if len(marks) < len(files):
        return files
    sides = sorted({2 ** int(match[1]) for match in marks.values()})
    side = next((side for side in sides if side >= image_size), sides[-1])
    chosen = [file for file, match in marks.items() if 2 ** int(match[1]) == side]
    totals = {match[3] for file in chosen if (match := marks[file])[3]}
    for total in totals:
        there = {int(marks[file][2]) for file in chosen if marks[file][3] == total}
        missing = sorted(set(range(int(total))) - there)
        if missing:
            raise UserError(f"{root} lacks {len(missing)} of {int(total)} TFRecord files, such as number {missing[0]}.")
    return chosen
