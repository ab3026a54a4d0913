"""Image decoding and resizing, the three sources, the plan of an epoch, and conversion to tensors."""

from __future__ import annotations

import gzip
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from tests.helpers.golden import case_path
from vaebm_fast.data import TorchLoader, UnreadableDataError, digits, mnist, open_source, quantise, to_input, to_tensor
from vaebm_fast.data.containers import ImageFolder
from vaebm_fast.data.containers.folder import FolderListing
from vaebm_fast.data.images import Pixels, crop_square, decode, decoding, resize_short_side, with_channels
from vaebm_fast.data.plan import plan_epoch
from vaebm_fast.data.sources import StoredImages
from vaebm_fast.runtime.errors import UserError

ORIENTATION = 0x0112  # EXIF tag


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    """An image 12 pixels wide and 8 high whose left and right halves have one colour each."""
    image = Image.new(mode, (12, 8), left)
    image.paste(right, (6, 0, 12, 8))
    return image


def read_image(path: Path, channels: int) -> Pixels:
    return decode(path.read_bytes(), channels)


def grey16(left: int, right: int) -> Image.Image:
    samples = np.full((8, 12), left, np.uint16)
    samples[:, 6:] = right
    return Image.fromarray(samples)


def palette() -> Image.Image:
    image = halves("P", 0, 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return image


FORMATS = {
    "grey.png": (halves("L", 50, 200), {}, (50, 50, 50), (200, 200, 200)),
    "palette.png": (palette(), {}, (10, 20, 30), (200, 100, 50)),
    "transparent_palette.png": (palette(), {"transparency": 1}, (10, 20, 30), (0, 0, 0)),
    "one_bit.png": (halves("1", 0, 1), {}, (0, 0, 0), (255, 255, 255)),
    "alpha.png": (halves("RGBA", (200, 100, 50, 128), (9, 8, 7, 0)), {}, (100, 50, 25), (0, 0, 0)),
    "grey_alpha.png": (halves("LA", (200, 255), (200, 51)), {}, (200, 200, 200), (40, 40, 40)),
    "key_colour.png": (halves("RGB", (1, 2, 3), (4, 5, 6)), {"transparency": (4, 5, 6)}, (1, 2, 3), (0, 0, 0)),
    "sixteen_bits.png": (grey16(0x1234, 0xFFFF), {}, (0x12, 0x12, 0x12), (255, 255, 255)),
    "sixteen_bits.tif": (grey16(0x0100, 0x80FF), {}, (1, 1, 1), (128, 128, 128)),
    "cmyk.TIFF": (halves("CMYK", (0, 255, 0, 51), (255, 0, 255, 0)), {}, (204, 0, 204), (0, 255, 0)),
    "cmyk.jpg": (halves("CMYK", (0, 255, 0, 51), (255, 0, 255, 0)), {"quality": 100}, (204, 0, 204), (0, 255, 0)),
    "colour.JPEG": (halves("RGB", (90, 60, 30), (90, 60, 30)), {"quality": 100}, (90, 60, 30), (90, 60, 30)),
    "colour.webp": (halves("RGB", (1, 2, 3), (250, 9, 99)), {"lossless": True}, (1, 2, 3), (250, 9, 99)),
    "colour.bmp": (halves("RGB", (1, 2, 3), (250, 9, 99)), {}, (1, 2, 3), (250, 9, 99)),
    "palette.GIF": (palette(), {}, (10, 20, 30), (200, 100, 50)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_becomes_upright_rgb(name: str, tmp_path: Path) -> None:
    image, options, left, right = FORMATS[name]
    image.save(tmp_path / name, **options)
    pixels = read_image(tmp_path / name, channels=3)
    assert pixels.shape == (8, 12, 3) and pixels.dtype == np.uint8
    tolerance = 2 if name.lower().endswith(("jpg", "jpeg")) else 0
    inner = pixels[:, [2, 9]].astype(int)  # away from the edge, where JPEG rings
    np.testing.assert_allclose(inner, np.broadcast_to([left, right], inner.shape), atol=tolerance)


def test_one_channel_is_the_luma_of_rgb_and_grey_stays_itself(tmp_path: Path) -> None:
    halves("RGB", (100, 150, 200), (7, 7, 7)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", channels=1)
    assert pixels.shape == (8, 12, 1)
    assert pixels[0, 0, 0] == round((299 * 100 + 587 * 150 + 114 * 200) / 1000)
    assert pixels[0, 9, 0] == 7


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation, turns", [(1, 0), (3, 2), (6, -1), (8, 1)])
def test_exif_orientation_is_applied_once(name: str, orientation: int, turns: int, tmp_path: Path) -> None:
    stored = halves("RGB", (0, 0, 0), (240, 240, 240))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / name, exif=exif)
    expected = np.rot90(np.asarray(stored), turns)
    np.testing.assert_allclose(read_image(tmp_path / name, 3).astype(int), expected, atol=12)


ODD_TAGS = {
    "signed resolution": bytes.fromhex("011a 000a 00000001 00000026"),  # XResolution as SRATIONAL
    "negative size": bytes.fromhex("0100 0009 00000001 fffffffb"),  # ImageWidth as SLONG -5
    "unknown type": bytes.fromhex("0132 00ff 00000001 00000000"),
    "outside": bytes.fromhex("9286 0007 00001000 00ffff00"),  # UserComment beyond the end
}


def with_exif(tags: list[bytes], tail: bytes = b"") -> bytes:
    """A big-endian EXIF block; its directory begins at 8, `tail` is at 38 behind two entries."""
    return (
        b"Exif\0\0MM\0*" + bytes.fromhex("00000008") + len(tags).to_bytes(2, "big") + b"".join(tags) + bytes(4) + tail
    )


@pytest.mark.parametrize("odd", ODD_TAGS)
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_an_image_is_turned_whatever_else_its_metadata_hold(name: str, odd: str, tmp_path: Path) -> None:
    orientation = bytes.fromhex("0112 0003 00000001 0006 0000")
    tags = sorted([orientation, ODD_TAGS[odd]])
    stored = halves("RGB", (0, 0, 0), (240, 240, 240))
    stored.save(tmp_path / name, exif=with_exif(tags, bytes.fromhex("ffffffff 00000002")))
    expected = np.rot90(np.asarray(stored), -1)
    np.testing.assert_allclose(read_image(tmp_path / name, 3).astype(int), expected, atol=12)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0broken", with_exif([bytes.fromhex("0112 0002 00000004 36000000")]), with_exif([b"\x01\x12"])]
)
def test_an_orientation_that_cannot_be_read_is_none(exif: bytes, tmp_path: Path) -> None:
    stored = halves("RGB", (0, 0, 0), (240, 240, 240))
    stored.save(tmp_path / "a.jpg", exif=exif)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg", 3).astype(int), np.asarray(stored), atol=12)


def test_memory_that_runs_out_is_no_damage_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves("L", 1, 2).save(tmp_path / "a.png")

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", full)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png", 3)
    with pytest.raises(UnreadableDataError, match="The images of step 3 do not fit in memory"):
        TorchLoader(open_source(tmp_path, image_size=8, image_channels=3), 1).batch(3)


def damaged_files(folder: Path) -> dict[str, Path]:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    paths = {name: folder / name for name in ("cut.jpg", "cut.png", "empty.png", "text.png", "header.gif", "float.tif")}
    for name in ("cut.jpg", "cut.png"):
        noise.save(paths[name])
        paths[name].write_bytes(paths[name].read_bytes()[:2000])
    paths["empty.png"].touch()
    paths["text.png"].write_text("<!DOCTYPE html>")
    paths["header.gif"].write_bytes(b"GIF89a")
    Image.new("F", (8, 8), 0.5).save(paths["float.tif"])
    return paths


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png", "empty.png", "text.png", "header.gif", "float.tif"])
def test_a_file_that_cannot_be_read_is_named_and_never_left_out(name: str, tmp_path: Path) -> None:
    path = damaged_files(tmp_path)[name]
    for other in tmp_path.iterdir():
        if other != path:
            other.unlink()
    halves("RGB", (1, 1, 1), (2, 2, 2)).save(tmp_path / "good.png")
    source = open_source(tmp_path, image_size=8, image_channels=3)
    assert len(source) == 2
    with pytest.raises(ValueError, match=name):
        TorchLoader(source, 2).batch(0)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 24),
    value=st.integers(0, 255),
    channels=st.sampled_from([1, 3]),
)
@settings(deadline=None, max_examples=100)
def test_resizing_keeps_constants_and_gives_the_exact_side(
    height: int, width: int, size: int, value: int, channels: int
) -> None:
    resized = resize_short_side(np.full((height, width, channels), value, np.uint8), size)
    assert min(resized.shape[:2]) == size and resized.shape[2] == channels
    assert abs(max(resized.shape[:2]) - max(height, width) * size / min(height, width)) <= 0.5
    assert (resized == value).all()
    assert crop_square(resized, size).shape == (size, size, channels)


