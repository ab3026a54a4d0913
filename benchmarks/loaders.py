"""How many training images per second do the loaders read, beside a torch DataLoader with Pillow, and WebDataset's?

Sources: a prepared array, and smooth random images as PNG or JPEG files in a folder, a zip, tar shards, and raw in an
LMDB database and in TFRecords; read from the page cache. Ours flip half of the images. Readers: TorchLoader without a
cache and with the host's, ResidentLoader, whose set lives on the device, and DaliLoader, with 1 and 2 threads. The
DataLoader has 4 worker processes and decodes with Pillow, without flips; WebDataset's loader reads the shards with as
many. Loaders stay open between rounds, and candidates take turns in one process, a whole epoch each.

The last row is an iteration of stage 2 (celeba_64, batch 4, a prepared array): the share of it that waits for images.

    python -m benchmarks loaders [--images N] [--batch N] [--side PIXELS] [--rounds R] [--without-training]
                                 [--into NAME] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import io
import struct
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import report
from benchmarks.environment import RESULTS
from benchmarks.measure import summary, take_turns
from benchmarks.options import at_least_one
from benchmarks.results_file import ResultsFile, Row
from benchmarks.training import energy_trainer
from vaebm_fast.config import PRESETS
from vaebm_fast.data import Loader, StoredImages, TorchLoader, open_source
from vaebm_fast.data.images import Pixels
from vaebm_fast.data.loading import why_no_dali
from vaebm_fast.data.prepare import PrepareOptions, prepare
from vaebm_fast.data.resident import ResidentLoader
from vaebm_fast.runtime.files import expanded

THREADS = (1, 2)
PROCESSES = 4
BASELINE, WEBDATASET = "DataLoader, Pillow", "WebDataset"
TRAINING_STEPS = 4
DISTINCT = 128  # random images; more are repetitions


def smooth_images(count: int, side: int) -> Pixels:
    """Random images whose detail falls off as in photographs, for files of usual size: uint8 [n, H, W, 3]."""
    noise = torch.randn(min(count, DISTINCT), 3, side, side, generator=torch.Generator().manual_seed(0))
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency[None, : side // 2 + 1] ** 2).sqrt().clamp_min(1 / side)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, s=(side, side))
    images = images / images.flatten(1).std(1)[:, None, None, None] * 48 + 128
    pixels: Pixels = images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return np.resize(pixels, (count, side, side, 3))  # repeated


def write_folder(images: Pixels, folder: Path, suffix: str) -> Path:
    """The images as files of one format."""
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{index:06}{suffix}", quality=90)
    return folder


class PillowFolder(Dataset[Tensor]):
    """What a user writes for a folder of images."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.files[index]) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))


def write_sources(images: Pixels, root: Path) -> dict[str, Path]:
    """The images in every container: {source: path}."""
    paths = {name: write_folder(images, root / name, f".{name}") for name in ("png", "jpg")}
    files = {
        name: {path.name: path.read_bytes() for path in sorted(folder.iterdir())} for name, folder in paths.items()
    }
    with zipfile.ZipFile(root / "png.zip", "w") as archive:
        for name, data in files["png"].items():
            archive.writestr(name, data)
    (root / "tar").mkdir()
    for number in range(PROCESSES):  # a shard for each of WebDataset's processes
        with tarfile.open(root / "tar" / f"{number}.tar", "w") as shard:
            for name, data in list(files["jpg"].items())[number::PROCESSES]:
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                shard.addfile(entry, io.BytesIO(data))
    np.save(root / "images.npy", images)
    prepare(root / "images.npy", root / "prepared", PrepareOptions(size=images.shape[1]))
    write_lmdb(root / "lmdb", images)
    write_tfrecord(root / "images.tfrecords", images)
    return {
        "prepared array": root / "prepared",
        "raw LMDB": root / "lmdb",
        "TFRecord": root / "images.tfrecords",
        "zip of png": root / "png.zip",
        "tar of jpg": root / "tar",
        **paths,
    }


