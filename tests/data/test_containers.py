"""Every layout of published data opens by its path, gives the stored images in their order, and refuses damage."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.image_containers import (
    encoded,
    example,
    glow_record,
    noise,
    progan_record,
    python2_pickle,
    write_cifar10,
    write_cifar100,
    write_idx,
    write_lmdb,
    write_nvae_lmdb,
    write_svhn,
    write_tar,
    write_tfrecord,
    write_zip,
)
from vaebm_fast.data import ImageSource, open_source
from vaebm_fast.data.containers.find import NoHeldOutError
from vaebm_fast.data.containers.lmdb_store import LmdbImages
from vaebm_fast.data.images import UnreadableImageError
from vaebm_fast.data.sources import StoredImages
from vaebm_fast.runtime.errors import UserError

IMAGES = noise(12, 8)


def source(path: Path, split: Any = "train", size: int = 8, channels: int = 3, **options: Any) -> StoredImages:
    opened = open_source(path, image_size=size, image_channels=channels, split=split, **options)
    assert isinstance(opened, StoredImages)
    return opened


def pixels(opened: ImageSource) -> Any:
    return opened.read(np.arange(len(opened)))


def labels(opened: ImageSource) -> list[int] | None:
    return None if opened.labels is None else opened.labels.tolist()


# zip
def test_a_zip_is_read_in_the_order_of_its_names_with_its_labels(tmp_path: Path) -> None:
    names = write_zip(tmp_path / "set.zip", IMAGES, list(range(12, 0, -1)))
    opened = source(tmp_path / "set.zip")
    assert opened.container.names == names and (pixels(opened) == IMAGES).all()
    assert labels(opened) == list(range(12, 0, -1))
    write_zip(tmp_path / "set.zip", IMAGES)
    assert source(tmp_path / "set.zip").labels is None
    for others in ([[0.0, 1.0]] * 12, [*range(11), None], [*range(11), 2**70]):
        write_zip(tmp_path / "set.zip", IMAGES, others)  # type: ignore[arg-type]
        with pytest.warns(UserWarning, match="classes are left out, for not every image has a whole number"):
            assert source(tmp_path / "set.zip").labels is None


@pytest.mark.parametrize("content", ["{", "[1]", '{"labels": 3}', '{"labels": [1, 2]}', "[" * 100_000])
def test_a_damaged_dataset_json_is_refused(content: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", encoded(IMAGES[0]))
        archive.writestr("dataset.json", content)
    with pytest.raises(UserError, match="dataset.json is damaged"):
        source(tmp_path / "set.zip")


def test_a_folder_may_have_the_labels_of_a_zip(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_bytes(encoded(IMAGES[index]))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [["2.png", 7], ["0.png", 5], ["1.png", 6]]}))
    assert labels(source(tmp_path)) == [5, 6, 7]


def test_one_grey_image_among_rgb_in_a_zip_becomes_rgb(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.png", encoded(IMAGES[0]))
        archive.writestr("a/deep/C.PNG", encoded(IMAGES[1, ..., :1]))
        archive.writestr("__MACOSX/._b.png", b"of the system")
        archive.writestr("readme.txt", b"text")
        archive.mkdir("empty.png")
    with pytest.warns(UserWarning, match="2 images, 2 files passed over: 1 hidden or of the system, such as __MACOSX"):
        opened = source(tmp_path / "set.zip")
    assert opened.container.names == ["a/deep/C.PNG", "b.png"]
    assert (pixels(opened)[1] == IMAGES[0]).all() and (pixels(opened)[0] == IMAGES[1, ..., :1]).all()


def test_a_damaged_entry_of_a_zip_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    names = write_zip(path, IMAGES)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo(names[3]).header_offset + 100] ^= 1
    path.write_bytes(data)
    opened = source(path)
    with pytest.raises(UnreadableImageError, match=rf"set\.zip, entry {names[3]} cannot .*Bad CRC-32") as raised:
        opened.read(np.arange(12))
    assert raised.value.image == names[3] and raised.value.is_damaged
    assert opened.find_unreadable() == [names[3]]
    assert (opened.read(np.array([2, 4])) == IMAGES[[2, 4]]).all()


def test_a_truncated_zip_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "set.zip", IMAGES)
    os.truncate(tmp_path / "set.zip", 2000)
    with pytest.raises(UserError, match=r"set\.zip cannot be read as a zip archive"):
        source(tmp_path / "set.zip")


def test_an_entry_that_is_larger_than_it_says_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(1 << 20))
        archive.writestr("b.png", encoded(IMAGES[0]))
    data = path.read_bytes()
    assert data.count(struct.pack("<I", 1 << 20)) == 2
    path.write_bytes(data.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 100)))
    with pytest.raises(UnreadableImageError, match="entry a.png cannot be read"):
        pixels(source(path))


# tar
def shard(*images: int, **more: bytes) -> dict[str, bytes]:
    return {f"{index:04d}.png": encoded(IMAGES[index]) for index in images} | more


def test_tar_shards_are_read_in_order_with_their_classes(tmp_path: Path) -> None:
    for number, part in enumerate(((3, 1), (2, 0))):
        classes = {f"{index:04d}.cls": str(10 + index).encode() for index in part}
        notes = {f"{index:04d}.json": b"{}" for index in part}
        write_tar(tmp_path / f"images-{number:06d}.tar", shard(*part) | classes | notes)
    opened = source(tmp_path)
    assert opened.container.names == ["0003.png", "0001.png", "0002.png", "0000.png"]
    assert (pixels(opened) == IMAGES[[3, 1, 2, 0]]).all() and labels(opened) == [13, 11, 12, 10]
    assert (pixels(source(tmp_path / "images-000001.tar")) == IMAGES[[2, 0]]).all()


def test_equal_names_in_several_shards_are_told_apart_by_the_shard(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", shard(0, 1))
    write_tar(tmp_path / "b.tar", shard(1, 0))
    assert source(tmp_path).container.names == ["a.tar/0000.png", "a.tar/0001.png", "b.tar/0001.png", "b.tar/0000.png"]


def test_tar_files_are_those_of_webdatasets_own_writer(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "set.tar")) as writer:
        for index in range(4):
            writer.write({"__key__": f"sub/{index}", "png": encoded(IMAGES[index]), "cls": index})
    opened = source(tmp_path / "set.tar")
    assert opened.container.names == [f"sub/{index}.png" for index in range(4)]
    assert (pixels(opened) == IMAGES[:4]).all() and labels(opened) == [0, 1, 2, 3]


def test_dots_in_keys_and_other_spellings_of_an_ending_lose_no_image(tmp_path: Path) -> None:
    names = ["00.02.jpg", "0003.JPG", "0004.jpeg", "sub.dir/0005.Png", "./0006.png"]
    files = {name: encoded(image) for name, image in zip(names, IMAGES, strict=False)}
    write_tar(tmp_path / "set.tar", files)
    opened = source(tmp_path / "set.tar")
    assert opened.container.names == names and (pixels(opened) == IMAGES[:5]).all()


def test_images_that_share_a_key_of_webdataset_are_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", {name: encoded(IMAGES[0]) for name in ("00.01.jpg", "00.02.jpg")})
    with pytest.raises(UserError, match=r"set\.tar: 00\.01\.jpg and 00\.02\.jpg are one sample for webdataset"):
        source(tmp_path / "set.tar")


def test_links_in_a_tar_are_passed_over_and_the_last_of_equal_names_counts(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1))
    with tarfile.open(tmp_path / "set.tar", "a") as archive:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        again = tarfile.TarInfo("0000.png")
        data = encoded(IMAGES[5])
        again.size = len(data)
        archive.addfile(again, __import__("io").BytesIO(data))
    with pytest.warns(UserWarning, match="1 file passed over: 1 not regular files, such as link.png"):
        opened = source(tmp_path / "set.tar")
    assert opened.container.names == ["0001.png", "0000.png"] and (pixels(opened) == IMAGES[[1, 5]]).all()


@pytest.mark.parametrize("keep", [1700, 600, 100])
def test_a_truncated_tar_is_refused(keep: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(*range(12)))
    os.truncate(tmp_path / "set.tar", keep)
    with pytest.raises(UserError, match=r"set\.tar cannot be read as an uncompressed tar archive"):
        source(tmp_path / "set.tar")


def test_a_tar_that_ends_between_two_images_is_told_of(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1))
    with tarfile.open(tmp_path / "set.tar") as archive:
        second = archive.getmembers()[1].offset
    os.truncate(tmp_path / "set.tar", second)
    with pytest.warns(UserWarning, match=r"set\.tar has no end-of-archive marker; it may be truncated"):
        assert len(source(tmp_path / "set.tar")) == 1


@pytest.mark.parametrize("bit", [3, 100, 148, 257])
def test_a_damaged_header_in_the_middle_of_a_tar_loses_no_image_silently(bit: int, tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1, 2))
    with tarfile.open(tmp_path / "set.tar") as archive:
        second = archive.getmembers()[1].offset
    data = bytearray((tmp_path / "set.tar").read_bytes())
    data[second + bit] ^= 1
    (tmp_path / "set.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"set\.tar (is damaged, or several archives in one|cannot be read)"):
        source(tmp_path / "set.tar")


def test_archives_behind_each_other_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1))
    (tmp_path / "set.tar").write_bytes((tmp_path / "set.tar").read_bytes() * 2)
    with pytest.raises(UserError, match="several archives in one"):
        source(tmp_path / "set.tar")


def test_a_negative_size_in_a_tar_ends(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1))
    data = bytearray((tmp_path / "set.tar").read_bytes())
    with tarfile.open(tmp_path / "set.tar") as archive:
        at = archive.getmembers()[1].offset
    data[at + 124 : at + 136] = b"\xff" * 10 + b"\xfe\x00"  # -512 in base 256
    header = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
    data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    (tmp_path / "set.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"set\.tar (is damaged: '0001\.png' has a negative size|cannot be read)"):
        source(tmp_path / "set.tar")


def test_any_number_of_shards_takes_no_descriptors(tmp_path: Path) -> None:
    for index in range(20):
        write_tar(tmp_path / f"{index:02d}.tar", shard(index % 12))
    before = len(os.listdir("/proc/self/fd"))
    opened = source(tmp_path)
    opened.read(np.arange(20))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_compressed_tar_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "set.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    for name in ("set.tar.gz", "set.tar"):
        (tmp_path / "set.tar.gz").rename(tmp_path / name)
        with pytest.raises(UserError, match="is compressed; unpack it first"):
            source(tmp_path / name)
        (tmp_path / name).rename(tmp_path / "set.tar.gz")


def test_a_tar_rewritten_under_an_old_index_is_read_as_it_is_now(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1, 2))
    (tmp_path / "set.idx").write_text("v1.2 3\npng 512 100 a.png\npng 1536 100 b.png\npng 2560 100 c.png\n")
    write_tar(tmp_path / "set.tar", shard(7, 6))
    assert (pixels(source(tmp_path)) == IMAGES[[7, 6]]).all()


def test_a_tar_rewritten_while_it_is_open_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "set.tar", shard(0, 1, 2))
    opened = source(tmp_path / "set.tar")
    write_tar(tmp_path / "set.tar", shard(7, 6, 5, 4))
    with pytest.raises(UnreadableImageError, match="was rewritten while it was read; start again") as raised:
        pixels(opened)
    assert not raised.value.is_damaged, "nothing is left out for that"


# LMDB
def raw(images: Any) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_nvaes_raw_databases_have_two_splits_in_numeric_order(tmp_path: Path) -> None:
    write_nvae_lmdb(tmp_path / "set", {"train": raw(IMAGES), "validation": raw(IMAGES[:3])})
    opened = source(tmp_path / "set")  # 12 keys: as bytes, 10 and 11 stand before 2
    assert (pixels(opened) == IMAGES).all() and opened.container.names[10] == "10"
    assert (pixels(source(tmp_path / "set", "held_out")) == IMAGES[:3]).all()
    assert (pixels(source(tmp_path / "set" / "train.lmdb")) == IMAGES).all()


def test_nvaes_encoded_databases_are_celebas_jpegs_with_their_box(tmp_path: Path) -> None:
    faces = noise(2, 218, 178)
    files = [encoded(face, "PNG") for face in faces]
    write_nvae_lmdb(tmp_path / "set", {"train": files, "validation": files[:1]})
    opened = source(tmp_path / "set", size=148, transform="celeba")
    assert (pixels(opened) == faces[:, 40:188, 15:163]).all()


def test_lsuns_databases_have_opaque_keys_in_the_order_of_their_bytes(tmp_path: Path) -> None:
    keys = [bytes([200 - index]) * 20 for index in range(4)]
    values = {key: encoded(image, "WEBP", lossless=True) for key, image in zip(keys, noise(4, 8, 11), strict=True)}
    write_lmdb(tmp_path / "church_outdoor_train_lmdb", values)
    write_lmdb(tmp_path / "church_outdoor_val_lmdb", dict(list(values.items())[:1]))
    opened = source(tmp_path)
    assert (pixels(opened) == noise(4, 8, 11)[::-1, :, 2:10]).all()  # the centre: (11 - 8 + 1) / 2
    assert len(source(tmp_path, "held_out")) == 1
    assert len(source(tmp_path / "church_outdoor_train_lmdb")) == 4


@pytest.mark.parametrize("share", [0.5, 0.99])
def test_a_truncated_database_is_refused_before_it_could_kill_the_process(share: float, tmp_path: Path) -> None:
    write_nvae_lmdb(tmp_path, {"train": raw(noise(20, 64)), "validation": raw(IMAGES)})
    file = tmp_path / "train.lmdb" / "data.mdb"
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(UserError, match=r"train\.lmdb/data\.mdb is truncated: it has [\d,]+ bytes of [\d,]+"):
        source(tmp_path)


@pytest.mark.parametrize("content", [b"", b"x" * 100, bytes(20000)])
def test_what_is_no_database_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(UserError, match=r"data\.mdb cannot be read as an LMDB database"):
        source(tmp_path)


def test_keys_that_look_alike_have_names_of_their_own(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "train.lmdb", {b"\xff": encoded(IMAGES[0]), b"\\xff": encoded(IMAGES[1])})
    assert len(set(source(tmp_path).container.names)) == 2


def test_an_empty_database_is_refused(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "train.lmdb", {})
    with pytest.raises(UserError, match="has no images: the database is empty"):
        source(tmp_path / "train.lmdb")


def test_a_database_may_be_opened_twice_and_before_a_fork(tmp_path: Path) -> None:
    write_nvae_lmdb(tmp_path, {"train": raw(IMAGES)})
    first, second = source(tmp_path), source(tmp_path / "train.lmdb")
    assert (pixels(first) == pixels(second)).all()
    child = os.fork()
    if not child:
        code = 1
        try:
            same = all((first.container.read(index) == image).all() for index, image in enumerate(IMAGES))
            assert isinstance(first.container, LmdbImages) and first.container._environment is not None
            own = first.container._environment.process == os.getpid()
            code = 0 if same and own and (second.container.read(3) == IMAGES[3]).all() else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    del first
    assert (second.container.read(5) == IMAGES[5]).all()


def test_encoded_images_of_the_length_of_raw_ones_are_decoded(tmp_path: Path) -> None:
    files = [encoded(image[:4, :4]).ljust(3 * 16**2, b"\0") for image in IMAGES]
    write_nvae_lmdb(tmp_path, {"train": files})
    assert (pixels(source(tmp_path, size=4)) == IMAGES[:, :4, :4]).all()


def test_a_value_of_another_length_among_raw_ones_is_named(tmp_path: Path) -> None:
    values = raw(IMAGES)
    values[4] = values[4][:-3]
    write_nvae_lmdb(tmp_path, {"train": values})
    with pytest.raises(
        UnreadableImageError, match=r"key 4 cannot be read.*it has 189 bytes; others are raw RGB of 8x8"
    ):
        pixels(source(tmp_path))


# TFRecord
def test_glows_records_are_read_file_by_file_with_two_splits(tmp_path: Path) -> None:
    for split, images in (("train", IMAGES), ("validation", IMAGES[:2])):
        (tmp_path / split).mkdir()
        for number, part in enumerate(np.array_split(images, 2)):
            path = tmp_path / split / f"{split}-r08-s-{number:04d}-of-0002.tfrecords"
            write_tfrecord(path, [glow_record(image) for image in part])
    assert (pixels(source(tmp_path)) == IMAGES).all()
    assert (pixels(source(tmp_path, "held_out")) == IMAGES[:2]).all()
    (tmp_path / "train" / "train-r08-s-0001-of-0002.tfrecords").unlink()
    with pytest.raises(UserError, match="lacks 1 of 2 TFRecord files, such as number 1"):
        source(tmp_path)


def test_progans_records_are_read_of_the_resolution_asked_for(tmp_path: Path) -> None:
    for log, images in ((2, noise(3, 4)), (3, IMAGES[:3]), (4, noise(3, 16))):
        write_tfrecord(tmp_path / f"set-r{log:02d}.tfrecords", [progan_record(image) for image in images])
    assert (pixels(source(tmp_path)) == IMAGES[:3]).all()
    assert (pixels(source(tmp_path, size=16)) == noise(3, 16)).all()
    assert source(tmp_path, size=6).container.read(0).shape == (8, 8, 3)  # type: ignore[union-attr]
    assert (pixels(source(tmp_path / "set-r02.tfrecords", size=4)) == noise(3, 4)).all()


@pytest.mark.parametrize("at, sentence", [(30, "CRC-32C is wrong"), (2, "bad header"), (9, "bad header")])
def test_a_flipped_bit_in_a_record_is_found(at: int, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    write_tfrecord(path, [glow_record(image) for image in IMAGES[:2]])
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"a\.tfrecords.*{sentence}"):
        pixels(source(path))


@pytest.mark.parametrize("cut", [1, 5, 300, 500])
def test_a_truncated_tfrecord_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecords"
    write_tfrecord(path, [glow_record(image) for image in IMAGES[:2]])
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(UserError, match=r"a\.tfrecords is (truncated|damaged)"):
        source(path)


@pytest.mark.parametrize(
    "record, sentence",
    [
        (example({"data": b"abc"}), "lacks the features `shape`"),
        (example({"shape": [2, 2, 3], "data": b"abc"}), "3 bytes of pixels where its shape is 2 x 2 x 3"),
        (example({"shape": [2, 2, 2], "data": bytes(8)}), "no side is 1 or 3"),
        (example({"shape": [-2, -2, 3], "data": bytes(12)}), "its shape is -2 x -2 x 3"),
        (b"\x0a\xff\xff", "no tf.train.Example"),
        (b"\xff" * 20, "no tf.train.Example"),
    ],
    ids=["no shape", "too few", "two channels", "negative", "cut", "noise"],
)
def test_a_record_without_an_image_is_named(record: bytes, sentence: str, tmp_path: Path) -> None:
    write_tfrecord(tmp_path / "a.tfrecords", [record])
    with pytest.raises(UnreadableImageError, match=f"record at byte 0 cannot.*{sentence}"):
        pixels(source(tmp_path / "a.tfrecords"))


# CIFAR, SVHN, arrays
CIFAR = noise(12, 32)
CLASSES = [index % 10 for index in range(12)]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_cifar_10_is_read_in_both_layouts(binary: bool, below: bool, tmp_path: Path) -> None:
    folder = tmp_path / ("cifar-10-batches-bin" if binary else "cifar-10-batches-py")
    write_cifar10(folder, CIFAR, CLASSES, binary=binary)
    opened, held_out = (source(tmp_path if below else folder, split, 32) for split in ("train", "held_out"))
    assert (pixels(opened) == CIFAR[:10]).all() and labels(opened) == CLASSES[:10]
    assert (pixels(held_out) == CIFAR[10:]).all() and labels(held_out) == CLASSES[10:]


@pytest.mark.parametrize("binary", [False, True])
def test_cifar_100_is_read_in_both_layouts_with_its_fine_classes(binary: bool, tmp_path: Path) -> None:
    folder = tmp_path / ("cifar-100-binary" if binary else "cifar-100-python")
    write_cifar100(folder, {"train": CIFAR, "test": CIFAR[:3]}, [99 - index for index in range(12)], binary=binary)
    opened = source(tmp_path, size=32)
    assert (pixels(opened) == CIFAR).all() and labels(opened) == [99 - index for index in range(12)]
    assert len(source(folder, "held_out", 32)) == 3


def test_a_missing_batch_of_cifar_is_named(tmp_path: Path) -> None:
    write_cifar10(tmp_path, CIFAR, CLASSES)
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(UserError, match="lacks data_batch_3; the train split needs data_batch_1"):
        source(tmp_path, size=32)


class Executes:
    """What a pickle may do on loading."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize(
    "content, sentence",
    [
        (python2_pickle({"data": np.zeros((1, 3072), np.uint8)}), "lacks b'labels'"),
        (python2_pickle({"data": np.zeros((1, 9), np.uint8), "labels": [1]}), r"data are not uint8 \[1, 3072\]"),
        (python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), r"data are not uint8 \[1, 3072\]"),
        (python2_pickle([1, 2]), "cannot be read as a batch of CIFAR images"),
        (pickle.dumps({b"data": np.array([[None]]), b"labels": [1]}, 2), "array of object, not of numbers"),
        (b"\x80\x02Nr\x00\x00\x00\x10.", "it would fill the memory"),
        (b"\x80\x02cnumpy\nndarray\n(K\x01\x85tR.", "cannot be read as a batch"),
        (b"", "cannot be read as a batch"),
        (b"\x80\x02}(U\x04dataJ", "cannot be read as a batch"),
    ],
)
def test_a_pickle_of_another_kind_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    write_cifar10(tmp_path, CIFAR, CLASSES)
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(UserError, match=f"data_batch_1.*{sentence}"):
        source(tmp_path, size=32)


