"""Atomic file writes, file hashes, paths as users type them. Every writer of the package uses this module."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from vaebm_fast.runtime.errors import UserError

LOST = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # answers of fsync for lost bytes; others are of mounts without fsync
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{32}\.tmp")


@contextlib.contextmanager
def replacing(path: str | Path, *, durable: bool = False, temporaries: Path | None = None) -> Iterator[Path]:
    """Yield a temporary file to write, then rename it to `path`. After an error `path` is unchanged.

    The temporary file is beside `path`. `durable` fsyncs the file before the rename and its folder after it, so a power
    cut loses nothing. temporaries: a folder on the same disk for the temporary file, which the caller clears.
    If `path` is a symbolic link, its target is replaced. Raises OSError, which names `path`; also if it is a folder, a
    device or a pipe.
    """
    path = Path(os.path.realpath(path))
    _require_file(path)
    temporary = _temporary(path, temporaries)
    try:
        with naming(path, temporary):
            temporary.touch(exist_ok=False)
            mode = temporary.stat().st_mode
            yield temporary
            with contextlib.suppress(OSError):  # some mounts refuse it
                temporary.chmod(mode)  # safetensors makes files private to their owner; restore the umask's mode
            if durable:
                sync(temporary)
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    if durable:
        _sync_entry(path)


def require_writable(path: str | Path) -> None:
    """Raise OSError, which names `path`, unless a file can be written there. Call it before the work of a result."""
    path = Path(os.path.realpath(path))
    _require_file(path)
    temporary = _temporary(path)
    with naming(path, temporary):
        temporary.touch(exist_ok=False)
        temporary.unlink()


def _require_file(path: Path) -> None:
    """Raise OSError if something that is not a file stands at `path`."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "Is a device or a pipe, not a file", str(path))


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed left in a folder; call it where no other process writes."""
    for path in folder.iterdir():
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _temporary(path: Path, folder: Path | None = None) -> Path:
    return (folder or path.parent) / f".{path.name[:40]}.{uuid4().hex}.tmp"  # names have at most 255 bytes


@contextlib.contextmanager
def naming(path: Path, *others: Path) -> Iterator[None]:
    """Let an OSError raised inside name `path`, where it names no file or one of `others`."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename) in map(str, others):
            error.filename = str(path)
            with contextlib.suppress(AttributeError):
                del error.filename2  # of a rename; None would be printed
        raise


def write(path: str | Path, data: bytes | str, *, durable: bool = False, temporaries: Path | None = None) -> str:
    """Write a file atomically and return its SHA-256. Text is UTF-8; other arguments as in `replacing`."""
    data = data.encode() if isinstance(data, str) else data
    with replacing(path, durable=durable, temporaries=temporaries) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def append(path: Path, data: bytes) -> None:
    """Append `data` to a file and wait until it is on the disk."""
    with naming(path), path.open("ab") as file:
        file.write(data)
        file.flush()
        _fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk, if its file system offers that."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # some mounts need the right to write
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in LOST:
            raise


def _sync_entry(path: Path) -> None:
    """Sync the folder of a file that has just been renamed. The file is complete, so a failure is only a warning."""
    try:
        sync(path.parent)
    except PermissionError:
        pass  # a folder that may be written to but not read
    except OSError as error:
        warnings.warn(f"{path} is written, but a power cut may still undo it ({error.strerror}).", stacklevel=3)


def expanded(path: str) -> Path:
    """The path with `~` expanded, which the shell does not do in --out=~/x. Raises UserError if it is empty."""
    if not path:
        raise UserError("A path is empty; is a shell variable not set?")
    return Path(os.path.expanduser(path))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of the file's bytes, as `sha256sum` prints it."""
    sha = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