def write_lmdb(path: Path, images: Pixels) -> None:
    """NVAE's raw layout."""
    import lmdb

    with (
        lmdb.open(str(path), map_size=2 * images.nbytes + (1 << 26)) as database,
        database.begin(write=True) as writing,
    ):
        for index, image in enumerate(images):
            writing.put(str(index).encode(), image.tobytes())


def write_tfrecord(path: Path, images: Pixels) -> None:
    """ProGAN's features, in HWC."""
    import google_crc32c

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2]) + varint(len(data)) + data

    def varint(value: int) -> bytes:
        return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)

    def masked(data: bytes) -> bytes:
        crc = google_crc32c.value(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    shape = field(1, field(1, b"shape") + field(2, field(3, field(1, b"".join(map(varint, images.shape[1:]))))))
    with path.open("wb") as file:
        for image in images:
            pixels = field(1, field(1, b"data") + field(2, field(1, field(1, image.tobytes()))))
            record = field(1, shape + pixels)
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))


def epochs(loader: Loader) -> Callable[[], int]:
    """Each call reads the next epoch; the number of images."""
    total, number = loader.plan.batches_per_epoch, count()
    return lambda: sum(len(loader.batch(step)) for step in _steps(next(number), total))


def _steps(epoch: int, total: int) -> range:
    return range(epoch * total, (epoch + 1) * total)


def epochs_of(batches: Any) -> Callable[[], int]:
    """Each call iterates over a loader of torch's or WebDataset's."""
    return lambda: sum(len(images) for images in batches)


def webdataset_loader(shards: Path, batch: int) -> Any | None:
    """WebDataset's own loader of tar shards, decoding with Pillow; None if the package is missing."""
    try:
        import webdataset
    except ImportError:
        return None

    def first(sample: tuple[Any, ...]) -> Tensor:
        return torch.from_numpy(sample[0])

    images = webdataset.WebDataset([str(path) for path in sorted(shards.iterdir())], shardshuffle=False)
    decoded = images.shuffle(100).decode("rgb8").to_tuple("jpg").map(first).batched(batch, collation_fn=torch.stack)
    return webdataset.WebLoader(decoded, batch_size=None, num_workers=PROCESSES, persistent_workers=True)


Key = tuple[str, str, int]  # source, reader, threads or processes


def candidates(paths: Mapping[str, Path], side: int, batch: int, open_now: ExitStack) -> dict[Key, Callable[[], int]]:
    """A call per source, reader and number of threads that reads an epoch."""

    def opened(source: str, cache_bytes: int) -> Any:
        found = open_source(paths[source], image_size=side, image_channels=3)
        if isinstance(found, StoredImages):
            found.cache_bytes = cache_bytes
        return found

    calls: dict[Key, Callable[[], int]] = {}
    for name in paths:
        for threads in THREADS:
            loader = TorchLoader(opened(name, 0), batch, workers=threads, horizontal_flip=True)
            calls[name, "TorchLoader", threads] = epochs(open_now.enter_context(closing(loader)))
    for threads in THREADS:
        loader = TorchLoader(opened("jpg", 1 << 40), batch, workers=threads, horizontal_flip=True)
        calls["jpg", "TorchLoader, cache host", threads] = epochs(open_now.enter_context(closing(loader)))
        if why_no_dali() is None:
            from vaebm_fast.data.dali import DaliLoader

            dali = DaliLoader(opened("jpg", 0), batch, workers=threads, horizontal_flip=True)
            calls["jpg", "DaliLoader", threads] = epochs(open_now.enter_context(closing(dali)))
    resident = ResidentLoader(opened("jpg", 0), batch, horizontal_flip=True)
    calls["jpg", "ResidentLoader", 1] = epochs(open_now.enter_context(closing(resident)))
    for name in ("png", "jpg"):
        plain = DataLoader(
            PillowFolder(paths[name]),
            batch,
            shuffle=True,
            drop_last=True,
            num_workers=PROCESSES,
            persistent_workers=True,
        )
        calls[name, BASELINE, PROCESSES] = epochs_of(plain)
    web = webdataset_loader(paths["tar of jpg"], batch)
    if web is not None:
        calls["tar of jpg", WEBDATASET, PROCESSES] = epochs_of(web)
    return calls


