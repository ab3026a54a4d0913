"""A job's folder: where everything lies, one job at a time, and files that are there whole or not at all.

manifest.json  summary.json   what was asked, what it took
000000/000123.png, or samples.zip, samples-00000.tar, samples.npz, samples.npy
.job/                         lock, journals, parts of a file to come, temporaries
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from vaebm_fast.runtime import files
from vaebm_fast.runtime.errors import AGAIN, UserError

STATE = ".job"
PARTS = f"{STATE}/parts"


class SamplingError(UserError):
    """A job that cannot start, go on, or end well; the message is one line for the user."""


class Folder:
    """The folder `out` of a job; names are relative to it. OSErrors become SamplingErrors that name the file."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = out / STATE
        self._temporaries = self.state / "tmp"
        self._lock: int | None = None

    def prepare(self) -> None:
        """Make the folder and take its lock; clear what a killed job left half written.

        Raises SamplingError where another job is at work, and where the folder holds what no job wrote.
        """
        with self.naming(self.out):
            foreign = [entry.name for entry in self.out.iterdir() if entry.name != STATE] if self.out.exists() else []
            if foreign and not (self.out / "manifest.json").exists():
                raise SamplingError(
                    f"{self.out} holds {sorted(foreign)[0]}, which no sampling job wrote; name another folder."
                )
            self.state.mkdir(parents=True, exist_ok=True)
        self._take_lock(fcntl.LOCK_EX)
        with self.naming(self._temporaries):
            shutil.rmtree(self._temporaries, ignore_errors=True)
            self._temporaries.mkdir(exist_ok=True)  # NFS keeps a removed file while someone has it open

    def share(self) -> None:
        """Hold the lock together with the other processes of this job: as long as one lives, no other job begins."""
        self._take_lock(fcntl.LOCK_SH)

    def release(self) -> None:
        """Give the lock up."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self, kind: int) -> None:
        path = self.state / "lock"
        with self.naming(path):
            if self._lock is None:
                self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                holder = path.read_text() or "another process"
                self.release()
                raise SamplingError(f"{self.out} is being written by {holder}; wait for it, or stop it.") from error
            if kind == fcntl.LOCK_EX:
                os.ftruncate(self._lock, 0)
                os.pwrite(self._lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    @contextlib.contextmanager
    def replacing(self, name: str, *, durable: bool = False) -> Iterator[Path]:
        """A temporary to write; then `name` is the whole of it. After an error it is what it was before.

        durable: after a power cut too. Pictures and parts are not: one that is gone is missed by its hash.
        """
        path = self.out / name
        with self.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path, durable=durable, temporaries=self._temporaries) as temporary:
                yield temporary

    def write(self, name: str, data: bytes, *, durable: bool = False) -> str:
        """Write a file whole; its SHA-256. durable: as in `replacing`."""
        path = self.out / name
        with self.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return files.write(path, data, durable=durable, temporaries=self._temporaries)

    def write_json(self, name: str, value: object) -> None:
        """Write JSON whole and durable."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode(), durable=True)

    def is_intact(self, name: str, sha256: str) -> bool:
        """Whether the file is there with this content."""
        try:
            return files.file_sha256(self.out / name) == sha256
        except OSError:
            return False

    def free_bytes(self) -> int:
        """What the disk still takes."""
        return shutil.disk_usage(self.state).free

    @contextlib.contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Inside, an OSError becomes a SamplingError that names `path`."""
        try:
            yield
        except OSError as error:
            raise SamplingError(f"{path}: {error.strerror or error}; when that is mended, {AGAIN}.") from error
