"""Files that are there whole or not at all, and their hashes. Every writer of the package uses this module."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False, temporaries: Path | None = None) -> Iterator[Path]:
    """A temporary file to write; then `path` is the whole of it. After an error `path` is what it was before.

    Writes beside `path` and renames; with `durable`, fsync of the file before and of its folder after, so that a power
    cut loses nothing. temporaries: a folder on the same disk to write in instead, for a caller that clears it.
    A symbolic link goes on pointing at what is written. Raises OSError, which names `path` where it named no file.
    """
    path = Path(os.path.realpath(path))
    temporary = (temporaries or path.parent) / f".{path.name}.{uuid4().hex}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files private to their owner; the umask decides here
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
    """Write a file whole; its SHA-256. Text is UTF-8; the rest is as in `replacing`."""
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, durable=durable, temporaries=temporaries) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def append(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file, and wait until it is on the disk."""
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
