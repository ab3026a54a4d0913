"""Our file format: safetensors with all other values as JSON in its metadata, written atomically with a hash.

Owns the format, its detection from content, and the SHA-256 check on load. `runtime.files` writes files atomically;
`networks` and `nested` define what the tensors mean.

The metadata has one entry, `vaebm_fast`: the SHA-256 of JSON text and tensors, a space, the JSON text. A single entry
keeps files reproducible, because safetensors does not fix the order of several.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vaebm_fast.config import plain
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import replacing

Kind = Literal["nvae", "energy", "training"]
Layout = Literal["vaebm-fast", "published"]

FORMAT_VERSION = 1


class CheckpointError(UserError):
    """A checkpoint cannot be read or written; the message is one line for the user."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Convert ValueError and OSError raised in the body to CheckpointError prefixed with the file name."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error


def layout(path: Path) -> Layout:
    """Layout of a file, from its first bytes; unrecognised content counts as published.

    Raises CheckpointError if the file is missing, empty, a folder, a web page or a git-lfs pointer.
    """
    with naming(path):
        if not path.exists():
            raise CheckpointError("there is no such file.")
        if not path.is_file():
            raise CheckpointError("this is a folder or a device, not a checkpoint file.")
        with path.open("rb") as file:
            head = file.read(256)
        if not head:
            raise CheckpointError("the file is empty; it was not written or downloaded completely.")
        if head[4:9] == b"\0\0\0\0{":  # safetensors: a 64-bit length, then a JSON object
            return "vaebm-fast"
        if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
            raise CheckpointError("this is a web page (HTML or XML), not a checkpoint; download the file itself.")
        if head.startswith(b"version https://git-lfs"):
            raise CheckpointError("this is a git-lfs pointer, not the checkpoint; fetch the file with `git lfs pull`.")
    return "published"


def save(path: str | Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors and `meta` (JSON values including `kind`) atomically to `path`.

    Raises CheckpointError if the disk is full or the folder is not writable; the old file then stays unchanged and no
    temporary file remains.
    """
    try:
        text = json.dumps({**meta, "format_version": FORMAT_VERSION}, sort_keys=True, default=_jsonable)
    except TypeError as error:  # a key
        raise CheckpointError(f"{path}: information about a checkpoint must be JSON values ({error}).") from error
    stored = _storable(tensors)
    try:
        with replacing(path, durable=True) as temporary:
            save_file(stored, temporary, {"vaebm_fast": f"{digest(stored, text)} {text}"})
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(f"{path}: could not be written ({why}); any previous file is unchanged.") from error


def _jsonable(value: Any) -> Any:
    """NumPy's and torch's scalars and arrays as Python's."""
    known = plain(value)
    if known is value:
        raise CheckpointError(f"Information about a checkpoint must be JSON values, but {value!r} is none.")
    return known


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors (on the CPU) and meta, as passed to `save`.

    Raises CheckpointError if the file is truncated, differs in any bit, or was not written by `save`.
    """
    path = Path(path)
    if layout(path) != "vaebm-fast":
        raise CheckpointError(
            f"{path}: this was not written by vaebm-fast; `vaebm-fast convert` reads published files."
        )
    with naming(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
        except SafetensorError as error:
            raise CheckpointError(f"the file is truncated or damaged ({error}); restore or redownload it.") from error
        if set(metadata) != {"vaebm_fast"}:
            raise CheckpointError(
                "this is a safetensors file, but vaebm-fast did not write it: its metadata is missing."
            )
        sha256, _, text = metadata["vaebm_fast"].partition(" ")
        if digest(tensors, text) != sha256:
            raise CheckpointError("the file is damaged: it does not match its SHA-256; restore it from a copy.")
        meta = json.loads(text)
        if meta.pop("format_version") > FORMAT_VERSION:
            raise CheckpointError("this file was written by a newer vaebm-fast; update vaebm-fast to read it.")
    return tensors, meta


def digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of `text`, then of each tensor sorted by name: a JSON line of name, dtype and shape, then its bytes."""
    sha = hashlib.sha256(json.dumps(text).encode() + b"\n")
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        sha.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors requires."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return stored
