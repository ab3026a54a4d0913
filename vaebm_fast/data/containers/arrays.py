"""Arrays of raw images: npy, npz, SVHN's .mat, and CIFAR-10 and CIFAR-100 in Python's and the binary layout."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickletools import genops
from typing import Any

import numpy as np
import numpy.typing as npt

from vaebm_fast.data.containers.base import ByPosition, StoredArray
from vaebm_fast.data.images import Pixels
from vaebm_fast.runtime.errors import UserError

CIFAR_BATCHES = {  # layout: split: files
    "cifar-10-batches-py": {"train": [f"data_batch_{index}" for index in range(1, 6)], "held_out": ["test_batch"]},
    "cifar-10-batches-bin": {
        "train": [f"data_batch_{index}.bin" for index in range(1, 6)],
        "held_out": ["test_batch.bin"],
    },
    "cifar-100-python": {"train": ["train"], "held_out": ["test"]},
    "cifar-100-binary": {"train": ["train.bin"], "held_out": ["test.bin"]},
}
CIFAR_LABELS = {"cifar-10-batches-py": b"labels", "cifar-100-python": b"fine_labels"}
CIFAR_LABEL_BYTES = {"cifar-10-batches-bin": 1, "cifar-100-binary": 2}  # the last one is the (fine) class
CIFAR_BYTES = 3 * 32 * 32


def npy_images(path: Path) -> StoredArray:
    """The array of an .npy file, mapped: uint8 [N, H, W, C] or [N, H, W]."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers raise many types
        raise UserError(f"{path} cannot be read as an .npy file of numbers ({error}).") from error
    return MappedArray(path, _as_images(images, str(path)))


class MappedArray(StoredArray):
    """The images of a mapped file. Reading where a file was cut off would end the process, so its size is checked."""

    def __init__(self, path: Path, images: Pixels) -> None:
        super().__init__(path, images)
        self._file = ByPosition(path)

    def read(self, index: int) -> Pixels:
        """uint8 [H, W, C]. Raises OSError if the file has changed since it was opened."""
        self._file.read(0, 1)
        return self.images[index]


def npz_images(path: Path) -> StoredArray:
    """The images of an .npz file: `arr_0`, or its only array of uint8 with three or four dimensions."""
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {name.removesuffix(".npy"): _header(archive, name) for name in archive.namelist()}
            name = _chosen(path, headers)
            with np.load(path, allow_pickle=False) as arrays:
                images = arrays[name]
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit in memory; save its images as .npy, which is read in parts.") from error
    except Exception as error:  # damaged archives and headers raise many types
        raise UserError(f"{path} cannot be read as an .npz file of numbers ({error}).") from error
    return StoredArray(path, _as_images(images, f"{path}, array {name}"))


def svhn_images(path: Path) -> StoredArray:
    """SVHN's cropped digits: `X` uint8 [32, 32, 3, N] and `y` [N, 1] with 10 for the digit 0, of a MATLAB 5 file."""
    from scipy.io import loadmat

    try:
        found = loadmat(path, variable_names=("X", "y"))
    except Exception as error:  # damaged files raise many types
        why = "it is of MATLAB 7.3, which is HDF5" if isinstance(error, NotImplementedError) else error or type(error)
        raise UserError(f"{path} cannot be read as a MATLAB 5 file ({why}).") from error
    images = found.get("X")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[2] != 3:
        raise UserError(f"{path} is not SVHN's cropped digits: it lacks X, uint8 [32, 32, 3, N].")
    labels = found.get("y")
    if labels is not None and (labels.dtype.kind not in "iuf" or not np.isin(labels, range(11)).all()):
        raise UserError(f"{path}: its classes y are not whole numbers from 1 to 10.")
    classes = None if labels is None else labels.ravel().astype(np.int64) % 10
    return StoredArray(path, _as_images(images.transpose(3, 0, 1, 2), f"{path}, array X"), classes)


def cifar_layout(folder: Path) -> str | None:
    """Which layout of CIFAR_BATCHES the folder has; None if none."""
    for layout, splits in CIFAR_BATCHES.items():
        names = [name for names in splits.values() for name in names]
        marks = {"cifar-100-python": ["meta"]}.get(layout, [])
        if any((folder / name).is_file() for name in names) and all((folder / mark).is_file() for mark in marks):
            return layout
    return None


