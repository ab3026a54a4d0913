"""The benchmarks of training iterations and of loaders: that both sides do the same work, and what a table says."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import loaders, training
from benchmarks.report import PLAIN
from vaebm_fast import PRESETS
from vaebm_fast.data import TorchLoader, open_source

CPU = torch.device("cpu")
DIGITS = PRESETS["digits"]


@pytest.mark.parametrize("plain", [False, True])
def test_iterations_of_stage_1_learn_the_same_on_both_sides(plain: bool) -> None:
    both = [training.vae_iterations(DIGITS, 8, CPU, plain=side) for side in (False, plain)]
    for _ in range(3):
        first, second = (step() for step in both)
        assert isinstance(first, dict) and isinstance(second, dict)
        assert float(second["loss"]) == pytest.approx(float(first["loss"]), rel=2e-3)
        assert first["spectral"] > 0


@pytest.mark.parametrize("plain", [False, True])
def test_iterations_of_stage_2_learn_the_same_on_both_sides(plain: bool) -> None:
    both = [training.energy_iterations(DIGITS, 8, CPU, plain=side, steps=1) for side in (False, plain)]
    for _ in range(2):
        first, second = (step() for step in both)
        for name in ("energy_data", "energy_negative", "spectral"):
            assert float(second[name]) == pytest.approx(float(first[name]), rel=2e-3, abs=1e-4)


def test_the_length_of_stage_2s_chains_is_the_presets_or_that_given() -> None:
    assert training._energy_training(DIGITS, 4, None).chain == DIGITS.energy_training.chain
    shorter = training._energy_training(DIGITS, 4, 2)
    assert (shorter.chain.steps, shorter.batch_size, shorter.buffer) == (2, 4, None)
    assert shorter.chain.step_sizes == DIGITS.energy_training.chain.step_sizes[:2]


def test_a_run_writes_rows_and_the_table_of_both_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training.main(["--preset", "digits", "--batch", "4", "--steps", "1", "--rounds", "2", "--results", str(tmp_path)])
    (path,) = tmp_path.glob("training_*.json")
    rows = json.loads(path.read_text())["results"]
    assert [(row["stage"], row["candidate"]) for row in rows] == [
        (stage, name) for stage in training.STAGES for name in (training.TRAINER, PLAIN)
    ]
    for trainer, plain in (rows[:2], rows[2:]):
        assert plain["over plain"] == 1
        assert trainer["over plain"] == pytest.approx(plain["median_s"] / trainer["median_s"])
    printed = capsys.readouterr().out
    assert "| digits, 4 | energy | plain |" in printed and path.with_suffix(".md").read_text() in printed


def test_loaders_read_every_image_once_and_are_compared_with_the_same_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--images", "16", "--batch", "4", "--side", "16", "--rounds", "1", "--without-training"]
    loaders.main([*sizes, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("loaders_*.json")
    rows = json.loads(path.read_text())["results"]
    raw = {"prepared array", "raw LMDB", "TFRecord"}
    assert {row["source"] for row in rows} == raw | {"zip of png", "tar of jpg", "png", "jpg"}
    assert {row["candidate"] for row in rows if row["source"] == "jpg"} == {
        *("TorchLoader", "TorchLoader, cache host", "ResidentLoader", "DaliLoader", loaders.BASELINE)
    }
    assert [row["source"] for row in rows if row["candidate"] == loaders.WEBDATASET] == ["tar of jpg"]
    (base,) = [row for row in rows if (row["source"], row["candidate"]) == ("jpg", loaders.BASELINE)]
    for row in rows:
        assert row["read_images_per_second"] == pytest.approx(16 / row["median_s"])
        assert row["over DataLoader"] == pytest.approx(row["read_images_per_second"] / base["read_images_per_second"])
    assert "| png, 16 x 16 | DataLoader, Pillow | 4 | 4 |" in capsys.readouterr().out


def test_every_source_of_the_loaders_benchmark_holds_the_images(tmp_path: Path) -> None:
    images = loaders.smooth_images(6, 16)
    for name, path in loaders.write_sources(images, tmp_path).items():
        found = open_source(path, image_size=16, image_channels=3).read(np.arange(6))
        order = [0, 4, 1, 5, 2, 3] if "tar" in name else list(range(6))  # shard by shard
        apart = np.abs(found.astype(int) - images[order].astype(int)).mean(axis=(1, 2, 3))
        assert (apart <= (25 if "jpg" in name else 0)).all(), name


def test_the_share_of_an_iteration_that_waits_is_of_the_time_in_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = PRESETS["digits"]
    small = replace(
        preset, nvae=replace(preset.nvae, image_channels=3), energy=replace(preset.energy, image_channels=3)
    )
    monkeypatch.setattr(loaders, "PRESETS", {"celeba_64": small})
    monkeypatch.setattr(loaders, "TRAINING_STEPS", 2)
    read = TorchLoader.batch

    def slow(loader: TorchLoader, step: int) -> torch.Tensor:
        time.sleep(0.2)
        return read(loader, step)

    monkeypatch.setattr(TorchLoader, "batch", slow)
    seconds, share = loaders.waiting_share(tmp_path)
    assert 0.2 <= seconds * share < seconds and 0.05 < share < 1


def test_both_readers_give_the_pixels_of_the_files(tmp_path: Path) -> None:
    images = loaders.smooth_images(3, 16)
    assert images.shape == (3, 16, 16, 3) and 20 < images.std() < 80
    folder = loaders.write_folder(images, tmp_path / "png", ".png")
    with Image.open(folder / "000001.png") as image:
        assert image.size == (16, 16)
    assert torch.equal(loaders.PillowFolder(folder)[1], torch.from_numpy(images[1]))
