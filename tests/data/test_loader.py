"""Training batches: their order, ranks, flips, crops, and reading ahead."""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from vaebm_fast.config import PRESETS
from vaebm_fast.data import (
    ArraySource,
    ImageSource,
    TorchLoader,
    UnreadableDataError,
    batches_per_epoch,
    digits,
    open_source,
    require_whole_batches,
    to_input,
)
from vaebm_fast.data.images import Pixels
from vaebm_fast.models import NVAE
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.training.energy import EnergyTrainer
from vaebm_fast.training.vae import VAETrainer


def numbered(total: int, side: int = 4) -> ArraySource:
    """Image i has i in its top-left pixel and 255 below it, so that mirroring is visible."""
    images = np.zeros((total, side, side, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(total)
    images[:, 1, 0, 0] = 255
    return ArraySource("numbered", images)


def indices_of(batch: Tensor) -> list[int]:
    """The largest byte of each top row, mirrored or not."""
    return batch[:, 0, :, 0].amax(-1).tolist()


def batches(source: ImageSource, batch_size: int, steps: int, **options: Any) -> list[Tensor]:
    """The batches of steps 0, 1, ..."""
    loader = TorchLoader(source, batch_size, **options)
    return [loader.batch(step) for step in range(steps)]


def test_batches_are_the_bytes_of_the_source() -> None:
    source = digits()
    (batch,) = batches(source, len(source), 1, seed=1)
    assert batch.dtype == torch.uint8 and batch.shape == source.images.shape
    assert sorted(map(bytes, batch.numpy())) == sorted(map(bytes, source.images))


def test_every_epoch_is_another_permutation() -> None:
    source = numbered(12)
    assert batches_per_epoch(source, 4) == TorchLoader(source, 4).plan.batches_per_epoch == 3
    stream = [indices_of(batch) for batch in batches(source, 4, 9, seed=1)]
    epochs = [sum(stream[at : at + 3], []) for at in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    other_seed = [index for batch in batches(source, 4, 3, seed=2) for index in indices_of(batch)]
    assert other_seed != epochs[0]


def test_the_last_smaller_batch_is_left_out() -> None:
    epoch = [index for batch in batches(numbered(10), 4, 2) for index in indices_of(batch)]
    assert len(set(epoch)) == 8


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_batch_depends_on_its_step_alone(workers: int) -> None:
    source, options = digits(), {"seed": 2**63, "horizontal_flip": True}
    whole = batches(source, 256, 10, workers=1, **options)
    loader = TorchLoader(source, 256, workers=workers, **options)
    for step in (3, 4, 5, 0, 9, 9, 1, 2, 3):
        assert torch.equal(loader.batch(step), whole[step]), step


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_take_contiguous_rows_of_the_global_batch(world: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 12, 3), np.uint8)).save(tmp_path / f"{name}.png")
    source = open_source(tmp_path, image_size=8, image_channels=3)
    options: dict[str, Any] = {"seed": 7, "horizontal_flip": True, "random_crop": True}
    whole = batches(source, 8, 7, **options)
    shares = [batches(source, 8, 7, rank=rank, world=world, **options) for rank in range(world)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part) for part in parts} == {8 // world}
        assert torch.equal(torch.cat(parts), batch)


def test_half_of_the_images_are_mirrored_by_position_and_none_unless_asked() -> None:
    source, mirrored = numbered(200), []
    for batch, plain in zip(
        batches(source, 50, 80, seed=3, horizontal_flip=True), batches(source, 50, 80, seed=3), strict=True
    ):
        flips = batch[:, 1, -1, 0] == 255
        assert torch.equal(torch.where(flips[:, None, None, None], batch.flip(2), batch), plain)
        mirrored.append(flips)
    flips = torch.cat(mirrored)
    assert abs(flips.float().mean() - 0.5) < 4 * 0.5 / len(flips) ** 0.5
    assert not torch.equal(flips[:200], flips[200:400])


def test_random_crops_move_the_window_and_are_central_otherwise(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8) * 10, (8, 24))
    Image.fromarray(ramp.copy()).save(tmp_path / "a.png")
    source = open_source(tmp_path, image_size=8, image_channels=1)
    assert [int(batch[0, 0, 0, 0]) for batch in batches(source, 1, 1)] == [80]
    lefts = {int(batch[0, 0, 0, 0]) for batch in batches(source, 1, 200, random_crop=True)}
    assert lefts == {10 * left for left in range(17)}