def cifar_images(folder: Path, layout: str, split: str) -> StoredArray:
    """CIFAR-10 or CIFAR-100: uint8 [N, 32, 32, 3] of the split's files, and classes (of CIFAR-100 the fine ones)."""
    names = CIFAR_BATCHES[layout][split]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} lacks {', '.join(missing)}; the {split} split needs {', '.join(names)}.")
    if layout in CIFAR_LABELS:
        parts = [_pickled_batch(folder / name, CIFAR_LABELS[layout]) for name in names]
    else:
        parts = [_binary_batch(folder / name, CIFAR_LABEL_BYTES[layout]) for name in names]
    planes, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return StoredArray(folder, planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels)


def _pickled_batch(path: Path, key: bytes) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """(uint8 [n, 3072], classes [n]) of a pickled batch, of which only arrays, bytes and plain values are loaded."""
    try:
        content = path.read_bytes()
        if any(
            isinstance(value, int) and "PUT" in opcode.name and value > len(content)
            for opcode, value, _ in genops(content)
        ):
            raise pickle.UnpicklingError("it would fill the memory")  # which grows with the number of a memo
        batch = _PlainUnpickler(io.BytesIO(content), encoding="bytes").load()
        batch = {name if isinstance(name, bytes) else str(name).encode(): value for name, value in batch.items()}
        planes, labels = batch[b"data"], np.array(batch[key], np.int64)
    except Exception as error:  # damaged pickles raise almost any type
        why = f"it lacks {error}" if isinstance(error, KeyError) else error or type(error).__name__
        raise UserError(f"{path} cannot be read as a batch of CIFAR images ({why}).") from error
    if not isinstance(planes, np.ndarray) or planes.dtype != np.uint8 or planes.shape != (len(labels), CIFAR_BYTES):
        raise UserError(f"{path} is no batch of CIFAR images: its data are not uint8 [{len(labels)}, {CIFAR_BYTES}].")
    return planes, labels


def _binary_batch(path: Path, label_bytes: int) -> tuple[Pixels, npt.NDArray[np.int64]]:
    data = np.fromfile(path, np.uint8)
    rows, rest = divmod(len(data), label_bytes + CIFAR_BYTES)
    if rest or not rows:
        raise UserError(
            f"{path} has {len(data):,} bytes, which is no multiple of {label_bytes + CIFAR_BYTES}, the bytes of an "
            "image of CIFAR and its classes; it is truncated or of another kind."
        )
    table = data.reshape(rows, -1)
    return table[:, label_bytes:], table[:, label_bytes - 1].astype(np.int64)


class _PlainUnpickler(pickle.Unpickler):
    """Loads plain values, bytes and numpy arrays of numbers; whatever else a pickle would call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _empty_array
        if (module, name) == ("numpy", "dtype"):
            return _dtype_of_numbers
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"  # only named to _reconstruct; to call it could take any amount of memory
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it would call {module}.{name}, which is not loaded for safety")


def _empty_array(*_: Any) -> npt.NDArray[Any]:
    """What an array's pickled state is then set on; the arguments could ask for any amount of memory."""
    return np.empty(0, np.uint8)


def _dtype_of_numbers(name: Any, *_: Any) -> np.dtype[Any]:
    kind = np.dtype(name.decode() if isinstance(name, bytes) else name)
    if kind.kind not in "biuf":
        raise pickle.UnpicklingError(f"it has an array of {kind}, not of numbers")
    return kind


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes in protocol 2."""
    return text.encode("latin1")


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an array in an .npz file, without its data."""
    with archive.open(name) as file:
        head = io.BytesIO(file.read(1 << 16))
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(head)](head)
    return shape, dtype


def _chosen(path: Path, headers: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    """The name of the array of images."""
    images = [name for name, (shape, dtype) in headers.items() if dtype == np.uint8 and len(shape) in (3, 4)]
    if "arr_0" in images:
        return "arr_0"
    if len(images) != 1:
        shown = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in headers.items()) or "nothing"
        problem = "has several arrays of images" if images else "has no array of images, uint8 [N, H, W, C]"
        raise UserError(f"{path} {problem}: {shown}. Save the images alone, or as arr_0.")
    return images[0]


def _as_images(images: npt.NDArray[Any], where: str) -> Pixels:
    """uint8 [N, H, W, C]; raises UserError for any other array."""
    shown = f"{where} is {images.dtype}{list(images.shape)}"
    if images.dtype != np.uint8:
        raise UserError(f"{shown}; images are uint8 [N, H, W, C], with values of 0 to 255.")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape[1:]:
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        hint = " Its channels come first: transpose it to (0, 2, 3, 1)." if first else ""
        raise UserError(f"{shown}; images are uint8 [N, H, W, C] with 1 or 3 channels, or [N, H, W].{hint}")
    return images
