"""Files are there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from vaebm_fast.runtime.files import append, file_sha256, replacing, write


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
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses to write beyond this
    try:
        with pytest.raises(OSError) as raised:
            write(tmp_path / "file", bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert raised.value.filename is not None and not list(tmp_path.iterdir())


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