def test_settings_name_the_data_and_its_augmentation() -> None:
    assert TorchLoader(numbered(12), 4, horizontal_flip=True).settings() == {
        "images": 12,
        "data_sha256": numbered(12).digest(),
        "horizontal_flip": True,
        "random_crop": False,
        "transform": "square",
    }


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 13}, "batch_size is 13"),
        ({"seed": -1}, "seed is -1"),
        ({"workers": 0}, "workers is 0"),
        ({"rank": 2, "world": 2}, "rank is 2; it must be at least 0 and below 2"),
        ({"rank": -1}, "rank is -1"),
        ({"world": 3}, "batch_size is 4; 3 ranks need a multiple of 3"),
    ],
    ids=str,
)
def test_arguments_that_make_no_batches_are_refused_at_once(wrong: dict[str, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        TorchLoader(numbered(12), **{"batch_size": 4, **wrong})  # type: ignore[arg-type]


def test_a_loader_of_another_batch_size_or_seed_or_of_several_ranks_is_refused() -> None:
    loader = TorchLoader(numbered(12), 4, seed=5)
    require_whole_batches(loader, 4, 5)
    for other in ((3, 5), (4, 0)):
        with pytest.raises(ValueError, match="The loader has batch size 4 and seed 5; the trainer has batch size"):
            require_whole_batches(loader, *other)
    with pytest.raises(ValueError, match="The loader is one of 2 ranks; training uses one process"):
        require_whole_batches(TorchLoader(numbered(12), 4, seed=5, rank=1, world=2), 4, 5)


@pytest.mark.parametrize("stage", [VAETrainer, EnergyTrainer])
def test_trainers_take_no_loader_of_one_rank_of_several(stage: Any) -> None:
    preset = PRESETS["digits"]
    loader = TorchLoader(digits(), 8, rank=1, world=2)
    if stage is VAETrainer:
        given = (preset.nvae, replace(preset.vae_training, batch_size=8))
    else:
        given = (NVAE(preset.nvae), preset.energy, replace(preset.energy_training, batch_size=8))
    with pytest.raises(ValueError, match="one of 2 ranks"):
        stage(*given, loader)


@dataclass
class _Broken:
    """Images that cannot be read until `works`."""

    works: bool = False
    name: str = "broken"
    labels: None = None
    image_shape: tuple[int, int, int] = (1, 4, 4)

    def __len__(self) -> int:
        return 12

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        if not self.works:
            raise OSError("the disk is away")
        return numbered(12).read(indices)


def test_a_step_that_could_not_be_read_can_be_read_again() -> None:
    source = _Broken()
    loader = TorchLoader(source, 4)
    for _ in range(2):
        with pytest.raises(UnreadableDataError, match="the disk is away"):
            loader.batch(0)
    source.works = True
    assert torch.equal(loader.batch(0), TorchLoader(numbered(12), 4).batch(0))


@dataclass
class _Meeting:
    """The digits; a read ends only when as many threads read at once as the barrier is for."""

    barrier: threading.Barrier
    crops: list[bool] = field(default_factory=list)
    name: str = "digits"
    labels: None = None
    image_shape: tuple[int, int, int] = (1, 8, 8)
    images: ArraySource = field(default_factory=digits)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        self.barrier.wait(timeout=20)
        self.crops.append(crop is not None)
        return self.images.read(indices)


@pytest.mark.parametrize("cores, threads", [(1, 1), (3, 3), (64, 8)])
def test_batches_are_read_ahead_by_a_thread_per_core_and_are_the_same(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    source = _Meeting(threading.Barrier(threads))
    options: dict[str, Any] = {"seed": 5, "horizontal_flip": True}
    loader = TorchLoader(source, 100, random_crop=True, **options)
    assert torch.equal(loader.batch(0), TorchLoader(digits(), 100, workers=1, **options).batch(0))
    assert len(source.crops) >= 1 and all(source.crops)
    source.barrier.abort()  # releases the reads that still wait


@dataclass
class _Slow(_Meeting):
    """Counts reads, each of which waits until it is released."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    released: threading.Event = field(default_factory=threading.Event)

    def read(self, indices: npt.NDArray[np.int64], crop: npt.NDArray[np.float64] | None = None) -> Pixels:
        pixels = super().read(indices, crop)
        self.released.wait(timeout=20)
        return pixels


def test_a_closed_loader_ends_its_threads_and_reads_nothing_more() -> None:
    source = _Slow()
    loader = TorchLoader(source, 100, workers=2)
    waiting = threading.Thread(target=loader.batch, args=(0,))
    waiting.start()

    def waits() -> bool:
        assert waiting.ident is not None
        caller = sys._current_frames()[waiting.ident].f_back
        return caller is not None and caller.f_code.co_name == "result"

    while len(source.crops) < 2 or not waits():  # both threads read; the third batch is queued
        time.sleep(0.001)
    threads = set(loader._pool._threads)
    closing = threading.Thread(target=loader.close)
    closing.start()
    while not all(future.cancelled() or future.running() for future in list(loader._ahead)):
        time.sleep(0.001)
    source.released.set()
    closing.join()
    waiting.join()
    assert len(source.crops) == 2, "what was queued is not read"
    assert len(threads) == 2 and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_a_pixel_does_not_have_are_refused(bits: int) -> None:
    images = torch.zeros(1, 2, 2, 1, dtype=torch.uint8)
    with pytest.raises(UserError, match=f"bits is {bits}; it must be 1 to 8"):
        to_input(images, bits, "cpu")