def test_a_pickle_that_calls_something_is_not_executed(tmp_path: Path) -> None:
    write_cifar10(tmp_path, CIFAR, CLASSES)
    (tmp_path / "data_batch_2").write_bytes(pickle.dumps({b"data": Executes(tmp_path / "made"), b"labels": []}))
    with pytest.raises(UserError, match="it would call posix.mkdir, which is not loaded for safety"):
        source(tmp_path, size=32)
    assert not (tmp_path / "made").exists()


def test_pickles_of_python_3_are_read_as_well(tmp_path: Path) -> None:
    write_cifar10(tmp_path, CIFAR, CLASSES)
    first = {"data": CIFAR[:2].transpose(0, 3, 1, 2).reshape(2, -1), "labels": [8, 9]}
    for protocol in (2, 4):
        (tmp_path / "data_batch_1").write_bytes(pickle.dumps(first, protocol))
        assert (pixels(source(tmp_path, size=32)) == CIFAR[:10]).all()


def test_a_truncated_binary_batch_is_refused(tmp_path: Path) -> None:
    write_cifar10(tmp_path, CIFAR, CLASSES, binary=True)
    os.truncate(tmp_path / "data_batch_2.bin", 3072)
    with pytest.raises(UserError, match=r"data_batch_2\.bin has 3,072 bytes, which is no multiple of 3073"):
        source(tmp_path, size=32)


