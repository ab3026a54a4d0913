"""Every loader and cache gives the same batches: torch's threads, DALI, and a set that lives on the device."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.image_containers import encoded, noise, scene, write_tar, write_zip
from vaebm_fast.data import (
    ArraySource,
    ImageSource,
    Loader,
    StoredImages,
    TorchLoader,
    UnreadableDataError,
    digits,
    open_source,
)
from vaebm_fast.data import loading as loading_module
from vaebm_fast.data.loading import open_loader, why_no_dali
from vaebm_fast.data.resident import ResidentLoader
from vaebm_fast.runtime.errors import UserError

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed")
from vaebm_fast.data import dali  # noqa: E402
from vaebm_fast.data.dali import DaliLoader  # noqa: E402

PORTRAITS = next(
    (folder for parent in Path(__file__).parents if (folder := parent / "shared/data/portraits_256").is_dir()), None
)
# Grey levels between DALI's and Pillow's resized JPEG files: mean and maximum over all pixels, maximum without the two
# outermost rings of pixels, where the two weight the border differently.
MEAN, MEAN_OF_SMALL, MOST, MOST_INSIDE = 0.3, 0.9, 24, 1

LoaderKind = Callable[..., Loader]


@pytest.fixture(params=["torch", "dali", "resident"])
def loader(request: pytest.FixtureRequest) -> Iterator[LoaderKind]:
    kinds: dict[str, Any] = {"torch": TorchLoader, "dali": DaliLoader, "resident": ResidentLoader}
    opened: list[Loader] = []

    def make(*arguments: Any, **options: Any) -> Loader:
        opened.append(kinds[request.param](*arguments, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def kinds_of_files() -> dict[str, bytes]:
    """Files of many kinds, each with a short side of 16."""
    colour, grey = scene(16, 22), scene(16, 22, seed=1)[..., :1]
    picture = Image.fromarray(colour)
    files = {
        "baseline.jpg": encoded(colour, "JPEG"),
        "progressive.JPEG": encoded(colour, "JPEG", progressive=True),
        "444.jpg": encoded(colour, "JPEG", subsampling=0),
        "422.jpg": encoded(colour, "JPEG", subsampling=1),
        "restart.jpg": encoded(colour, "JPEG", restart_marker_blocks=1),
        "grey.jpg": encoded(grey, "JPEG"),
        "colour.png": encoded(colour),
        "grey.png": encoded(grey),
        "lossy.webp": encoded(colour, "WEBP"),
        "lossless.webp": encoded(colour, "WEBP", lossless=True),
        "colour.bmp": encoded(colour, "BMP"),
        "colour.tif": encoded(colour, "TIFF"),
    }
    files |= {f"orientation{turn}.jpg": encoded(colour, "JPEG", exif=exif(turn)) for turn in range(1, 9)}
    others = {
        "cmyk.jpg": (picture.convert("CMYK"), "JPEG"),
        "alpha.png": (Image.fromarray(np.concatenate([colour, grey], axis=2)), "PNG"),
        "palette.gif": (picture.quantize(64), "GIF"),
        "palette.png": (picture.quantize(64), "PNG"),
        "bits.png": (picture.convert("1"), "PNG"),
        "sixteen.png": (Image.fromarray(grey[..., 0].astype(np.uint16) * 257 + 40), "PNG"),
    }
    for name, (image, format) in others.items():
        buffer = io.BytesIO()
        image.save(buffer, format)
        files[name] = buffer.getvalue()
    return files


@pytest.fixture
def kinds(tmp_path: Path) -> Path:
    root = tmp_path / "kinds"
    root.mkdir()
    for name, data in kinds_of_files().items():
        (root / name).write_bytes(data)
    return root


def same_batches(source: ImageSource, loader: LoaderKind, batch: int, steps: list[int], **options: Any) -> None:
    truth, made = TorchLoader(source, batch, seed=9, **options), loader(source, batch, seed=9, **options)
    for step in steps:
        expected, found = truth.batch(step), made.batch(step)
        assert found.dtype == torch.uint8 and found.is_contiguous() and torch.equal(found, expected), step
    truth.close()


# The same batches
@pytest.mark.parametrize("channels", [1, 3])
def test_files_of_every_kind_that_need_no_resizing_are_equal_bit_for_bit(
    channels: int, kinds: Path, loader: LoaderKind
) -> None:
    source = open_source(kinds, image_size=16, image_channels=channels)
    same_batches(source, loader, 7, [0, 1, 2, 11, 3, 4, 100, 0], horizontal_flip=True)
    same_batches(source, DaliLoader, 7, [0, 5, 1, 2], horizontal_flip=True, random_crop=True)


def test_random_crops_are_equal_wherever_images_live(tmp_path: Path, loader: LoaderKind) -> None:
    for index in range(12):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(16, 25, seed=index), "JPEG"))
    source = open_source(tmp_path, image_size=16, image_channels=3)
    same_batches(source, loader, 5, [0, 1, 7, 2, 3], horizontal_flip=True, random_crop=True)


@pytest.mark.parametrize("size", [8, 11, 40])
def test_resized_files_that_are_no_jpegs_are_equal_bit_for_bit(size: int, tmp_path: Path, loader: LoaderKind) -> None:
    for index in range(6):
        image = noise(1, 20 + index, 31 - index, seed=index)[0]
        (tmp_path / f"{index}.png").write_bytes(encoded(image))
        (tmp_path / f"{index}.webp").write_bytes(encoded(image, "WEBP", lossless=True))
        (tmp_path / f"turned{index}.jpg").write_bytes(encoded(image, "JPEG", exif=exif(6)))
    same_batches(open_source(tmp_path, image_size=size, image_channels=3), loader, 9, [0, 1, 3])
    same_batches(open_source(tmp_path, image_size=size, image_channels=1), DaliLoader, 9, [0, 1], random_crop=True)


def test_grey_levels_of_colour_files_are_exact(tmp_path: Path) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(noise(1, 256, seed=index)[0], "JPEG", quality=95))
    same_batches(open_source(tmp_path, image_size=256, image_channels=1), DaliLoader, 4, [0])


def differences(source: ImageSource, steps: int, **options: Any) -> tuple[float, int, int]:
    """(mean, maximum, maximum inside) of DALI's pixels over Pillow's."""
    torches, dalis = TorchLoader(source, 16, seed=2, **options), DaliLoader(source, 16, seed=2, **options)
    pairs = [(torches.batch(step).int(), dalis.batch(step).int()) for step in range(steps)]
    torches.close()
    dalis.close()
    apart = torch.cat([(first - second).abs() for first, second in pairs])
    return apart.double().mean().item(), int(apart.max()), int(apart[:, 2:-2, 2:-2].max())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 24, 64, 100, 150])
def test_resized_jpegs_are_within_the_stated_bounds(size: int, channels: int, tmp_path: Path) -> None:
    for index in range(32):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(96 + index, 110 - index, seed=index), "JPEG"))
    source = open_source(tmp_path, image_size=size, image_channels=channels)
    mean, most, inside = differences(source, 2, horizontal_flip=True)
    assert mean <= (MEAN if size >= 64 else MEAN_OF_SMALL) and most <= MOST and inside <= MOST_INSIDE, (
        mean,
        most,
        inside,
    )


@pytest.mark.parametrize("size", [64, 100, 256, 300])
def test_portraits_are_within_the_stated_bounds(size: int) -> None:
    if PORTRAITS is None:
        pytest.skip("the portraits are not beside the checkout")
    source = open_source(PORTRAITS, image_size=size, image_channels=3)
    mean, most, inside = differences(source, 4, horizontal_flip=True)
    assert mean <= MEAN and most <= MOST and inside <= MOST_INSIDE, (mean, most, inside)
    assert size != 256 or most == 0


def test_celebas_box_is_cut_before_resizing(tmp_path: Path, loader: LoaderKind) -> None:
    for index in range(8):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(218, 178, seed=index), "JPEG"))
    (tmp_path / "square.jpg").write_bytes(encoded(scene(148, 148), "JPEG"))
    source = open_source(tmp_path, image_size=148, image_channels=3, transform="celeba")
    same_batches(source, loader, 9, [0, 1], horizontal_flip=True)


@pytest.mark.parametrize("channels", [1, 3])
def test_raw_images_are_equal_bit_for_bit(channels: int, tmp_path: Path, loader: LoaderKind) -> None:
    array = ArraySource("noise", noise(30, 12, channels=channels))
    same_batches(array, loader, 8, [0, 1, 2, 3, 50, 4], horizontal_flip=True)
    same_batches(digits(image_size=8), loader, 64, [0, 13, 2], horizontal_flip=True)
    np.save(tmp_path / "a.npy", noise(30, 12, 17, channels=channels))
    stored = open_source(tmp_path / "a.npy", image_size=12, image_channels=channels)
    same_batches(stored, loader, 8, [0, 1, 2], horizontal_flip=True, random_crop=True)


def test_ranks_take_their_rows_of_the_global_batch(tmp_path: Path, loader: LoaderKind) -> None:
    """One shard, two ranks: no rank is without images."""
    files = {f"{index:04d}.jpg": encoded(scene(16, 16, seed=index), "JPEG") for index in range(10)}
    write_tar(tmp_path / "set.tar", files)
    source = open_source(tmp_path / "set.tar", image_size=16, image_channels=3)
    whole = TorchLoader(source, 4, seed=1, horizontal_flip=True)
    ranks = [loader(source, 4, seed=1, horizontal_flip=True, rank=rank, world=2) for rank in (0, 1)]
    for step in (0, 1, 2, 9):
        assert torch.equal(torch.cat([rank.batch(step) for rank in ranks]), whole.batch(step))
    whole.close()


def test_591_images_in_batches_of_32_come_at_most_once_an_epoch(loader: LoaderKind) -> None:
    numbered = ArraySource("numbers", np.arange(591 * 3, dtype=np.uint32).view(np.uint8).reshape(591, 2, 2, 3).copy())
    made = loader(numbered, 32, seed=4)
    assert made.plan.batches_per_epoch == 18
    seen: set[bytes] = set()
    for epoch in range(4):
        images = [image.numpy().tobytes() for step in range(18) for image in made.batch(18 * epoch + step)]
        assert len(images) == len(set(images)) == 576
        seen.update(images)
    assert len(seen) == 591, "the 15 images left out are others in each epoch"


def test_names_that_webdataset_and_dali_count_differently_are_the_same_images(
    tmp_path: Path, loader: LoaderKind
) -> None:
    names = ["00.02.jpg", "0003.JPG", "0004.jpeg", "0005.jpe", "a/0006.Jfif"]
    write_tar(tmp_path / "set.tar", {name: encoded(scene(16, 16, at), "JPEG") for at, name in enumerate(names)})
    source = open_source(tmp_path / "set.tar", image_size=16, image_channels=3)
    assert len(source) == 5
    same_batches(source, loader, 5, [0, 1])


def test_a_large_image_is_left_to_pillow_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "LARGE_PIXELS", 1000)
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(40, 40, seed=index), "JPEG"))
    source = open_source(tmp_path, image_size=16, image_channels=3)
    same_batches(source, DaliLoader, 4, [0])  # bit for bit, though resized


def test_resizing_is_independent_of_the_batch_and_of_threads(tmp_path: Path) -> None:
    for index in range(12):
        (tmp_path / f"{index:02d}.jpg").write_bytes(encoded(scene(50 + index, 60, seed=index), "JPEG"))
    source = open_source(tmp_path, image_size=16, image_channels=3)
    batches = []
    for size, threads, workers in ((12, 1, 1), (12, 2, 2), (4, 1, 2), (6, 2, 1)):
        made = DaliLoader(source, size, seed=3, threads=threads, workers=workers)
        batches.append(torch.cat([made.batch(step) for step in range(12 // size)]))
        made.close()
    assert all(torch.equal(batch, batches[0]) for batch in batches)


# Damage
@pytest.mark.parametrize("how", ["cut", "empty", "text", "gone"])
def test_a_damaged_image_is_named_and_the_batches_after_it_are_read(
    how: str, tmp_path: Path, loader: LoaderKind
) -> None:
    for index in range(12):
        (tmp_path / f"{index:02d}.jpg").write_bytes(encoded(scene(30, 30, seed=index), "JPEG"))
    path, whole = tmp_path / "05.jpg", (tmp_path / "05.jpg").read_bytes()
    source = open_source(tmp_path, image_size=16, image_channels=3)
    made = loader(source, 4, seed=3)
    at = next(step for step in range(3) if 5 in made.plan.batch(step).order)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:400], "empty": b"", "text": b"<!DOCTYPE html>" * 9}[how])
    first = 0 if isinstance(made, ResidentLoader) else at
    for _ in range(2):
        with pytest.raises(UnreadableDataError, match=r"05\.jpg cannot be read as an image"):
            made.batch(first)
    assert made.unreadable == (set() if how == "gone" else {"05.jpg"})
    if not isinstance(made, ResidentLoader):
        assert all(made.batch(step).shape == (4, 16, 16, 3) for step in range(3) if step != at)
    assert made.find_unreadable() == ([] if how == "gone" else ["05.jpg"])
    path.write_bytes(whole)
    fresh = TorchLoader(open_source(tmp_path, image_size=16, image_channels=3), 4, seed=3)
    assert (made.batch(at).int() - fresh.batch(at).int()).abs().max() <= MOST
    fresh.close()


def test_what_dali_refuses_and_pillow_reads_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(4):
        (tmp_path / f"{index}.jpg").write_bytes(encoded(scene(16, 16, seed=index), "JPEG"))
    source = open_source(tmp_path, image_size=16, image_channels=3)
    inputs, refused = dali._inputs, []

    def spoiling(rows: Any) -> Any:
        made = inputs(rows)
        if not refused:
            refused.append(1)
            made["files"] = [np.frombuffer(b"\xff\xd8 no image", np.uint8), *made["files"][1:]]
        return made

    monkeypatch.setattr(dali, "_inputs", spoiling)
    same_batches(source, DaliLoader, 4, [0, 1, 2])
    assert refused


def test_pipelines_are_used_again(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", noise(8, 8))
    made = DaliLoader(open_source(tmp_path / "a.zip", image_size=8, image_channels=3), 4)
    built: list[int] = []
    build = made._pipeline

    def counted(rows: int) -> Any:
        built.append(rows)
        return build(rows)

    made._pipeline = counted  # type: ignore[method-assign]
    for step in range(20):
        made.batch(step)
    made.close()
    assert 1 <= len(built) <= made._workers


def test_closed_loaders_leave_no_threads(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", noise(8, 8))
    source = open_source(tmp_path / "a.zip", image_size=8, image_channels=3)
    left: list[int] = []
    for _ in range(4):
        made = DaliLoader(source, 4)
        made.batch(0)
        made.close()
        left.append(len(os.listdir("/proc/self/task")))
    assert left[-1] <= left[0], "threads of this process, DALI's among them"


# A set on the device
def test_a_resident_set_is_read_once(tmp_path: Path) -> None:
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(encoded(noise(1, 8, seed=index)[0]))
    made = ResidentLoader(open_source(tmp_path, image_size=8, image_channels=3), 3)
    first = made.batch(0)
    for path in tmp_path.iterdir():
        path.unlink()
    assert torch.equal(made.batch(0), first) and made.batch(77).shape == (3, 8, 8, 3)
    made.close()


def test_images_of_several_shapes_are_refused_for_random_crops(kinds: Path) -> None:
    made = ResidentLoader(open_source(kinds, image_size=16, image_channels=3), 4, random_crop=True)
    with pytest.raises(UnreadableDataError, match=r"has images of several shapes \(22x16, 16x22.*use --cache host"):
        made.batch(0)


def test_a_set_that_does_not_fit_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    made = ResidentLoader(ArraySource("a", noise(4, 8)), 2, device="cuda")
    with pytest.raises(UnreadableDataError, match="The images take 0.0 GB and cuda has 0.0 GB free; use --cache host"):
        made.batch(0)


# Which one
def test_auto_picks_dali_for_encoded_images_that_memory_cannot_cache(
    kinds: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picked(source: ImageSource | None = None, **options: Any) -> tuple[type, int | None]:
        source = source or open_source(kinds, image_size=16, image_channels=3)
        made = open_loader(source, 4, **options)
        made.close()
        return type(made), source.cache_bytes if isinstance(source, StoredImages) else None

    kept = StoredImages.__init__.__kwdefaults__["cache_bytes"]  # type: ignore[misc]
    assert picked() == (TorchLoader, kept)
    assert picked(cache="none") == (DaliLoader, 0)
    assert picked(cache="host") == (TorchLoader, kept)
    assert picked(cache="device") == (ResidentLoader, kept)
    assert picked(loader="torch", cache="none") == (TorchLoader, 0)
    assert picked(loader="dali") == (DaliLoader, 0)
    small = open_source(kinds, image_size=16, image_channels=3)
    assert isinstance(small, StoredImages)
    small.cache_bytes = len(small) * 16 * 16 * 3 - 1
    assert picked(small) == (DaliLoader, 0)
    assert picked(ArraySource("a", noise(4, 8)), cache="none") == (TorchLoader, None)
    monkeypatch.setattr(loading_module, "why_no_dali", lambda: "it is not there")
    assert picked(cache="none") == (TorchLoader, 0)
    with pytest.raises(UserError, match="--loader dali cannot be used: it is not there"):
        picked(loader="dali")


def test_random_crops_of_square_arrays_are_told_of() -> None:
    with pytest.warns(UserWarning, match="Images of a are square, so random crops have no effect; `prepare --format"):
        open_loader(ArraySource("a", noise(4, 8)), 2, random_crop=True).close()


def test_a_closed_set_gives_no_batch() -> None:
    made = ResidentLoader(ArraySource("a", noise(4, 8)), 2)
    made.batch(0)
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        made.batch(0)


def test_loaders_and_caches_that_exclude_each_other_are_refused() -> None:
    source = ArraySource("a", noise(4, 8))
    with pytest.raises(UserError, match="DALI decodes images on each read and caches none"):
        open_loader(source, 2, loader="dali", cache="host")
    with pytest.raises(UserError, match="decoded only once; leave --loader dali away"):
        open_loader(source, 2, loader="dali", cache="device")


def test_a_missing_dali_is_a_sentence_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_dali() is None
    monkeypatch.setitem(sys.modules, "nvidia.dali.fn", None)
    reason = why_no_dali()
    assert reason is not None and "`pip install nvidia-dali-cuda130` installs it" in reason


def test_a_run_may_change_its_loader_and_cache(tmp_path: Path) -> None:
    write_zip(tmp_path / "a.zip", noise(8, 8))
    source = open_source(tmp_path / "a.zip", image_size=8, image_channels=3)
    loaders = [kind(source, 4, horizontal_flip=True) for kind in (TorchLoader, DaliLoader, ResidentLoader)]
    assert loaders[0].settings() == loaders[1].settings() == loaders[2].settings()
    for each in loaders:
        each.close()
