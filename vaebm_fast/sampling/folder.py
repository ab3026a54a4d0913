"""A job's folder: its layout, a lock that admits one job at a time, and atomic file writes.

manifest.json  summary.json   settings; results and timing
000000/000123.png (flat: 000123.png), or samples.zip, samples-00000.tar, samples.npz, samples.npy
.job/                         lock, journals, parts of unfinished files, temporaries
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from vaebm_fast.runtime import files
from vaebm_fast.runtime.errors import AGAIN, UserError
from vaebm_fast.runtime.locks import Lock

STATE = ".job"
PARTS = f"{STATE}/parts"


class SamplingError(UserError):
    """A job cannot start, continue or complete; the message is one line for the user."""


class Folder:
    """The folder `out` of a job; names are relative to it. OSErrors become SamplingErrors that name the file."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.state = out / STATE
        self._temporaries = self.state / "tmp"
        self._lock = Lock(self.state / "lock", out)

    def prepare(self) -> None:
        """Make the folder, take its exclusive lock and delete temporaries of a killed job.

        Raises LockedError if another job holds the lock, SamplingError if the folder holds files that no job wrote.
        """
        with self.naming(self.out):
            foreign = [entry.name for entry in self.out.iterdir() if entry.name != STATE] if self.out.exists() else []
            if foreign and not (self.out / "manifest.json").exists():
                raise SamplingError(
                    f"{self.out} holds {sorted(foreign)[0]}, which no sampling job wrote; name another folder."
                )
            self.state.mkdir(parents=True, exist_ok=True)
        with self.naming(self.state):
            self._lock.take()
        with self.naming(self._temporaries):
            shutil.rmtree(self._temporaries, ignore_errors=True)
            self._temporaries.mkdir(exist_ok=True)  # exist_ok: NFS keeps a removed file that is still open

    def share(self) -> None:
        """Hold a shared lock with the other processes of this job: no other job starts while one of them runs."""
        with self.naming(self.state):
            self._lock.take(shared=True)

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    @contextlib.contextmanager
    def replacing(self, name: str, *, durable: bool = False) -> Iterator[Path]:
        """Yield a temporary file that atomically replaces `name`; on an error `name` is unchanged.

        durable: fsync, to survive a power cut. Images and parts skip it: their SHA-256 reveals a loss.
        """
        path = self.out / name
        with self.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with files.replacing(path, durable=durable, temporaries=self._temporaries) as temporary:
                yield temporary

    def write(self, name: str, data: bytes, *, durable: bool = False) -> str:
        """Write a file atomically; returns its SHA-256. durable: as in `replacing`."""
        path = self.out / name
        with self.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return files.write(path, data, durable=durable, temporaries=self._temporaries)

    def write_json(self, name: str, value: object) -> None:
        """Write JSON atomically and durably."""
        self.write(name, (json.dumps(value, indent=2) + "\n").encode(), durable=True)

    def is_intact(self, name: str, sha256: str) -> bool:
        """Whether the file exists and has this SHA-256."""
        try:
            return files.file_sha256(self.out / name) == sha256
        except OSError:
            return False

    def free_bytes(self) -> int:
        """Free bytes on the disk."""
        return shutil.disk_usage(self.state).free

    @contextlib.contextmanager
    def naming(self, path: Path) -> Iterator[None]:
        """Turn an OSError raised inside into a SamplingError that names `path`."""
        try:
            yield
        except OSError as error:
            raise SamplingError(f"{path}: {error.strerror or error}; fix that, then {AGAIN}.") from error