def test_svhn_has_two_splits_and_ten_is_the_digit_zero(tmp_path: Path) -> None:
    write_svhn(tmp_path / "train_32x32.mat", CIFAR, [10, *range(1, 10), 10, 1])
    write_svhn(tmp_path / "test_32x32.mat", CIFAR[:2], [1, 2])
    opened = source(tmp_path, size=32)
    assert (pixels(opened) == CIFAR).all() and labels(opened) == [0, *range(1, 10), 0, 1]
    assert len(source(tmp_path, "held_out", 32)) == 2
    write_svhn(tmp_path / "extra_32x32.mat", CIFAR, [1] * 12)
    with pytest.warns(UserWarning, match="extra_32x32.mat belong to no split"):
        assert len(source(tmp_path, size=32)) == 12


@pytest.mark.parametrize("content", [b"MATLAB 5.0 MAT-file" + bytes(200), b"MATLAB 7.3 MAT-file" + bytes(600)])
def test_a_mat_file_of_another_kind_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "train_32x32.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"train_32x32\.mat (cannot be read as a MATLAB 5 file|is not SVHN's)"):
        source(tmp_path, size=32)


def test_classes_of_svhn_that_are_none_are_refused(tmp_path: Path) -> None:
    from scipy.io import savemat

    for classes in (np.array([1.5] * 12), np.array(["a"] * 12, object), np.array([11] * 12)):
        savemat(tmp_path / "train_32x32.mat", {"X": CIFAR.transpose(1, 2, 3, 0), "y": classes})
        with pytest.raises(UserError, match="its classes y are not whole numbers from 1 to 10"):
            source(tmp_path, size=32)


def test_an_npy_file_that_is_cut_off_while_it_is_open_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(50, 64))
    opened = source(tmp_path / "a.npy", size=64)
    os.truncate(tmp_path / "a.npy", 5000)
    with pytest.raises(UnreadableImageError, match="was rewritten while it was read") as raised:
        pixels(opened)
    assert not raised.value.is_damaged


