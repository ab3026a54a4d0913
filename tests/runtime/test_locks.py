"""One command at a time writes to a folder; the lock of a dead one refuses nobody."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.file_systems import refuse
from vaebm_fast.runtime.locks import Lock, LockedError

HOLDER = """
import sys, time
from pathlib import Path
from vaebm_fast.runtime.locks import Lock
Lock(Path(sys.argv[1], ".lock"), Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(600)
"""


def lock_of(folder: Path) -> Lock:
    return Lock(folder / ".lock", folder)


def test_a_second_process_is_told_who_holds_the_lock_until_that_one_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=rf"^{tmp_path} is being written by process {holder.pid} on .*; wait"):
            lock_of(tmp_path).take()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with lock_of(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_a_lock_is_free_again_after_its_block_and_after_an_error_in_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyError), lock_of(tmp_path):
            raise KeyError
    with lock_of(tmp_path), pytest.raises(LockedError):
        lock_of(tmp_path).take()


def test_shared_locks_admit_each_other_and_nobody_else(tmp_path: Path) -> None:
    first, second = lock_of(tmp_path), lock_of(tmp_path)
    first.take()
    first.take(shared=True)
    second.take(shared=True)
    first.release()
    with pytest.raises(LockedError):
        lock_of(tmp_path).take()
    second.release()
    lock_of(tmp_path).take()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EPERM, errno.EIO])
def test_a_file_system_without_locks_is_a_warning(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refuse(monkeypatch, fcntl, "flock", number)
    lock = lock_of(tmp_path)
    with pytest.warns(UserWarning) as said:
        lock.take()
        lock.take(shared=True)  # says nothing again
    assert len(calls) == 2 and len(said) == 1
    assert f"{tmp_path} is on a file system that refuses to lock it ({os.strerror(number)}); make" in str(
        said[0].message
    )


def test_a_lock_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised:
        lock_of(tmp_path / "no").take()
    assert raised.value.filename == str(tmp_path / "no" / ".lock")


def test_a_folder_that_takes_no_lock_file_is_named_with_its_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / ".lock"))
    monkeypatch.setattr(os, "open", mock.Mock(side_effect=[refused, FileNotFoundError()]))
    with pytest.raises(PermissionError, match="Permission denied"):
        lock_of(tmp_path).take()


def test_a_lock_file_of_another_user_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def owned_by_another(path: Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, flags, *mode)

    (tmp_path / ".lock").touch()
    monkeypatch.setattr(os, "open", owned_by_another)
    with lock_of(tmp_path), pytest.raises(LockedError):
        lock_of(tmp_path).take()


def test_a_full_disk_does_not_refuse_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, os, "pwrite", errno.ENOSPC)
    with lock_of(tmp_path), pytest.raises(LockedError, match="another process"):
        lock_of(tmp_path).take()
