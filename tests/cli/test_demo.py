"""The demo, shortened: the files it promises and metrics in the promised form. docs/results.md has what it achieves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from vaebm_fast.cli import demo
from vaebm_fast.config import PRESETS
from vaebm_fast.runtime.locks import Lock, LockedError


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


@pytest.mark.parametrize("name", ["thesis.tex", "vae/nvae.safetensors", "energy/training.safetensors", "samples.png"])
def test_a_folder_that_is_no_demo_is_left_alone(name: str, tmp_path: Path) -> None:
    """Training, too, writes folders called vae and energy."""
    precious = tmp_path / name
    precious.parent.mkdir(exist_ok=True)
    precious.write_text("chapter 1")
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}, which no demo wrote"):
        demo.run_demo(tmp_path, progress=False)
    assert precious.read_text() == "chapter 1" and not (tmp_path / ".lock").exists()


def test_a_demo_replaces_an_earlier_one_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_run", lambda out, *_: {"left": sorted(path.name for path in out.iterdir())})
    assert demo.run_demo(tmp_path)["left"] == [".demo", ".lock"]
    (tmp_path / "vae").mkdir()
    (tmp_path / "metrics.json").touch()
    (tmp_path / f".metrics.json.{'0' * 32}.tmp").touch()
    assert demo.run_demo(tmp_path)["left"] == [".demo", ".lock"]
    (tmp_path / "vae").mkdir()
    (tmp_path / "notes").touch()
    with pytest.raises(ValueError, match="holds notes, which no demo wrote"):
        demo.run_demo(tmp_path)
    assert (tmp_path / "vae").exists()
    (tmp_path / "notes").unlink()
    with Lock(tmp_path / ".lock", tmp_path), pytest.raises(LockedError):
        demo.run_demo(tmp_path)
    (tmp_path / ".DS_Store").touch()  # a file manager looked at it
    assert demo.run_demo(str(tmp_path))["left"] == [".DS_Store", ".demo", ".lock"]
    (tmp_path / "train_seed_mine").mkdir()
    with pytest.raises(ValueError, match="holds train_seed_mine"):
        demo.run_demo(tmp_path)


def test_a_demo_replaces_one_of_the_former_version_and_unlinks_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_run", lambda out, *_: {"left": sorted(path.name for path in out.iterdir())})
    out, elsewhere = tmp_path / "demo", tmp_path / "elsewhere"
    for folder in (out, elsewhere, out / "train_seed_0"):
        folder.mkdir()
    (elsewhere / "precious").touch()
    (out / "vae").symlink_to(elsewhere)
    for name in ("metrics.json", "results.md"):
        (out / name).touch()
    assert demo.run_demo(out)["left"] == [".demo", ".lock"]
    assert (elsewhere / "precious").exists()