def test_arrays_of_npy_and_npz_are_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    assert (pixels(source(tmp_path / "a.npy")) == IMAGES).all()
    assert (pixels(source(tmp_path)) == IMAGES).all()
    np.save(tmp_path / "a.npy", IMAGES[..., 0])
    assert (pixels(source(tmp_path / "a.npy")) == IMAGES[..., :1]).all()
    assert source(tmp_path / "a.npy", channels=1).read(np.arange(2)).shape == (2, 8, 8, 1)
    kinds = ({"arr_0": IMAGES, "seeds": np.arange(12)}, {"images": IMAGES, "y": np.zeros(12)})
    for arrays in (*kinds, {"masks": IMAGES[::-1], "arr_0": IMAGES}):
        np.savez_compressed(tmp_path / "b.npz", **arrays)
        assert (pixels(source(tmp_path / "b.npz")) == IMAGES).all()


@pytest.mark.parametrize(
    "write, sentence",
    [
        (lambda path: np.save(path / "a.npy", IMAGES / 255), r"float64\[12, 8, 8, 3\]; images are uint8"),
        (lambda path: np.save(path / "a.npy", IMAGES.transpose(0, 3, 1, 2)), "Its channels come first: transpose it"),
        (lambda path: np.save(path / "a.npy", IMAGES[:0]), "contains no images"),
        (lambda path: np.save(path / "a.npy", np.array([{}]), allow_pickle=True), "cannot be read as an .npy file"),
        (lambda path: np.savez(path / "a.npz", x=IMAGES, y=IMAGES), "has several arrays of images: x uint8"),
        (lambda path: np.savez(path / "a.npz", x=np.zeros(3)), "has no array of images, .*x float64"),
        (lambda path: np.savez(path / "a.npz", x=np.array([{}])), "has no array of images"),
        (lambda path: (path / "a.npz").write_bytes(b"PK\3\4"), "cannot be read as an .npz file"),
    ],
)
def test_arrays_that_are_no_images_are_refused(write: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=rf"a\.np.*{sentence}"):
        source(tmp_path)