def measure(images: int, batch: int, side: int, folder: Path, rounds: int | None = None) -> list[Row]:
    """A row per source and reader: seconds of an epoch, images per second, and that over the DataLoader's on JPEG."""
    paths = write_sources(smooth_images(images, side), folder)
    with ExitStack() as open_now:
        calls = candidates(paths, side, batch, open_now)
        named = {", ".join(map(str, key)): call for key, call in calls.items()}
        samples = take_turns(named, torch.device("cpu"), rounds=rounds)
        counted = {key: call() for key, call in named.items()}
    rates = {key: counted[key] / summary(taken)["median_s"] for key, taken in samples.items()}
    base = rates[f"jpg, {BASELINE}, {PROCESSES}"]
    return [
        {
            "source": source,
            "candidate": reader,
            "workers": workers,
            "side": side,
            "batch": batch,
            **summary(samples[key]),
            "read_images_per_second": rates[key],
            "over DataLoader": rates[key] / base,
            "waiting_share": None,
        }
        for (source, reader, workers), key in zip(calls, named, strict=True)
    ]


def waiting_share(folder: Path, batch: int = 4) -> tuple[float, float]:
    """(seconds of an iteration of stage 2, the share of it that waits for images), medians of TRAINING_STEPS."""
    preset = PRESETS["celeba_64"]
    side = preset.nvae.image_size
    np.save(folder / "small.npy", smooth_images(DISTINCT, side))
    prepare(folder / "small.npy", folder / "small", PrepareOptions(size=side))
    source = open_source(folder / "small", image_size=side, image_channels=3)
    with closing(TorchLoader(source, batch, horizontal_flip=True)) as loader:
        trainer = energy_trainer(preset, batch, loader)
        waited: list[float] = []
        read = loader.batch

        def timed(step: int) -> Tensor:
            began = time.perf_counter()
            images = read(step)
            waited.append(time.perf_counter() - began)
            return images

        trainer.step(0)  # with the data-dependent initialisation
        loader.batch = timed  # type: ignore[method-assign]
        taken = []
        for step in range(1, 1 + TRAINING_STEPS):
            began = time.perf_counter()
            trainer.step(step)
            taken.append(time.perf_counter() - began)
    return float(np.median(taken)), float(np.median(np.array(waited) / taken))


def main(arguments: Sequence[str]) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least_one, default=512)
    parser.add_argument("--batch", type=at_least_one, default=32)
    parser.add_argument("--side", type=at_least_one, default=256)
    parser.add_argument("--rounds", type=at_least_one)
    parser.add_argument("--without-training", action="store_true", help="leave out the share of an iteration")
    parser.add_argument("--into", metavar="NAME", default="loaders", help="the result file")
    parser.add_argument("--results", type=expanded, default=RESULTS)
    options = parser.parse_args(arguments)
    file = ResultsFile(options.into, "How many training images per second are read?", {}, options.results)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create 4 worker processes")  # 4 on two cores, as asked
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # WebDataset's
        for row in measure(options.images, options.batch, options.side, Path(folder), options.rounds):
            file.add(row)
        if not options.without_training:
            seconds, share = waiting_share(Path(folder))
            shown = {"source": "prepared array, stage 2", "candidate": "TorchLoader", "workers": None, "side": 64}
            rate = {"median_s": seconds, "read_images_per_second": 4 / seconds, "rounds": TRAINING_STEPS}
            file.add({**shown, "batch": 4, **rate, "over DataLoader": None, "waiting_share": share})
    print(report.write_table(file.path))
