"""`prepare`: every image once, checked, hashed and resized; damage by name; resumed; opened and checked again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.file_systems import files_of_at_most
from tests.helpers.image_containers import (
    encoded,
    glow_record,
    noise,
    write_cifar10,
    write_idx,
    write_nvae_lmdb,
    write_tar,
    write_tfrecord,
    write_zip,
)
from vaebm_fast.cli import main
from vaebm_fast.data import ArraySource, StoredImages, TorchLoader, digits, open_source
from vaebm_fast.data.containers.find import NoHeldOutError
from vaebm_fast.data.prepare import PrepareOptions, job, prepare, run, writers
from vaebm_fast.data.prepared import check
from vaebm_fast.runtime import extension
from vaebm_fast.runtime.errors import UserError

IMAGES = noise(12, 8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several sizes, formats and modes."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for index in range(20):
        image = noise(1, 8 + index % 3 * 5, 10 + index % 4 * 3, channels=1 if index % 5 == 0 else 3, seed=index)[0]
        format, ending = [("PNG", ".png"), ("JPEG", ".JPG"), ("WEBP", ".webp")][index % 3]
        (root / ("sub" if index % 2 else "") / f"{index:03d}{ending}").write_bytes(encoded(image, format))
    return root


def options(**changes: Any) -> PrepareOptions:
    return PrepareOptions(**{"size": 8, **changes})


def opened(out: Path, split: Any = "train", size: int = 8, channels: int = 3) -> Any:
    return open_source(out, image_size=size, image_channels=channels, split=split)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def everything(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"}


def test_a_prepared_array_has_the_pixels_and_order_of_its_source(folder: Path, tmp_path: Path) -> None:
    manifest = prepare(folder, tmp_path / "out", options())
    source, made = open_source(folder, image_size=8, image_channels=3), opened(tmp_path / "out")
    assert isinstance(made, ArraySource) and len(made) == 20
    assert (made.read(np.arange(20)) == source.read(np.arange(20))).all()
    array = np.load(tmp_path / "out" / "train.npy", mmap_mode="r")
    assert array.shape == (20, 8, 8, 3) and array.dtype == np.uint8
    assert made.digest() == manifest["splits"]["train"]["sha256"]
    assert manifest["splits"]["train"]["source_sha256"] == source.digest()
    assert check(tmp_path / "out") == []


def test_every_image_has_a_line_of_what_was_stored(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    rows = lines(tmp_path / "out" / "train.jsonl")
    assert [row["key"] for row in rows] == [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.*"))]
    row = rows[[row["key"] for row in rows].index("sub/001.JPG")]
    data = (folder / "sub" / "001.JPG").read_bytes()
    assert (row["bytes"], row["height"], row["width"]) == (len(data), 13, 13)
    assert row["sha256"] == __import__("hashlib").sha256(data).hexdigest()


def test_shards_keep_the_long_side_for_random_crops(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options(format="shards"))
    made, source = opened(tmp_path / "out"), open_source(folder, image_size=8, image_channels=3)
    assert isinstance(made, StoredImages) and isinstance(source, StoredImages)
    for index in range(20):
        assert (made.fitted(index) == source.fitted(index)).all()
    loaders = [TorchLoader(each, 5, seed=3, random_crop=True, horizontal_flip=True) for each in (made, source)]
    for step in range(6):
        first, second = (loader.batch(step) for loader in loaders)
        assert (first == second).all()
    assert check(tmp_path / "out") == []
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "train-00000.tar"), shardshuffle=False).decode("rgb8"))
    assert [sample["__key__"] for sample in samples] == [f"{index:08d}" for index in range(20)]
    assert (samples[7]["png"] == source.fitted(7)).all()


def test_several_shards_are_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "PER_SHARD", 5)
    monkeypatch.setattr(writers.ShardWriter, "block", 5)
    monkeypatch.setattr("vaebm_fast.data.prepared.PER_SHARD", 5)
    write_zip(tmp_path / "a.zip", IMAGES, list(range(12)))
    prepare(tmp_path / "a.zip", tmp_path / "out", options(format="shards"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"train-0000{n}.tar" for n in range(3)]
    made = opened(tmp_path / "out")
    assert (made.read(np.arange(12)) == IMAGES).all() and made.labels.tolist() == list(range(12))


def test_published_splits_are_kept_and_labels_with_them(tmp_path: Path) -> None:
    images, classes = noise(12, 32), [index % 10 for index in range(12)]
    write_cifar10(tmp_path / "cifar-10-batches-py", images, classes)
    prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-out", options(size=32))
    out = tmp_path.parent / f"{tmp_path.name}-out"
    for split, part in (("train", slice(10)), ("held_out", slice(10, 12))):
        made = opened(out, split, 32)
        assert (made.read(np.arange(len(made))) == images[part]).all() and made.labels.tolist() == classes[part]
    with pytest.raises(UserError, match="has held-out images of its own; leave --held-out away"):
        prepare(tmp_path, tmp_path.parent / f"{tmp_path.name}-2", options(size=32, held_out=0.1))


def test_a_share_is_held_out_the_same_way_each_time(folder: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        prepare(folder, tmp_path / out, options(held_out=0.25))
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    keys = [[row["key"] for row in lines(tmp_path / "one" / f"{split}.jsonl")] for split in ("train", "held_out")]
    assert list(map(len, keys)) == [15, 5] and len({*keys[0], *keys[1]}) == 20
    assert keys[1] == ["004.JPG", "008.webp", "016.JPG", "sub/001.JPG", "sub/003.png"]  # never changes
    prepare(folder, tmp_path / "whole", options())
    with pytest.raises(NoHeldOutError):
        opened(tmp_path / "whole", "held_out")


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="held_out is "):
        options(held_out=share)


def test_digits_and_idx_files_are_prepared_as_they_are_read(tmp_path: Path) -> None:
    prepare("digits", tmp_path / "digits", options(channels=1))
    made = opened(tmp_path / "digits", "held_out", channels=1)
    truth = digits(split="held_out")
    assert (made.images == truth.images).all() and (made.labels == truth.labels).all()
    (tmp_path / "idx").mkdir()
    for subset in ("train", "t10k"):
        write_idx(tmp_path / "idx" / f"{subset}-images-idx3-ubyte", noise(6, 28, channels=1)[..., 0])
        write_idx(tmp_path / "idx" / f"{subset}-labels-idx1-ubyte", np.arange(6, dtype=np.uint8))
    for transform, size in (("stacked_mnist", 32), ("pad", 30), ("square", 16), (None, 32)):
        out = tmp_path / f"{transform}"
        prepare(tmp_path / "idx", out, options(size=size, transform=transform))
        source = open_source(tmp_path / "idx", image_size=size, image_channels=3, transform=transform)  # type: ignore[arg-type]
        assert (opened(out, size=size).images == source.images).all()  # type: ignore[attr-defined]
        assert (opened(out, size=size).labels == source.labels).all()


def test_databases_and_records_are_prepared(tmp_path: Path) -> None:
    write_nvae_lmdb(tmp_path / "lmdb", {"train": [image.tobytes() for image in IMAGES], "validation": [bytes(192)]})
    (tmp_path / "tf").mkdir()
    write_tfrecord(tmp_path / "tf" / "a-r03.tfrecords", [glow_record(image) for image in IMAGES])
    for name in ("lmdb", "tf"):
        prepare(tmp_path / name, tmp_path / f"{name}-out", options())
        assert (opened(tmp_path / f"{name}-out").images == IMAGES).all()


def test_celebas_box_is_cropped_once_and_the_preset_reads_the_result(tmp_path: Path) -> None:
    faces = noise(3, 218, 178)
    write_zip(tmp_path / "celeba.zip", faces)
    prepare(tmp_path / "celeba.zip", tmp_path / "out", options(size=64, transform="celeba"))
    source = open_source(tmp_path / "celeba.zip", image_size=64, image_channels=3, transform="celeba")
    made = open_source(tmp_path / "out", image_size=64, image_channels=3, transform="celeba")
    assert (made.read(np.arange(3)) == source.read(np.arange(3))).all()
    uncropped = open_source(tmp_path / "celeba.zip", image_size=64, image_channels=3)
    assert (uncropped.read(np.arange(3)) != source.read(np.arange(3))).any()


# Damage
def damage(folder: Path) -> dict[str, str]:
    """Damage files of the folder; {name: why}."""
    jpeg, png = folder / "sub" / "007.JPG", folder / "sub" / "003.png"
    jpeg.write_bytes(jpeg.read_bytes()[:300])
    content = bytearray(png.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1
    png.write_bytes(content)
    (folder / "000.png").write_bytes(b"")
    (folder / "zz.gif").write_text("<html>")
    return {"sub/007.JPG": "runcated", "sub/003.png": "broken", "000.png": "empty", "zz.gif": "is no JPEG"}


def test_damaged_images_are_left_out_by_name_and_reason(folder: Path, tmp_path: Path) -> None:
    faults = damage(folder)
    (folder / "notes.txt").touch()
    with pytest.warns(UserWarning, match="1 file passed over"):
        manifest = prepare(folder, tmp_path / "out", options(on_bad="skip"))
    (folder / "notes.txt").unlink()
    left_out = {row["key"]: row["why"] for row in lines(tmp_path / "out" / "left_out.jsonl")}
    assert set(left_out) == {*faults, "notes.txt"} and "without an image's ending" in left_out["notes.txt"]
    assert all(part in left_out[name] for name, part in faults.items())
    assert not any("0x" in why or "\n" in why for why in left_out.values())
    assert (manifest["splits"]["train"]["images"], manifest["splits"]["train"]["damaged"]) == (17, 4)
    rows, made = lines(tmp_path / "out" / "train.jsonl"), opened(tmp_path / "out")
    assert not {row["key"] for row in rows} & set(faults) and len(made) == len(rows) == 17
    good = open_source(folder, image_size=8, image_channels=3)
    names = [row["key"] for row in rows]
    chosen = [good.container.names.index(name) for name in names]  # type: ignore[attr-defined]
    assert (made.images == good.read(np.array(chosen))).all()


def test_a_damaged_image_ends_the_command_unless_such_are_skipped(folder: Path, tmp_path: Path) -> None:
    damage(folder)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"000\.png cannot be used \(it is empty\)\. Replace it, or leave such imag"
        ):
            prepare(folder, tmp_path / "out", options())
    prepare(folder, tmp_path / "whole", options(on_bad="skip"))
    prepare(folder, tmp_path / "out", options(on_bad="skip"))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_source_of_damaged_images_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(b"x")
    with pytest.raises(UserError, match="has no image that can be read"):
        prepare(tmp_path / "set", tmp_path / "out", options(on_bad="skip"))


def test_an_image_that_is_withheld_ends_the_command_even_if_damaged_ones_are_skipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == "004.JPG":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match="004.JPG cannot be read as an image .Input/output error"):
        prepare(folder, tmp_path / "out", options(on_bad="skip"))
    monkeypatch.undo()
    prepare(folder, tmp_path / "out", options(on_bad="skip"))
    assert len(opened(tmp_path / "out")) == 20


def test_one_pixel_and_extreme_sides_are_prepared_or_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name, size in (("1x1", (1, 1)), ("3000x2", (3000, 2)), ("2x3000", (2, 3000)), ("1x65000", (1, 65000))):
        Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "set" / f"{name}.png")
    manifest = prepare(tmp_path / "set", tmp_path / "out", options(size=64, on_bad="skip"))
    assert manifest["splits"]["train"]["images"] == 3
    [row] = lines(tmp_path / "out" / "left_out.jsonl")
    assert row["key"] == "1x65000.png" and "resized to 64x4160000 is too large" in row["why"]
    assert (opened(tmp_path / "out", size=64).images == (10, 20, 30)).all()


def test_a_bomb_is_refused_without_taking_its_memory(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(encoded(IMAGES[0]))
    header = encoded(np.zeros((1, 1, 3), np.uint8))
    big = bytearray(header)
    big[16:24] = (60000).to_bytes(4, "big") * 2
    big[29:33] = __import__("zlib").crc32(bytes(big[12:29])).to_bytes(4, "big")
    (tmp_path / "set" / "bomb.png").write_bytes(big)
    prepare(tmp_path / "set", tmp_path / "out", options(on_bad="skip"))
    [row] = lines(tmp_path / "out" / "left_out.jsonl")
    assert row["key"] == "bomb.png" and "decompression bomb" in row["why"]


def test_repeated_images_are_counted_within_and_across_splits(tmp_path: Path) -> None:
    images = np.concatenate([IMAGES, IMAGES[:4]])
    write_zip(tmp_path / "a.zip", images)
    manifest = prepare(tmp_path / "a.zip", tmp_path / "out", options())
    assert manifest["splits"]["train"]["repeated"] == 4 and manifest["in_both_splits"] == 0
    for split, part in (("train", IMAGES), ("test", IMAGES[:5])):
        write_tar(tmp_path / f"{split}.tar", {f"{index}.png": encoded(image) for index, image in enumerate(part)})
    (tmp_path / "tars").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"{split}.tar").rename(tmp_path / "tars" / f"{split}.tar")
    assert prepare(tmp_path / "tars", tmp_path / "out2", options())["in_both_splits"] == 5


# Stopping and going on
STOPPED = """
import os, sys
from pathlib import Path
from vaebm_fast.data.prepare import PrepareOptions, job, prepare, writers
writers.BLOCK = 3
module_append, saves = job.append, []
def append(path, data):
    saves.append(path)
    if len(saves) == int(sys.argv[3]) and sys.argv[4] == "before": os.kill(os.getpid(), 9)
    module_append(path, data[: len(data) // 2] if len(saves) == int(sys.argv[3]) and sys.argv[4] == "within" else data)
    if len(saves) == int(sys.argv[3]): os.kill(os.getpid(), 9)
job.append = append
prepare(sys.argv[1], Path(sys.argv[2]), PrepareOptions(size=8, held_out=0.25, on_bad="skip"))
"""


@pytest.mark.parametrize("save, at", [(2, "within"), (3, "after"), (5, "before")])
def test_a_killed_run_goes_on_and_ends_as_an_undisturbed_one(save: int, at: str, folder: Path, tmp_path: Path) -> None:
    damage(folder)
    prepare(folder, tmp_path / "whole", options(held_out=0.25, on_bad="skip"))
    for number in (save, 1):  # twice
        arguments = [sys.executable, "-c", STOPPED, str(folder), str(tmp_path / "out"), str(number), at]
        assert subprocess.run(arguments, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == -9
    with pytest.raises(UserError, match="out is not complete; run the same `vaebm-fast prepare` again"):
        opened(tmp_path / "out")
    prepare(folder, tmp_path / "out", options(held_out=0.25, on_bad="skip"))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_stopped_run_does_not_decode_again_what_it_saved(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "BLOCK", 4)
    source = open_source(folder, image_size=8, image_channels=3)
    last = source.container.read(10)  # type: ignore[attr-defined]
    decoding, seen = job.decoding, []

    def counted(record: bytes, channels: int) -> Any:
        seen.append(record)
        if record == last and seen.count(last) == 1:
            raise KeyboardInterrupt
        return decoding(record, channels)

    monkeypatch.setattr(job, "decoding", counted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", options())
    assert len(lines(tmp_path / "out" / ".partial" / "train.journal")) == 10
    before = len(seen)
    prepare(folder, tmp_path / "out", options())
    assert len(seen) - before == 10
    assert check(tmp_path / "out") == []


def test_moving_the_files_in_goes_on_where_it_was_stopped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(folder, tmp_path / "whole", options())
    replace = os.replace

    def stopping(source: Any, target: Any) -> None:
        if Path(target).name == "prepared.json" and Path(target).parent.name == "out":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", options())
    monkeypatch.undo()
    assert (tmp_path / "out" / "train.npy").exists(), "the manifest comes last"
    with pytest.raises(UserError, match="is not complete"):
        opened(tmp_path / "out")
    shutil.rmtree(folder)
    folder.mkdir()
    prepare(folder, tmp_path / "out", options())
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_full_disk_is_named_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "whole", options())
    with files_of_at_most(2500), pytest.raises(OSError) as raised:
        prepare(folder, tmp_path / "out", options())
    assert str(tmp_path / "out") in str(raised.value.filename)
    prepare(folder, tmp_path / "out", options())
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 50, 50))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="out has 5e-08 GB free; the images need 3.84e-06 GB"):
        prepare(folder, tmp_path / "out", options())


def test_a_complete_set_is_left_as_it_is_and_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    before = everything(tmp_path / "out")
    shutil.rmtree(folder)
    prepare(folder, tmp_path / "out", options())
    with pytest.raises(UserError, match=r"out was made with other settings \(size was 8 and is 16\); use the same"):
        prepare(folder, tmp_path / "out", options(size=16))
    with pytest.raises(UserError, match="source was .* and is digits"):
        prepare("digits", tmp_path / "out", options())
    assert everything(tmp_path / "out") == before


def test_images_that_changed_since_a_stopped_run_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "sub" / "zz.png").write_bytes(b"x")
    with pytest.raises(UserError, match="zz.png cannot be used"):
        prepare(folder, tmp_path / "out", options())
    (folder / "000.png").unlink()
    with pytest.raises(UserError, match="its images have changed"):
        prepare(folder, tmp_path / "out", options())


def test_a_folder_with_other_files_is_not_touched(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    for out in (folder, folder / "sub", folder / "new", folder / "sub" / ".." / "new"):
        with pytest.raises(UserError, match="lies in .*images, of which it would be made; name another folder"):
            prepare(folder, out, options())
    with pytest.raises(UserError, match="holds other files, such as 000.png; name a new or empty folder"):
        prepare("digits", folder, options())
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; name a new folder"):
        prepare(folder, tmp_path / "file", options())


@pytest.mark.parametrize("limit", range(1500, 4200, 300))
def test_a_disk_that_fills_at_any_byte_costs_no_image(limit: int, folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "whole", options())
    with files_of_at_most(limit), suppress(OSError):
        prepare(folder, tmp_path / "out", options())
    prepare(folder, tmp_path / "out", options())
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")


def test_an_interruption_at_any_point_costs_no_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "BLOCK", 4)
    prepare(folder, tmp_path / "whole", options())
    for at in range(1, 60, 3):
        calls = [0]

        def traced(frame: Any, event: str, _: Any, calls: list[int] = calls, at: int = at) -> Any:
            if frame.f_code.co_filename.endswith(("prepare/run.py", "prepare/job.py", "prepare/writers.py")):
                calls[0] += 1
                if calls[0] == 40 * at:
                    raise KeyboardInterrupt
                return traced
            return None

        sys.settrace(traced)
        try:
            prepare(folder, tmp_path / f"{at}", options())
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        prepare(folder, tmp_path / f"{at}", options())
        assert everything(tmp_path / f"{at}") == everything(tmp_path / "whole"), at


def test_images_with_other_content_are_refused_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "BLOCK", 4)
    np.save(tmp_path / "a.npy", IMAGES)
    append = job.append

    def stopping(path: Path, data: bytes) -> None:
        append(path, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "append", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "a.npy", tmp_path / "out", options())
    monkeypatch.undo()
    np.save(tmp_path / "a.npy", IMAGES[::-1])
    with pytest.raises(UserError, match=r"a\.npy, image 0 has changed since this was begun"):
        prepare(tmp_path / "a.npy", tmp_path / "out", options())
    np.save(tmp_path / "a.npy", IMAGES)
    prepare(tmp_path / "a.npy", tmp_path / "out", options())
    assert (opened(tmp_path / "out").images == IMAGES).all()


def test_other_settings_are_refused_while_files_are_moved_in(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "sync", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "out", options())
    monkeypatch.undo()
    (tmp_path / "out" / "prepared.json").rename(tmp_path / "out" / ".partial" / "prepared.json")
    with pytest.raises(UserError, match="size was 8 and is 4"):
        prepare(folder, tmp_path / "out", options(size=4))
    prepare(folder, tmp_path / "out", options())
    assert not (tmp_path / "out" / ".partial").exists() and check(tmp_path / "out") == []


def test_what_killed_writers_left_is_not_moved_in(folder: Path, tmp_path: Path) -> None:
    (folder / "000.png").write_bytes(b"")
    with pytest.raises(UserError):
        prepare(folder, tmp_path / "out", options())
    (tmp_path / "out" / ".partial" / f".train-00000.tar.{'0' * 32}.tmp").touch()
    prepare(folder, tmp_path / "out", options(on_bad="skip"))
    assert not any("tmp" in path.name for path in (tmp_path / "out").iterdir())


def test_a_share_that_leaves_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", IMAGES[:1])
    with pytest.raises(UserError, match="held_out is 0.6, which leaves none of 1 images to train on"):
        prepare(tmp_path / "a.zip", tmp_path / "out", options(held_out=0.6))
    assert not (tmp_path / "out").exists()


def test_celebas_images_without_their_box_are_told_of(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", noise(2, 218, 178))
    with pytest.warns(UserWarning, match="published figures are of --transform celeba"):
        prepare(tmp_path / "a.zip", tmp_path / "out", options())
    prepare(tmp_path / "a.zip", tmp_path / "boxed", options(transform="celeba"))
    with pytest.raises(UserError, match="was prepared with transform square; this needs celeba"):
        open_source(tmp_path / "out", image_size=8, image_channels=3, transform="celeba")
    assert len(open_source(tmp_path / "boxed", image_size=8, image_channels=3, transform="celeba")) == 2


def test_images_that_a_transform_does_not_fit_are_not_left_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not fit transform celeba .it is .*choose another one, such as square"):
        prepare(folder, tmp_path / "out", options(transform="celeba", on_bad="skip"))


# Opening and checking
def test_what_was_prepared_for_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    for size, channels in ((16, 3), (8, 1)):
        with pytest.raises(UserError, match=f"was prepared at 8x8 with 3 channels; this needs {size}x{size} with"):
            opened(tmp_path / "out", size=size, channels=channels)


def spoil_array(out: Path) -> None:
    data = bytearray((out / "train.npy").read_bytes())
    data[128 + 5 * 192 + 7] ^= 1
    (out / "train.npy").write_bytes(data)


def spoil_list(out: Path) -> None:
    rows = (out / "train.jsonl").read_text().splitlines(keepends=True)
    (out / "train.jsonl").write_text("".join(rows[::-1]))


def test_check_names_the_image_that_changed(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    key = lines(tmp_path / "out" / "train.jsonl")[5]["key"]
    spoil_array(tmp_path / "out")
    assert check(tmp_path / "out") == [f"{tmp_path / 'out'}, train, {key}: other pixels than were prepared"]
    prepare(folder, tmp_path / "again", options())
    spoil_list(tmp_path / "again")
    [fault] = check(tmp_path / "again")
    assert "train.jsonl is not the list of images that the manifest describes" in fault


def test_check_sees_labels_and_an_edited_manifest(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", IMAGES, list(range(12)))
    for name in ("labels", "list", "manifest"):
        prepare(tmp_path / "a.zip", tmp_path / name, options())
    np.save(tmp_path / "labels" / "train_labels.npy", np.zeros(12, np.int64))
    assert check(tmp_path / "labels") == [
        f"{tmp_path / 'labels' / 'train'}_labels.npy has other classes than train.jsonl"
    ]
    rows = tmp_path / "list" / "train.jsonl"
    rows.write_text(rows.read_text().replace('"label": 7', '"label": 8'))
    assert "is not the list of images" in check(tmp_path / "list")[0]
    manifest = tmp_path / "manifest" / "prepared.json"
    manifest.write_text(manifest.read_text().replace('"square"', '"celeba"'))
    with pytest.raises(UserError, match="prepared.json is damaged or was edited"):
        check(tmp_path / "manifest")
    with pytest.raises(UserError, match="was not made by `vaebm-fast prepare`"):
        check(tmp_path)


def test_check_names_the_image_of_a_shard_that_changed(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options(format="shards"))
    shard = tmp_path / "out" / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT", data.index(b"00000004.png")) + 10
    data[at] ^= 255
    shard.write_bytes(data)
    [fault] = check(tmp_path / "out")
    assert lines(tmp_path / "out" / "train.jsonl")[4]["key"] in fault


@pytest.mark.parametrize(
    "name, content, sentence",
    [
        ("prepared.json", "{", "prepared.json is damaged"),
        ("prepared.json", '{"version": 99}', "is of version 99, this vaebm-fast reads 1"),
        ("train.npy", "", "train.npy is damaged"),
        ("train.jsonl", '{"name": 1}', "train.jsonl is damaged"),
    ],
)
def test_damaged_files_of_a_set_are_one_sentence(
    name: str, content: str, sentence: str, folder: Path, tmp_path: Path
) -> None:
    prepare(folder, tmp_path / "out", options())
    (tmp_path / "out" / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        check(tmp_path / "out")


def test_an_array_of_another_set_is_refused_when_it_is_opened(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    np.save(tmp_path / "out" / "train.npy", noise(19, 8))
    with pytest.raises(UserError, match=r"train\.npy is uint8\[19, 8, 8, 3\], not uint8\[20, 8, 8, 3\]"):
        opened(tmp_path / "out")


def test_a_truncated_array_is_refused_when_it_is_opened(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    os.truncate(tmp_path / "out" / "train.npy", 1000)
    with pytest.raises(UserError, match="train.npy is damaged"):
        opened(tmp_path / "out")


def test_the_identity_of_a_prepared_set_is_not_hashed_again(folder: Path, tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", options())
    made = opened(tmp_path / "out")
    spoil_array(tmp_path / "out")  # --check finds it, a start does not look
    assert opened(tmp_path / "out").digest() == made.digest() == TorchLoader(made, 4).settings()["data_sha256"]


def test_threads_take_no_more_images_than_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory: what is decoded ahead of the writer is bounded."""
    write_zip(tmp_path / "a.zip", noise(200, 8))
    decoding, ahead, most = job.decoding, [0], [0]

    def counted(*arguments: Any) -> Any:
        ahead[0] += 1
        most[0] = max(most[0], ahead[0])
        return decoding(*arguments)

    def slow(*_: Any) -> None:
        time.sleep(0.001)
        ahead[0] -= 1

    monkeypatch.setattr(job, "decoding", counted)
    monkeypatch.setattr(job.Job, "_require_usable", slow)
    prepare(tmp_path / "a.zip", tmp_path / "out", options())
    assert most[0] <= (job.AHEAD + 1) * len(os.sched_getaffinity(0)) + 2


# The command
def test_the_command_prepares_checks_and_names_what_is_wrong(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["prepare", str(folder), out, "--size", "8", "--held-out", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "15 images of 8x8x3" in said and "5 images of 8x8x3" in said and f"--data {out}" in said
    assert main(["prepare", "--check", out]) == 0
    assert f"{out} is sound: 15 images of train, 5 images of held_out." in capsys.readouterr().out
    spoil_array(Path(out))
    assert main(["prepare", "--check", out]) == 1
    assert "error:" in (said := capsys.readouterr().err) and "other pixels than were prepared" in said
    assert main(["prepare", str(folder), out]) == 1
    assert "Give the images, a new folder and --size" in capsys.readouterr().err
    assert main(["prepare", "--check", str(folder), out]) == 1
    assert "Give --check one folder" in capsys.readouterr().err
    damage(folder)
    assert main(["prepare", str(folder), f"{out}2", "--size", "8", "--on-bad", "skip"]) == 0
    said = capsys.readouterr().out
    assert f"4 damaged images and 0 other files, listed in {out}2/left_out.jsonl" in said


def test_a_jpeg_damaged_in_the_middle_is_found_though_pillow_reads_it(tmp_path: Path) -> None:
    if not extension.is_available():
        pytest.skip("the compiled part checks the streams of JPEG files")
    (tmp_path / "set").mkdir()
    scene = np.asarray(Image.fromarray(noise(1, 12)[0]).resize((96, 96), Image.Resampling.BICUBIC))
    data = bytearray(encoded(scene, "JPEG", quality=90))
    (tmp_path / "set" / "whole.jpg").write_bytes(data)
    scan = data.index(b"\xff\xda") + 20
    data[scan : scan + 64] = bytes(64)
    (tmp_path / "set" / "damaged.jpg").write_bytes(data)
    with Image.open(tmp_path / "set" / "damaged.jpg") as image:
        image.load()
    with pytest.raises(UserError, match=r"damaged\.jpg cannot be used \(.* at byte \d+\)"):
        prepare(tmp_path / "set", tmp_path / "out", options())
    prepare(tmp_path / "set", tmp_path / "out", options(on_bad="skip"))
    assert [row["key"] for row in lines(tmp_path / "out" / "left_out.jsonl")] == ["damaged.jpg"]
