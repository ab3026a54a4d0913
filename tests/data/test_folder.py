"""Which files of a folder are images, what is said of the others, and what identifies a data set."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.file_systems import without_root
from vaebm_fast.data import ArraySource, open_source
from vaebm_fast.data.containers import ImageFolder
from vaebm_fast.data.containers.folder import FolderListing
from vaebm_fast.data.digit_sets import mnist
from vaebm_fast.data.sources import StoredImages
from vaebm_fast.runtime.errors import UserError


def make(root: Path, *names: str) -> Path:
    """Image files, each of a colour of its own; `root`."""
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            Image.new("L", (8, 8), 17 * index).save(file, "PNG")
    return root


def folder(root: Path, **options: Any) -> StoredImages:
    return StoredImages(ImageFolder(FolderListing(root)), **{"image_size": 8, "image_channels": 1, **options})


def test_links_to_folders_and_files_are_followed_and_loops_end(tmp_path: Path) -> None:
    store = make(tmp_path / "store", "x/1.png", "x/2.png", "y/3.png", "4.png")
    data = make(tmp_path / "data", "own/5.png")
    (data / "linked").symlink_to(store / "x")
    (data / "link.png").symlink_to(store / "4.png")
    (data / "own" / "up").symlink_to(data)
    (data / "own" / "self").symlink_to(data / "own" / "self2")
    (data / "own" / "self2").symlink_to(data / "own" / "self")  # leads nowhere, and is no image
    (store / "x" / "deeper").symlink_to(store / "y")
    (data / "unmounted").symlink_to("/no/such/disk")
    said = "5 images, 4 files .*: 3 links to what cannot be reached, .*; 1 links to folders that are read already"
    with pytest.warns(UserWarning, match=said):
        source = folder(data)
    assert source.container.names == ["link.png", "linked/1.png", "linked/2.png", "linked/deeper/3.png", "own/5.png"]


def test_a_folder_that_is_reached_twice_is_read_once_by_its_own_name(tmp_path: Path) -> None:
    make(tmp_path, "b/1.png", "b/2.png", "3.png")
    make(tmp_path, "z/deep/4.png")
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "alink").symlink_to(tmp_path / "z" / "deep")
    listing = FolderListing(tmp_path)
    assert listing.names == ["3.png", "b/1.png", "b/2.png", "z/deep/4.png"]
    assert listing.reasons == "2 links to folders that are read already, such as a"
    make(tmp_path / "out of it", "x/5.png", "6.png")
    inside = make(tmp_path / "in", "7.png")
    (inside / "one").symlink_to(tmp_path / "out of it" / "x")
    (inside / "two").symlink_to(tmp_path / "out of it")
    assert FolderListing(inside).names == ["7.png", "one/5.png", "two/6.png"]


def test_every_ending_of_the_formats_is_taken_in_any_case(tmp_path: Path) -> None:
    names = [f"{index}{end}" for index, end in enumerate((".jpg", ".JPEG", ".jpe", ".Jfif", ".png", ".tif", ".TIFF"))]
    assert FolderListing(make(tmp_path, *names)).names == names


def test_hidden_and_system_names_are_passed_over_and_counted(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    hidden = ["._1.png", ".hidden.png", ".ipynb_checkpoints/1.png", "sub/@eaDir/1.png/SYNO.png", "__MACOSX/sub/._2.png"]
    more = ["$RECYCLE.BIN/1.png", "lost+found/1.png", "System Volume Information/1.png", ".git/objects/1.png"]
    make(tmp_path, "1.png", "sub/2.png", *hidden, *more)
    (tmp_path / "labels.csv").touch()
    (tmp_path / "Thumbs.db").touch()
    source = folder(tmp_path)
    assert source.container.names == ["1.png", "sub/2.png"]
    [warning] = recwarn.list
    said = str(warning.message)
    assert said.startswith(f"{tmp_path}: 2 images, 11 files passed over: ") and "\n" not in said
    assert "9 hidden or of the system, such as " in said and "2 without an image's ending (" in said


def test_a_plain_folder_says_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    folder(make(tmp_path, "1.png", "sub/2.png"))
    assert not recwarn.list


def test_a_data_set_within_a_hidden_folder_is_read(tmp_path: Path) -> None:
    assert folder(make(tmp_path / ".cache" / "set", "1.png")).container.names == ["1.png"]


def test_what_is_no_file_is_passed_over_and_what_links_nowhere_is_named(tmp_path: Path) -> None:
    make(tmp_path, "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert FolderListing(tmp_path).passed_over == {"not regular files": ["pipe.png"]}
    (tmp_path / "gone.png").symlink_to("/no/such/disk/gone.png")
    with pytest.raises(UserError, match=r"gone\.png links to /no/such/disk/gone\.png, which cannot be reached"):
        FolderListing(tmp_path)


def test_a_folder_that_may_not_be_listed_is_an_error(tmp_path: Path) -> None:
    top = Path(make(tmp_path / "set", "a/1.png", "b/2.png"))
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
            parent.chmod(0o755)
    (top / "b").chmod(0)
    try:
        with without_root(), pytest.raises(PermissionError) as raised:
            FolderListing(top)
        assert raised.value.filename == str(top / "b")
    finally:
        (top / "b").chmod(0o755)


def test_a_folder_of_idx_files_under_other_names_says_which_are_known(tmp_path: Path) -> None:
    (tmp_path / "emnist-train-images-idx3-ubyte").touch()
    with pytest.raises(
        UserError, match=r"none of its 1 files is one: 1 without .* recognised as train-images-idx3-ubyte"
    ):
        mnist_or_images = open_source(tmp_path, image_size=8, image_channels=1)
        assert mnist_or_images


# Identity.
def test_the_digest_is_of_names_and_contents_wherever_they_lie(tmp_path: Path) -> None:
    data = make(tmp_path / "data", "1.png", "sub/2.png", "3.png")
    digest = folder(data).digest()
    moved = shutil.copytree(data, tmp_path / "elsewhere" / "copy")
    assert folder(moved).digest() == digest == folder(Path(os.path.relpath(data))).digest()

    changed = {
        "content": lambda: (moved / "1.png").write_bytes((moved / "3.png").read_bytes()),
        "one byte": lambda: (moved / "1.png").write_bytes((moved / "1.png").read_bytes()[:-1] + b"x"),
        "renamed": lambda: (moved / "3.png").rename(moved / "4.png"),
        "moved": lambda: (moved / "3.png").rename(moved / "sub" / "3.png"),
        "removed": lambda: (moved / "3.png").unlink(),
        "added": lambda: (moved / "5.png").write_bytes((moved / "3.png").read_bytes()),
        "swapped": lambda: swap(moved / "1.png", moved / "3.png"),
    }
    for what, change in changed.items():
        shutil.rmtree(moved)
        shutil.copytree(data, moved)
        change()
        assert folder(moved).digest() != digest, what


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_the_content_of_images_that_are_left_out_does_not_count_but_their_names_do(tmp_path: Path) -> None:
    make(tmp_path, "1.png", "2.png", "3.png")
    source, without = folder(tmp_path), folder(tmp_path).digest(["2.png"])
    assert source.digest() != without != source.digest(["1.png"])
    (tmp_path / "2.png").write_bytes(b"broken")
    assert folder(tmp_path).digest(["2.png"]) == without
    (tmp_path / "3.png").write_bytes(b"broken")
    assert folder(tmp_path).digest(["2.png"]) != without
    make(tmp_path, "0.png", "1.png", "2.png", "3.png")
    (tmp_path / "0.png").unlink()
    (tmp_path / "2.png").unlink()
    assert folder(tmp_path).digest(["2.png"]) != without


def test_a_file_that_cannot_be_read_is_named_by_the_digest(tmp_path: Path) -> None:
    source = folder(make(tmp_path, "1.png", "2.png"))
    (tmp_path / "2.png").unlink()
    with pytest.raises(FileNotFoundError) as raised:
        source.digest()
    assert raised.value.filename == str(tmp_path / "2.png")


def test_arrays_are_known_by_shape_and_pixels_not_by_name() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 1), np.uint8)
    digest = ArraySource("one", pixels).digest()
    assert ArraySource("two", pixels.copy(), np.arange(3)).digest() == digest
    assert ArraySource("one", np.ascontiguousarray(pixels[::-1])[::-1]).digest() == digest
    other = pixels.copy()
    other[2, 3, 3, 0] ^= 1
    different = (other, pixels[::-1], pixels.reshape(3, 2, 8, 1), pixels[:2])
    assert digest not in [ArraySource("one", each).digest() for each in different]


def test_mnist_is_known_by_its_images_packed_or_not(tmp_path: Path) -> None:
    from tests.data.test_data import write_idx

    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for name in ("a/train-images-idx3-ubyte", "b/raw/train-images.idx3-ubyte.gz"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_idx(tmp_path / name, 2051, images)
    assert mnist(tmp_path / "a").digest() == mnist(tmp_path / "b").digest()


@pytest.mark.parametrize("name", ["lost+found", "closed", ".hidden"])
def test_a_closed_folder_is_named_or_passed_over(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ordinary users may not enter the lost+found of a disk."""
    make(tmp_path, "1.png", f"{name}/2.png")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if Path(os.fspath(path)).name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os.path, "isfile", lambda path: name not in str(path) and Path(path).is_file())
    if name != "closed":
        assert len(open_source(tmp_path, image_size=8, image_channels=1)) == 1
        return
    with pytest.raises(PermissionError) as raised:
        open_source(tmp_path, image_size=8, image_channels=1)
    assert raised.value.filename == str(tmp_path / "closed")


