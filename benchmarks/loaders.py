"""How many training images per second does the loader read, beside a plain torch DataLoader with Pillow?

Sources: an array in memory, and folders of PNG and JPEG files of smooth random images, read from the page cache. The
folder source decodes on every read or, where a row says cached, keeps decoded images as it does by default. The loader
has 1 and 2 threads; the DataLoader has as many worker processes and decodes with Pillow, without flips or crops.
Candidates take turns in one process; starting threads or workers counts, as it does in training.

    python -m benchmarks loaders [--images N] [--batch N] [--side PIXELS] [--rounds R] [--into NAME] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

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
from vaebm_fast.data import ArraySource, ImageSource, TorchLoader
from vaebm_fast.data.folder import ImageFolder
from vaebm_fast.data.images import Pixels
from vaebm_fast.runtime.files import expanded

WORKERS = (1, 2)
BASELINE = "DataLoader, Pillow"


def smooth_images(count: int, side: int) -> Pixels:
    """Random images whose detail falls off as in photographs, for files of usual size: uint8 [n, H, W, 3]."""
    noise = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    frequency = torch.fft.fftfreq(side)
    radius = (frequency[:, None] ** 2 + frequency[None, : side // 2 + 1] ** 2).sqrt().clamp_min(1 / side)
    images = torch.fft.irfft2(torch.fft.rfft2(noise) / radius, s=(side, side))
    images = images / images.flatten(1).std(1)[:, None, None, None] * 48 + 128
    pixels: Pixels = images.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    return pixels


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


def read_by_loader(source: ImageSource, batch: int, workers: int) -> int:
    """One epoch by TorchLoader; the number of images."""
    loader = TorchLoader(source, batch, workers=workers)
    try:
        return sum(len(loader.batch(step)) for step in range(loader.plan.batches_per_epoch))
    finally:
        loader.close()


def read_by_dataloader(folder: Path, batch: int, workers: int) -> int:
    """One epoch by torch's DataLoader; the number of images."""
    loader = DataLoader(PillowFolder(folder), batch, shuffle=True, drop_last=True, num_workers=workers)
    return sum(len(images) for images in loader)


def measure(images: int, batch: int, side: int, folder: Path, rounds: int | None = None) -> list[Row]:
    """A row per source and reader: seconds of an epoch, images per second, and that over the DataLoader's."""
    pixels = smooth_images(images, side)
    folders = {name: write_folder(pixels, folder / name, f".{name}") for name in ("png", "jpg")}
    sources: dict[str, ImageSource] = {"array": ArraySource("array", pixels)}
    for name, path in folders.items():
        sources[name] = ImageFolder(path, image_size=side, image_channels=3, cache_bytes=0)
    sources["jpg, cached"] = ImageFolder(folders["jpg"], image_size=side, image_channels=3)
    rows: list[Row] = []
    for name, source in sources.items():
        calls: dict[tuple[str, int], Callable[[], int]] = {}
        for workers in WORKERS:
            calls["TorchLoader", workers] = partial(read_by_loader, source, batch, workers)
            if name in folders:
                calls[BASELINE, workers] = partial(read_by_dataloader, folders[name], batch, workers)
        named = {f"{reader}, {workers}": call for (reader, workers), call in calls.items()}
        samples = take_turns(named, torch.device("cpu"), rounds=rounds)
        counted = {key: call() for key, call in named.items()}
        medians = {key: summary(taken)["median_s"] for key, taken in samples.items()}
        for (reader, workers), key in zip(calls, named, strict=True):
            base = medians.get(f"{BASELINE}, {workers}")
            rows.append(
                {
                    "source": name,
                    "candidate": reader,
                    "workers": workers,
                    "side": side,
                    "batch": batch,
                    **summary(samples[key]),
                    "read_images_per_second": counted[key] / medians[key],
                    "over DataLoader": None if base is None else base / medians[key],
                }
            )
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=at_least_one, default=256)
    parser.add_argument("--batch", type=at_least_one, default=32)
    parser.add_argument("--side", type=at_least_one, default=256)
    parser.add_argument("--rounds", type=at_least_one)
    parser.add_argument("--into", metavar="NAME", default="loaders", help="the result file")
    parser.add_argument("--results", type=expanded, default=RESULTS)
    options = parser.parse_args(arguments)
    file = ResultsFile(options.into, "How many training images per second are read?", {}, options.results)
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(options.images, options.batch, options.side, Path(folder), options.rounds):
            file.add(row)
    print(report.write_table(file.path))