def test_resizing_is_antialiased() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[:, :, None]
    assert np.abs(resize_short_side(board, 8).astype(int) - 127.5).max() <= 1


def test_the_crop_is_central_unless_placed_and_places_reach_both_ends() -> None:
    pixels = np.broadcast_to(np.arange(7, dtype=np.uint8)[None, :, None], (3, 7, 1))
    assert crop_square(pixels, 3)[0, :, 0].tolist() == [2, 3, 4]
    lefts = [int(crop_square(pixels, 3, 0.0, place)[0, 0, 0]) for place in np.linspace(0, 1, 1000, endpoint=False)]
    assert np.bincount(lefts).tolist() == [200] * 5


def test_a_folder_is_read_in_the_order_of_relative_paths_whatever_the_case(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "b/10.jpeg", "a.JPG", "c/d/e.Tiff"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        halves("RGB", (1, 1, 1), (2, 2, 2)).save(tmp_path / name)
    source = StoredImages(ImageFolder(FolderListing(tmp_path)), image_size=8, image_channels=3)
    assert [path.relative_to(tmp_path).as_posix() for path in source.container.files] == [
        "a.JPG", "b/10.jpeg", "b/2.PNG", "c/d/e.Tiff",
    ]  # fmt: skip
    assert source.read(np.array([3, 0])).shape == (2, 8, 8, 3)


def test_the_cache_spares_decoding_up_to_its_limit(tmp_path: Path) -> None:
    for index in range(3):
        Image.new("L", (12, 8), index).save(tmp_path / f"{index}.png")
    source = StoredImages(ImageFolder(FolderListing(tmp_path)), image_size=8, image_channels=1, cache_bytes=2 * 12 * 8)
    before = source.read(np.arange(3))
    for path in source.container.files:
        path.unlink()
    assert (source.read(np.arange(2)) == before[:2]).all()
    with pytest.raises(ValueError, match=r"2\.png"):
        source.read(np.array([2]))


def test_digits_are_scikit_learns_scaled_to_bytes_and_parted_without_overlap() -> None:
    truth = load_digits()
    train, held_out = digits(split="train"), digits(split="held_out")
    assert (len(train), len(held_out)) == (898, 899)
    assert train.image_shape == (1, 8, 8)
    both = np.concatenate([train.images, held_out.images])[..., 0]
    labels = np.concatenate([train.labels, held_out.labels])
    expected = np.floor(truth.images * 255 / 16 + 0.5).astype(np.uint8)
    found = sorted(zip(map(bytes, both), labels, strict=True))
    assert found == sorted(zip(map(bytes, expected), truth.target, strict=True))
    assert np.bincount(train.labels).min() > 70


def test_digits_come_in_any_size_with_equal_channels() -> None:
    source = digits(image_size=20, image_channels=3)
    images = source.read(np.arange(5))
    assert source.image_shape == (3, 20, 20) and images.shape == (5, 20, 20, 3)
    assert (images == images[..., :1]).all()


def write_idx(path: Path, magic: int, array: npt.NDArray[np.uint8], cut: int | None = None) -> None:
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()
    data = data[:cut]
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_images_are_padded_with_zeros_and_carry_their_labels(suffix: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), np.uint8), np.arange(5, dtype=np.uint8)
    write_idx(tmp_path / f"train-images-idx3-ubyte{suffix}", 2051, images)
    write_idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", 2049, labels)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", 2051, images[:2])
    source = open_source(tmp_path, image_size=32, image_channels=1)
    padded = source.read(np.arange(5))
    assert padded.shape == (5, 32, 32, 1)
    assert (padded[:, 2:30, 2:30, 0] == images).all() and padded.sum() == images.sum()
    assert source.labels is not None and source.labels.tolist() == [0, 1, 2, 3, 4]
    held_out = open_source(tmp_path, image_size=28, image_channels=3, split="held_out")
    assert held_out.labels is None and (held_out.read(np.arange(2)) == images[:2, ..., None]).all()