def test_a_link_that_loops_is_passed_over(tmp_path: Path) -> None:
    make(tmp_path, "1.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.warns(UserWarning, match="1 file passed over: 1 links to what cannot be reached, such as loop"):
        assert len(open_source(tmp_path, image_size=8, image_channels=1)) == 1


def test_folders_that_would_be_read_are_known(tmp_path: Path) -> None:
    make(tmp_path / "set", "1.png", "sub/2.png")
    make(tmp_path / "store", "deep/3.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "store")
    (tmp_path / "way in").symlink_to(tmp_path / "set")
    source = folder(tmp_path / "set")
    inside = ["set", "set/run", "set/sub/a/b", "set/link/run", "store/run", "store/deep", "way in/run"]
    outside = ["run", "set/.run", "set/sub/@eaDir/run", "setrun", "."]
    assert [name for name in inside + outside if source.container.would_read(tmp_path / name)] == inside


def test_unreadable_images_are_looked_for_on_the_disk(tmp_path: Path) -> None:
    source = folder(make(tmp_path, "1.png", "2.png", "3.png"))
    source.read(np.arange(3))  # into the cache
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "3.png").unlink()
    assert source.find_unreadable() == ["1.png"]  # a missing file can come back as it was


def test_a_folder_of_images_is_read_though_a_folder_in_it_holds_idx_files(tmp_path: Path) -> None:
    from tests.data.test_data import write_idx

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    write_idx(tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte", 2051, np.zeros((5, 28, 28), np.uint8))
    assert len(open_source(tmp_path, image_size=28, image_channels=1)) == 5
    make(tmp_path, "photos/1.png")
    with pytest.warns(UserWarning, match="1 images, 1 file passed over"):
        assert len(open_source(tmp_path, image_size=28, image_channels=1)) == 1


def test_no_path_at_all_is_refused() -> None:
    """As an unset shell variable gives; it would mean everything below the current folder."""
    with pytest.raises(UserError, match="A path is empty"):
        open_source("", image_size=8, image_channels=1)
