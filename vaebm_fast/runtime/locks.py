"""Locks that admit one command at a time to a folder. The kernel releases them when a process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from vaebm_fast.runtime.errors import UserError


class LockedError(UserError):
    """Another process holds the lock; the message names it."""


class Lock:
    """A lock on the folder `folder`, by flock on its file `path`, which stays there unlocked afterwards.

    Where the file system refuses to lock, `take` warns and locks nothing. As a context manager: exclusive inside.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        self._descriptor: int | None = None

    def take(self, *, shared: bool = False) -> None:
        """Take the lock, or turn it from exclusive to shared. Raises LockedError if it is held, OSError otherwise."""
        if self._descriptor is None:
            self._descriptor = _opened(self._path)
        try:
            fcntl.flock(self._descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._path.read_text(errors="replace") or "another process"
            self.release()
            raise LockedError(f"{self._folder} is being written by {holder}; wait for it, or stop it.") from error
        except OSError as error:
            if not shared:
                warnings.warn(
                    f"{self._folder} is on a file system that refuses to lock it ({error.strerror}); make sure that no "
                    "other command writes there at the same time.",
                    stacklevel=3,
                )
        if not shared:
            with suppress(OSError):  # a full disk: the text only tells who holds the lock
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Release the lock if it is held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Lock:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _opened(path: Path) -> int:
    """The file of a lock, made if it is missing; to be read only if another user made it."""
    try:
        return os.open(str(path), os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:
        if not path.exists():
            raise
        return os.open(path, os.O_RDONLY)