def test_a_truncated_npy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES)
    os.truncate(tmp_path / "a.npy", 1000)
    with pytest.raises(UserError, match=r"a\.npy cannot be read as an \.npy file of numbers"):
        source(tmp_path)


# Stacked MNIST
def test_stacked_mnist_holds_every_digit_once_a_channel_with_classes_of_three_digits(tmp_path: Path) -> None:
    images, classes = noise(50, 28, channels=1)[..., 0], np.arange(50, dtype=np.uint8) % 10
    for subset, total in (("train", 50), ("t10k", 7)):
        write_idx(tmp_path / f"{subset}-images-idx3-ubyte", images[:total])
        write_idx(tmp_path / f"{subset}-labels-idx1-ubyte", classes[:total])
    opened = open_source(tmp_path, image_size=32, image_channels=3, transform="stacked_mnist")
    stacked = pixels(opened)
    assert stacked.shape == (50, 32, 32, 3) and opened.labels is not None
    digits = np.stack([opened.labels // 100, opened.labels // 10 % 10, opened.labels % 10], axis=1)
    order = {image.tobytes(): index for index, image in enumerate(images)}
    for channel in range(3):
        found = [order[image.tobytes()] for image in np.ascontiguousarray(stacked[:, 2:30, 2:30, channel])]
        assert sorted(found) == list(range(50)) and (classes[found] == digits[:, channel]).all()
    assert len({tuple(image) for image in digits.tolist()}) > 40  # the channels' orders differ
    assert opened.labels[:4].tolist() == [768, 449, 391, 746]  # never changes
    assert len(open_source(tmp_path, image_size=32, image_channels=3, transform="stacked_mnist", split="held_out")) == 7


# Transforms
def test_celebas_box_is_cropped_and_squares_are_taken_as_cropped(tmp_path: Path) -> None:
    face, cropped = noise(1, 218, 178)[0], noise(1, 64)[0]
    for name, image in (("a.png", face), ("b.png", cropped)):
        (tmp_path / name).write_bytes(encoded(image))
    opened = source(tmp_path, size=148, transform="celeba")
    assert (opened.fitted(0) == face[40:188, 15:163]).all() and opened.fitted(1).shape == (148, 148, 3)
    (tmp_path / "b.png").write_bytes(encoded(noise(1, 178, 218)[0]))
    with pytest.raises(UserError, match="b.png does not fit transform celeba .it is 218x178, not 178x218 as CelebA"):
        pixels(opened)
    with pytest.raises(UserError, match="transform is 'celebA'; it must be one of square, celeba, pad"):
        source(tmp_path, transform="celebA")


def test_images_that_celebas_partition_names_and_are_not_there_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "000000.jpg").write_bytes(encoded(IMAGES[0], "PNG"))
    (tmp_path / "list_eval_partition.txt").write_bytes(b"000000.jpg 0\n000001.jpg 0\n\xff 1\n")
    with pytest.warns(
        UserWarning, match="lacks 1 of the images that list_eval_partition.txt puts into this split, such"
    ):
        assert len(source(tmp_path)) == 1


def test_celebas_partition_file_splits_its_folder(tmp_path: Path) -> None:
    (tmp_path / "img_align_celeba").mkdir()
    for index in range(6):
        (tmp_path / "img_align_celeba" / f"{index:06d}.jpg").write_bytes(encoded(IMAGES[index], "PNG"))
    parts = "".join(f"{index:06d}.jpg {index // 2}\n" for index in range(6))
    (tmp_path / "list_eval_partition.txt").write_text(parts)
    for root in (tmp_path, tmp_path / "img_align_celeba"):
        assert (pixels(source(root)) == IMAGES[:2]).all()
        assert (pixels(source(root, "held_out")) == IMAGES[2:4]).all()


# Finding
@pytest.mark.parametrize(
    "names, sentence",
    [
        (["a.zip", "b.zip"], "holds several data sets: a.zip, b.zip. Name one of them"),
        (["a.zip", "a.npy"], "holds containers of several kinds: 1 npy, such as a.npy; 1 zip, such as a.zip"),
        (["train.zip"], None),
        (["train.zip", "extra.zip"], "holds several data sets"),
    ],
)
def test_a_folder_of_containers_is_read_or_named(names: list[str], sentence: str | None, tmp_path: Path) -> None:
    for name in names:
        if name.endswith("zip"):
            write_zip(tmp_path / name, IMAGES)
        else:
            np.save(tmp_path / name, IMAGES)
    if sentence is None:
        assert len(source(tmp_path)) == 12
        return
    with pytest.raises(UserError, match=sentence):
        source(tmp_path)


def test_containers_whose_names_say_the_split_are_two_splits(tmp_path: Path) -> None:
    write_tar(tmp_path / "set-train-0.tar", shard(0, 1))
    write_tar(tmp_path / "set-train-1.tar", shard(2))
    write_tar(tmp_path / "set-val-0.tar", shard(3))
    write_tar(tmp_path / "set-test-0.tar", shard(4))
    with pytest.warns(UserWarning, match="set-test-0.tar belong to no split"):
        assert (pixels(source(tmp_path)) == IMAGES[:3]).all()
    with pytest.warns(UserWarning, match="set-test-0.tar"):
        assert (pixels(source(tmp_path, "held_out")) == IMAGES[3:4]).all()


def test_names_that_hold_the_name_of_a_split_in_a_word_are_of_none(tmp_path: Path) -> None:
    write_tar(tmp_path / "contest-0.tar", shard(0))
    write_tar(tmp_path / "restrained-0.tar", shard(1))
    assert (pixels(source(tmp_path)) == IMAGES[:2]).all()
    with pytest.raises(NoHeldOutError):
        source(tmp_path, "held_out")


@pytest.mark.parametrize("names", [("Train", "Val"), ("TRAIN", "Test"), ("training", "testing")])
def test_folders_of_splits_are_known_in_any_case(names: tuple[str, str], tmp_path: Path) -> None:
    for index, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(IMAGES[index]))
    for index, split in enumerate(("train", "held_out")):
        assert (pixels(source(tmp_path, split)) == IMAGES[index]).all()


