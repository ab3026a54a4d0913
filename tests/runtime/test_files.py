"""Files are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.file_systems import NOT_SUPPORTED, files_of_at_most, refuse, refuse_fsync_of_folders
from vaebm_fast.runtime.files import (
    append,
    expanded,
    file_sha256,
    remove_temporaries,
    replacing,
    require_writable,
    write,
)


def test_a_file_is_replaced_whole_and_its_hash_is_returned(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert write(path, "old") == hashlib.sha256(b"old").hexdigest()
    assert write(path, b"new") == hashlib.sha256(b"new").hexdigest() == file_sha256(path)
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_after_an_error_the_old_file_is_there_and_no_temporary(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, "old")
    with pytest.raises(type(error)) as raised, replacing(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    with files_of_at_most(4096), pytest.raises(OSError) as raised:
        write(tmp_path / "file", bytes(1 << 16))
    assert raised.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())
    assert str(raised.value).endswith(f"'{tmp_path / 'file'}'")


def test_a_rename_that_fails_names_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(OSError) as raised:
        write(tmp_path / "file", "new")
    assert str(raised.value).endswith(f"link: '{tmp_path / 'file'}'")


@pytest.mark.parametrize("number", NOT_SUPPORTED)
def test_a_mount_without_fsync_of_folders_is_no_error(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    refuse_fsync_of_folders(monkeypatch, number)
    write(tmp_path / "file", "new", durable=True)
    assert (tmp_path / "file").read_text() == "new" and not recwarn.list


def test_a_mount_without_any_fsync_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refuse(monkeypatch, os, "fsync", errno.EINVAL)
    write(tmp_path / "file", "new", durable=True)
    append(tmp_path / "file", b"er")
    assert (tmp_path / "file").read_text() == "newer" and len(calls) == 3


def test_a_folder_that_fails_to_sync_is_told_of_without_denying_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_fsync_of_folders(monkeypatch, errno.EIO)
    with pytest.warns(UserWarning, match="file is written, but a power cut may still undo it .Input/output error"):
        write(tmp_path / "file", "new", durable=True)
    assert (tmp_path / "file").read_text() == "new"


def test_a_file_that_fails_to_sync_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "file", "old")
    refuse(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(OSError) as raised:
        write(tmp_path / "file", "new", durable=True)
    assert raised.value.filename == str(tmp_path / "file") and (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_mount_that_refuses_modes_is_no_error(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = refuse(monkeypatch, os, "chmod", number)
    write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and calls


def test_what_cannot_be_written_is_known_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for wrong, kind in ((tmp_path / "file" / "x", NotADirectoryError), (tmp_path / "no" / "x", FileNotFoundError)):
        with pytest.raises(kind) as raised:
            require_writable(wrong)
        assert raised.value.filename == str(wrong)
    with pytest.raises(IsADirectoryError) as raised:
        require_writable(tmp_path)
    assert raised.value.filename == str(tmp_path)


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for refused in (require_writable, lambda path: write(path, "x")):
        with pytest.raises(OSError, match="Is a device or a pipe, not a file"):
            refused(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_temporaries_of_the_dead_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as temporary:
        left = [temporary, tmp_path / f".other.txt.{'a' * 32}.tmp"]
        others = [tmp_path / name for name in (".x.tmp", "file", f"y.{'a' * 32}.tmp", f".y.{'A' * 32}.tmp")]
        for path in (*left, *others):
            path.touch()
        remove_temporaries(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted(others)
        raise KeyboardInterrupt


def test_a_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert [str(expanded(path)) for path in ("~/x", "~", "a/~", "./~")] == ["/home/ada/x", "/home/ada", "a/~", "~"]


@pytest.mark.parametrize("durable", [False, True])
def test_durable_waits_for_the_bytes_before_the_rename_and_for_the_folder_after(
    durable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def recorded(name: str, real: Any) -> Any:
        return lambda *arguments: (calls.append(name), real(*arguments))[1]

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write(tmp_path / "file", "content", durable=durable)
    assert calls == (["fsync", "replace", "fsync"] if durable else ["replace"])


def test_temporaries_lie_beside_the_file_or_where_the_caller_says(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    with replacing(tmp_path / "file") as temporary:
        assert temporary.parent == tmp_path
    with replacing(tmp_path / "file", temporaries=tmp_path / "tmp") as temporary:
        assert temporary.parent == tmp_path / "tmp"


@pytest.mark.parametrize("name", ["x" * 255, "\N{GRINNING FACE}" * 63])
def test_names_may_be_as_long_as_the_file_system_takes(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, "content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_links_and_the_umask_are_respected(tmp_path: Path) -> None:
    (tmp_path / "real").touch()
    (tmp_path / "latest").symlink_to(tmp_path / "real")
    umask = os.umask(0o027)
    try:
        with replacing(tmp_path / "latest") as temporary:
            temporary.write_text("content")
            temporary.chmod(0o600)
    finally:
        os.umask(umask)
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "real").read_text() == "content"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


def test_append_adds_and_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (waits.append(1), real(descriptor))[1])
    append(tmp_path / "file", b"a\n")
    append(tmp_path / "file", b"b\n")
    assert (tmp_path / "file").read_bytes() == b"a\nb\n" and len(waits) == 2
