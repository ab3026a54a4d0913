"""Atomic file writes and file hashes. Every writer of the package uses this module."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False, temporaries: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to write, then rename it to `path`. After an error `path` is unchanged.

    The temporary file is beside `path`. `durable` fsyncs the file before the rename and its folder after it, so a power
    cut loses nothing. temporaries: a folder on the same disk for the temporary file, which the caller clears.
    If `path` is a symbolic link, its target is replaced. Raises OSError, with `path` as its file name if it had none.
    """
    path = Path(os.path.realpath(path))
    temporary = (temporaries or path.parent) / f".{path.name}.{uuid4().hex}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files private to their owner; restore the umask's mode
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write(path: str | Path, data: bytes | str, *, durable: bool = False, temporaries: Path | None = None) -> str:
    """Write a file atomically and return its SHA-256. Text is UTF-8; other arguments as in `replacing`."""
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, durable=durable, temporaries=temporaries) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file and wait until it is on the disk."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as `sha256sum` prints it."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
