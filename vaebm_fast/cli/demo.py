"""`vaebm-fast demo`: train and sample a small VAEBM on handwritten digits on a CPU; show what the energy changes.

It evaluates x(eps), the model's samples, and the decoder's means. The held-out digits train neither network, nor the
classifier that computes the features.
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vaebm_fast.chain.langevin import LangevinSampler, to_uint8
from vaebm_fast.checkpoint import load_energy, load_nvae
from vaebm_fast.config import PRESETS, Preset
from vaebm_fast.data import ArraySource, TorchLoader, digits, to_tensor
from vaebm_fast.data.containers.base import is_hidden
from vaebm_fast.evaluation.digit_features import SAMPLES, SAMPLING_SEEDS, Judge, everything, train_digit_classifier
from vaebm_fast.frozen import freeze
from vaebm_fast.models import VAEBM
from vaebm_fast.models.layers import channels_last
from vaebm_fast.report import save_grid
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import TEMPORARY, write
from vaebm_fast.runtime.locks import Lock
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer, train

LOCK, MARK = ".lock", ".demo"  # MARK: a demo made this folder, so that another may replace it
OF_DEMOS = re.compile(rf"train_seed_[0-9]+|{TEMPORARY.pattern}")
KINDS = ("nvae", "vaebm", "floor")


def demo(*, out: Path = Path("runs/demo"), train_seeds: int = 1, progress: bool = True) -> None:
    """Train a small VAEBM on handwritten digits on the CPU, sample it, and measure what the energy network improves.

    Args:
        out: Output folder; an earlier demo in it is replaced.
        train_seeds: Number of training runs, each with its own seed.
        progress: Show progress bars.
    """
    run_demo(out, train_seeds=train_seeds, progress=progress)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One torch thread: 8x8 images gain nothing from a second, and it stalls on busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run_demo(out: str | Path, *, train_seeds: int = 1, progress: bool = True) -> dict[str, Any]:
    """Train, sample, evaluate and plot; writes everything to `out` and returns the metrics.

    Removes an earlier demo's results from `out`; raises ValueError if the folder holds anything else, or if another
    demo runs there.
    """
    out = Path(out)
    if train_seeds < 1:
        raise UserError(f"train_seeds is {train_seeds}; it must be at least 1.")
    _require_demo(out)
    out.mkdir(parents=True, exist_ok=True)
    with Lock(out / LOCK, out), _one_thread():
        _require_demo(out)
        _clear(out)
        return _run(out, train_seeds, progress)


def _run(out: Path, train_seeds: int, progress: bool) -> dict[str, Any]:
    from vaebm_fast.report import figures  # lazy: other commands work without Matplotlib

    began = time.perf_counter()
    preset, source, held_out = PRESETS["digits"], digits(split="train"), digits(split="held_out")
    classifier = train_digit_classifier(source)
    judge = Judge(classifier, classifier.features(everything(held_out)[0]))
    print(f"Classifier for the features: {classifier.accuracy(held_out):.1%} of the held-out digits right.")
    frechet: dict[str, list[float]] = {kind: [] for kind in (*KINDS, "nvae_mean", "vaebm_mean")}
    for seed in range(train_seeds):
        folder = out if train_seeds == 1 else out / f"train_seed_{seed}"
        model = _train(preset, source, folder, seed=seed, progress=progress)
        print(f"Drawing {SAMPLES} samples with each of {SAMPLING_SEEDS} sampling seeds.")
        for sampling_seed in range(SAMPLING_SEEDS):
            for kind, distance in _judge(model, preset, source, judge, sampling_seed).items():
                frechet[kind].append(distance)
        rows, energies, data_energy = _course(model, preset, held_out)
        figures.chain_picture(rows, folder / "samples.png")
        figures.energy_figure(energies, data_energy, folder / "energies.png")
        figures.training_figure(folder, folder / "training.png")
    metrics = {"frechet": frechet, "seconds": time.perf_counter() - began, "samples": SAMPLES}
    write(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    table = results_table(frechet)
    write(out / "results.md", table + "\n")
    print(f"\n{table}\n\n{metrics['seconds']:.0f} s in all; pictures, curves and metrics.json are in {out}/.")
    return metrics


def _require_demo(out: Path) -> None:
    """Raise UserError if the folder holds anything that no demo wrote.

    Training, too, writes folders called vae and energy: only a mark, or the results of a demo of before, tell.
    """
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if MARK in names:
        names = [name for name in names if name == MARK or not is_hidden(name)]
    mine = {LOCK, MARK, "vae", "energy", "samples.png", "energies.png", "training.png", "metrics.json", "results.md"}
    foreign = [name for name in names if name not in mine and not OF_DEMOS.fullmatch(name)]
    if not foreign and MARK not in names and not {"metrics.json", "results.md"} <= set(names):
        foreign = [name for name in names if name != LOCK]
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which no demo wrote; remove it, or name another folder with --out.")


def _clear(out: Path) -> None:
    """Remove an earlier demo's results."""
    (out / MARK).touch()
    for path in out.iterdir():
        if is_hidden(path.name) and not TEMPORARY.fullmatch(path.name):
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _train(preset: Preset, source: ArraySource, folder: Path, *, seed: int, progress: bool) -> VAEBM:
    """Train both stages, each in its own folder."""

    def options(name: str) -> RunOptions:
        return RunOptions(folder / name, log_every=10, save_every=10**6, grid_every=10**6, progress=progress)

    print(f"Stage 1: the NVAE, {preset.vae_training.epochs} epochs over {len(source)} digits (seed {seed}).")
    loader = TorchLoader(source, preset.vae_training.batch_size, seed=seed)
    vae_file = train(VAETrainer(preset.nvae, preset.vae_training, loader, seed=seed), options("vae"), save_grid)
    if vae_file is None:
        raise KeyboardInterrupt
    vae = load_nvae(vae_file)
    print(f"Stage 2: the energy network, {preset.energy_training.iterations} iterations.")
    loader = TorchLoader(source, preset.energy_training.batch_size, seed=seed)
    trainer = EnergyTrainer(vae, preset.energy, preset.energy_training, loader, seed=seed)
    energy_file = train(trainer, options("energy"), save_grid)
    if energy_file is None:
        raise KeyboardInterrupt
    return channels_last(VAEBM(vae, load_energy(energy_file))).requires_grad_(False)


