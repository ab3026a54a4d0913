"""The benchmarks of training iterations and of loaders: that both sides do the same work, and what a table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import loaders, training
from benchmarks.report import PLAIN
from vaebm_fast import PRESETS

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
    sizes = ["--images", "8", "--batch", "4", "--side", "16", "--rounds", "1"]
    loaders.main([*sizes, "--results", str(tmp_path)])
    (path,) = tmp_path.glob("loaders_*.json")
    rows = json.loads(path.read_text())["results"]
    assert {row["source"] for row in rows} == {"array", "png", "jpg", "jpg, cached"}
    for row in rows:
        assert row["read_images_per_second"] == pytest.approx(8 / row["median_s"])
        (base,) = [
            other["median_s"]
            for other in rows
            if (other["source"], other["workers"], other["candidate"])
            == (row["source"], row["workers"], loaders.BASELINE)
        ] or [None]
        assert row["over DataLoader"] == (None if base is None else pytest.approx(base / row["median_s"]))
    assert "| png, 16 x 16 | DataLoader, Pillow | 2 | 4 |" in capsys.readouterr().out


def test_both_readers_give_the_pixels_of_the_files(tmp_path: Path) -> None:
    images = loaders.smooth_images(3, 16)
    assert images.shape == (3, 16, 16, 3) and 20 < images.std() < 80
    folder = loaders.write_folder(images, tmp_path / "png", ".png")
    with Image.open(folder / "000001.png") as image:
        assert image.size == (16, 16)
    assert torch.equal(loaders.PillowFolder(folder)[1], torch.from_numpy(images[1]))
    assert loaders.read_by_dataloader(folder, 2, 0) == 2, "the incomplete batch is dropped, as by the loader"
