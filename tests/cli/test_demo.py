"""The demo, shortened: the files it promises and metrics in the promised form. docs/results.md has what it achieves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vaebm_fast.cli import demo
from vaebm_fast.config import PRESETS


def test_demo_writes_pictures_curves_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = PRESETS["digits"]
    short = replace(
        preset,
        nvae=replace(preset.nvae, num_channels_enc=4, num_channels_dec=4),
        vae_training=replace(preset.vae_training, epochs=1, batch_size=128),
        energy_training=replace(
            preset.energy_training, iterations=10, batch_size=8, chain=replace(preset.energy_training.chain, steps=2)
        ),
        sampling=replace(preset.sampling, steps=3),
    )
    monkeypatch.setattr(demo, "PRESETS", {"digits": short})
    monkeypatch.setattr(demo, "SAMPLES", 70)
    returned = demo.run_demo(tmp_path / "demo", train_seeds=2, progress=False)
    metrics = json.loads((tmp_path / "demo" / "metrics.json").read_text())
    assert metrics == returned
    for kind in ("nvae", "vaebm", "floor"):
        assert len(metrics["frechet"][kind]) == 2 * demo.SAMPLING_SEEDS
        assert all(value > 0 for value in metrics["frechet"][kind])
    assert metrics["frechet"]["floor"][:3] == metrics["frechet"]["floor"][3:]
    assert metrics["frechet"]["vaebm"][:3] != metrics["frechet"]["vaebm"][3:]
    for seed in range(2):
        for name in ("samples.png", "energies.png", "training.png"):
            assert (tmp_path / "demo" / f"train_seed_{seed}" / name).stat().st_size > 5000
    assert "VAEBM samples" in (tmp_path / "demo" / "results.md").read_text()


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("chapter 1")
    with pytest.raises(ValueError, match="thesis.tex"):
        demo.run_demo(tmp_path, progress=False)
    assert precious.exists()