def _sampler(model: VAEBM, preset: Preset) -> LangevinSampler:
    return LangevinSampler(freeze(model), **asdict(preset.sampling))


def _judge(model: VAEBM, preset: Preset, source: ArraySource, judge: Judge, sampling_seed: int) -> dict[str, float]:
    """Frechet distances of one sampling seed: chain starts (the NVAE's samples), chain ends, and real digits."""
    sampler = _sampler(model, preset)
    seeds = range(sampling_seed * SAMPLES, (sampling_seed + 1) * SAMPLES)
    layout = sampler.noise_layout
    with torch.no_grad():
        start, end = sampler.start(seeds), sampler.run(seeds)
        nvae_z, nvae_x = layout.split(start)
        vaebm_z, vaebm_x = layout.split(end.eps)
        images = {
            "nvae": model.image(nvae_z, nvae_x),
            "vaebm": model.image(vaebm_z, vaebm_x),
            "nvae_mean": model.mean_image(nvae_z),
            "vaebm_mean": end.images,
        }
    chosen = np.random.default_rng(sampling_seed).integers(len(source), size=SAMPLES)
    images["floor"] = to_tensor(source.read(chosen))
    return {kind: judge.distance(batch) for kind, batch in images.items()}


def _course(model: VAEBM, preset: Preset, held_out: ArraySource) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(rows of images: data, NVAE and chain; energies along the chain [T + 1, N]; energies of held-out data [N])."""
    sampler = _sampler(model, preset)
    seeds, columns = range(200), 12
    shown = {1 + preset.sampling.steps // 4, 1 + preset.sampling.steps // 2, preset.sampling.steps}
    energies: list[Tensor] = []
    rows: dict[str, Tensor] = {"data": torch.from_numpy(held_out.read(np.arange(columns)))}

    @torch.no_grad()
    def look(step: int, eps: Tensor) -> None:
        x = model.image(*sampler.noise_layout.split(eps))
        energies.append(model.energy(x))
        if step == 0 or step in shown:
            name = "NVAE" if step == 0 else f"step {step}" if step < preset.sampling.steps else "VAEBM"
            rows[name] = to_uint8(x[:columns])

    look(0, sampler.start(seeds))
    sampler.run(seeds, on_step=look)
    with torch.no_grad():
        data_energy = model.energy(everything(held_out)[0])
    return rows, torch.stack(energies), data_energy


def results_table(frechet: dict[str, list[float]]) -> str:
    """The Frechet distances as a Markdown table: mean, spread, and every sampling seed."""
    names = {
        "nvae": "NVAE samples",
        "vaebm": "VAEBM samples",
        "nvae_mean": "NVAE, decoder means",
        "vaebm_mean": "VAEBM, decoder means",
        "floor": "real digits (training half)",
    }
    lines = ["| Frechet distance to held-out digits | mean | standard deviation | each |", "|---|---|---|---|"]
    for kind, name in names.items():
        values = frechet[kind]
        each = " ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {statistics.mean(values):.2f} | {statistics.stdev(values):.2f} | {each} |")
    return "\n".join(lines)