@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize(
    "layout",
    [
        "{}.idx{}-ubyte",
        "raw/{}-idx{}-ubyte",
        "MNIST/raw/{}-idx{}-ubyte",
        "raw/{}.idx{}-ubyte",
        "{0}-idx{1}-ubyte/{0}-idx{1}-ubyte",
        "MNIST/{}-idx{}-ubyte",
    ],
)
def test_idx_files_are_found_as_common_tools_leave_them(layout: str, end: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for subset, count in (("train", 5), ("t10k", 3)):
        for what, magic, array in (("images", 2051, images), ("labels", 2049, np.arange(5, dtype=np.uint8))):
            path = tmp_path / (layout.format(f"{subset}-{what}", 3 if what == "images" else 1) + end)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_idx(path, magic, array[:count])
    source = open_source(tmp_path, image_size=28, image_channels=1)
    assert (source.read(np.arange(5))[..., 0] == images).all() and source.labels is not None
    assert source.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(open_source(tmp_path, image_size=32, image_channels=3, split="held_out")) == 3


def test_idx_files_may_be_parted_into_folders(tmp_path: Path) -> None:
    for folder, subset, count in (("train", "train", 3), ("test", "t10k", 2)):
        (tmp_path / folder / "raw").mkdir(parents=True)
        for path in (tmp_path / folder, tmp_path / folder / "raw"):  # a copy, as unpacking leaves it
            write_idx(path / f"{subset}-images-idx3-ubyte", 2051, np.zeros((count, 28, 28), np.uint8))
    assert len(open_source(tmp_path, image_size=28, image_channels=1)) == 3
    assert len(open_source(tmp_path, image_size=28, image_channels=1, split="held_out")) == 2


def test_several_data_sets_of_idx_files_are_named(tmp_path: Path) -> None:
    for name in ("MNIST", "FashionMNIST"):
        (tmp_path / name / "raw").mkdir(parents=True)
        write_idx(tmp_path / name / "raw" / "train-images-idx3-ubyte", 2051, np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(UserError, match="holds several data sets: .*FashionMNIST/raw, .*/MNIST/raw. Name one"):
        open_source(tmp_path, image_size=28, image_channels=1)
    assert len(open_source(tmp_path / "MNIST", image_size=28, image_channels=1)) == 1


@pytest.mark.parametrize(
    "file, magic, shape, cut, sentence",
    [
        ("train-images-idx3-ubyte", 2049, (5, 28, 28), None, "magic number is 2049, not 2051"),
        ("train-images-idx3-ubyte", 2051, (5, 28, 28), 3000, r"is truncated: its header specifies 5 x 28 x 28 = 3920"),
        ("train-images-idx3-ubyte.gz", 2051, (5, 28, 28), 7, "7 bytes cannot hold the 16-byte idx header"),
        ("train-images-idx3-ubyte", 2051, (0, 28, 28), None, "contains no images"),
        ("train-images-idx3-ubyte", 2051, (5, 27, 28), None, "contains 27x28 images"),
        ("train-images-idx3-ubyte", 2051, (5, 29, 29), None, "try size 29 or 33"),
        ("train-labels-idx1-ubyte", 2049, (4,), None, "contains 4 labels for 5 images"),
        ("train-labels-idx1-ubyte", 2051, (5,), None, "magic number is 2051, not 2049"),
    ],
)
def test_wrong_idx_files_are_named(
    file: str, magic: int, shape: tuple[int, ...], cut: int | None, sentence: str, tmp_path: Path
) -> None:
    if "labels" in file:
        write_idx(tmp_path / "train-images-idx3-ubyte.gz", 2051, np.zeros((5, 28, 28), np.uint8))
    write_idx(tmp_path / file, magic, np.zeros(shape, np.uint8), cut)
    with pytest.raises(ValueError, match=f"{file}.*{sentence}"):
        mnist(tmp_path)


def test_a_truncated_gzip_file_and_surplus_bytes_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    write_idx(path, 2051, np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is a truncated or damaged gzip file"):
        mnist(tmp_path)
    path.unlink()
    write_idx(tmp_path / path.stem, 2051, np.zeros((1, 28, 28), np.uint8))
    with open(tmp_path / path.stem, "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="is too long"):
        mnist(tmp_path)


def test_a_split_folder_reads_its_own_part(tmp_path: Path) -> None:
    for name, total in (("train", 3), ("validation", 2)):
        (tmp_path / name).mkdir()
        for index in range(total):
            Image.new("L", (8, 8), index).save(tmp_path / name / f"{index}.png")
    sizes = {
        split: len(open_source(tmp_path, image_size=8, image_channels=1, split=split))  # type: ignore[arg-type]
        for split in ("train", "held_out")
    }
    assert sizes == {"train": 3, "held_out": 2}


def test_images_beside_the_folders_of_a_split_are_told_of(tmp_path: Path) -> None:
    for name in ("train/1.png", "val/2.png", "extra/3.png", "4.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name)
    (tmp_path / "readme.txt").touch()
    (tmp_path / ".git").mkdir()
    said = f"{tmp_path}: only train/ is read; 2 folders and images beside it are left out, such as 4.png"
    with pytest.warns(UserWarning, match=said):
        assert len(open_source(tmp_path, image_size=8, image_channels=1)) == 1


@pytest.mark.parametrize(
    "name, options, error, sentence",
    [
        ("missing", {}, FileNotFoundError, "missing does not exist"),
        ("file.zip", {}, ValueError, r"file\.zip is empty"),
        ("empty", {}, ValueError, "empty has no images: it is empty"),
        ("texts", {}, ValueError, "texts has no images: none of its 1 files is one: 1 without"),
        ("images", {"split": "held_out"}, ValueError, "images has no held-out images.*--split train"),
        ("images", {"split": "test"}, ValueError, "split is 'test'; it must be train or held_out"),
        ("images", {"image_channels": 2}, ValueError, "image_channels is 2"),
        ("images", {"image_size": 0}, ValueError, "image_size is 0"),
        ("idx", {"split": "held_out"}, FileNotFoundError, "idx has neither t10k-images.*--split train"),
    ],
)
def test_a_source_that_does_not_fit_is_one_sentence(
    name: str, options: dict[str, Any], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    for folder in ("empty", "texts", "images", "idx"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file.zip").touch()
    (tmp_path / "texts" / "a.txt").touch()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    write_idx(tmp_path / "idx" / "train-images-idx3-ubyte", 2051, np.zeros((1, 28, 28), np.uint8))
    with pytest.raises(error, match=sentence):
        open_source(tmp_path / name, **({"image_size": 8, "image_channels": 1} | options))


def test_the_order_of_an_epoch_never_changes_between_versions() -> None:
    plan = plan_epoch(seed=7, epoch=2, total_images=8)
    assert plan.order.tolist() == [7, 3, 2, 6, 5, 4, 0, 1]
    assert plan.flip.astype(int).tolist() == [1, 1, 0, 1, 0, 0, 1, 1]
    assert plan.crop[0].tolist() == [0.8748063891716887, 0.7120509458632766]


def test_batches_are_pixels_over_255_channels_first() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    batch = to_tensor(images)
    assert batch.dtype == torch.float32 and batch.shape == (2, 3, 4, 5) and batch.is_contiguous()
    assert (batch.numpy() == images.transpose(0, 3, 1, 2) / np.float32(255)).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_inputs_are_quantised_pixels_channels_last(channels: int, bits: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, channels), np.uint8)
    x = to_input(torch.from_numpy(images), bits, "cpu")
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, quantise(to_tensor(images), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_quantising_keeps_the_top_bits_of_every_pixel(bits: int) -> None:
    pixels = torch.arange(256)
    expected = (pixels >> (8 - bits)).float() / (2**bits - 1)
    assert torch.equal(quantise(pixels.float() / 255, bits), expected)


def test_quantising_agrees_with_the_published_numbers() -> None:
    published = json.loads(case_path("", "schedules.json").read_text())["quantise"]
    pixels = torch.tensor([0, 1, 7, 8, 100, 127, 128, 254, 255]) / 255
    for bits, expected in published.items():
        torch.testing.assert_close(quantise(pixels, int(bits)), torch.tensor(expected), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 9])
def test_quantising_to_impossible_bits_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        quantise(torch.zeros(1), bits)


def test_stored_colours_become_grey_as_pillow_makes_them() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    assert (with_channels(colours, 1)[..., 0] == np.asarray(Image.fromarray(colours).convert("L"))).all()
    grey = colours[..., :1]
    assert with_channels(grey, 3).shape == (300, 300, 3) and (with_channels(grey, 3) == grey).all()


def test_large_images_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    halves("RGB", (1, 1, 1), (2, 2, 2)).save(tmp_path / "a.png")  # 96 pixels
    data, done = (tmp_path / "a.png").read_bytes(), threading.Event()

    def read() -> None:
        decode(data, 3)
        done.set()

    for most, waits in ((95, True), (96, False)):
        monkeypatch.setattr("vaebm_fast.data.images.LARGE_PIXELS", most)
        done.clear()
        other = threading.Thread(target=read)
        with decoding(data, 3):
            other.start()
            assert done.wait(0.3 if waits else 10) is not waits
        other.join()
        assert done.is_set()


PEAK = """
import re, sys
from pathlib import Path
from vaebm_fast.data.images import decoding, transformed
data = Path(sys.argv[1]).read_bytes()
peak = lambda: int(re.search('VmHWM:[^0-9]*([0-9]*)', Path("/proc/self/status").read_text())[1])
before = peak()
with decoding(data, 3) as pixels:
    transformed(pixels, "square", 256)
print(1024 * (peak() - before) / pixels.shape[0] / pixels.shape[1])
"""


@pytest.mark.parametrize("mode, format", [("RGBA", "PNG"), ("RGB", "JPEG")])
def test_decoding_takes_no_more_memory_than_is_stated(mode: str, format: str, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = 6
    Image.new(mode, (5000, 4000)).save(tmp_path / "big", format, exif=tags)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert 6 < float(done.stdout) <= 24, "bytes per pixel"