def test_no_file_is_in_both_splits(tmp_path: Path) -> None:
    for index, name in enumerate(("val-set-train-0.tar", "val-set-test-0.tar")):
        write_tar(tmp_path / name, shard(index))
    assert (pixels(source(tmp_path)) == IMAGES[0]).all() and (pixels(source(tmp_path, "held_out")) == IMAGES[1]).all()


def test_what_has_no_held_out_images_says_so(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", IMAGES)
    write_nvae_lmdb(tmp_path / "b", {"train": raw(IMAGES)})
    np.save(tmp_path / "retrained.npy", IMAGES)
    for path in (tmp_path / "a.zip", tmp_path / "b" / "train.lmdb", tmp_path / "b", tmp_path / "retrained.npy"):
        with pytest.raises(NoHeldOutError, match="has no held-out images"):
            source(path, "held_out")


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("a.txt", b"text", "a.txt is not recognised. Give a folder of images, a zip"),
        ("a.png", encoded(IMAGES[0]), "a.png is one image; give the folder"),
        ("a.tfrecords", b"", "contains no images"),
        ("a.npy", b"", "a.npy is empty"),
        ("a.7z", b"7z\xbc\xaf", "not recognised"),
        ("a.h5", b"\x89HDF\r\n\x1a\n", "not recognised"),
    ],
)
def test_a_file_that_is_no_container_is_one_sentence(name: str, content: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        source(tmp_path / name)


def test_containers_are_known_by_their_content_whatever_their_ending(tmp_path: Path) -> None:
    write_zip(tmp_path / "zip.data", IMAGES)
    np.save(tmp_path / "a.npy", IMAGES)
    (tmp_path / "a.npy").rename(tmp_path / "npy.data")
    write_tar(tmp_path / "tar.data", shard(*range(12)))
    for name in ("zip.data", "npy.data", "tar.data"):
        assert (pixels(source(tmp_path / name)) == IMAGES).all()


# Identity
def test_the_digest_of_a_container_is_of_its_images(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", IMAGES)
    digest = source(tmp_path / "a.zip").digest()
    assert len(json.dumps(digest)) == 66
    (tmp_path / "moved").mkdir()
    (tmp_path / "a.zip").rename(tmp_path / "moved" / "b.zip")
    assert source(tmp_path / "moved" / "b.zip").digest() == digest
    write_zip(tmp_path / "a.zip", IMAGES[::-1])
    assert source(tmp_path / "a.zip").digest() != digest
    np.save(tmp_path / "a.npy", IMAGES)
    raw_digest = source(tmp_path / "a.npy").digest()
    np.save(tmp_path / "a.npy", IMAGES.reshape(12, 4, 16, 3))
    assert source(tmp_path / "a.npy").digest() != raw_digest
