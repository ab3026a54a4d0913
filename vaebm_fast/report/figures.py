"""Figures of a run as PNG files: rows of samples, energies along a chain, training curves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from vaebm_fast.report.pictures import tile
from vaebm_fast.runtime.files import replacing


def chain_picture(rows: Mapping[str, Tensor], path: Path) -> None:
    """Draw one labelled row of images, uint8 [N, H, W, C], per entry, top to bottom."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(len(rows), 1, figsize=(0.75 * columns + 1, 0.72 * len(rows)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        sheet = tile(images, columns).numpy()
        axis.imshow(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet, cmap="gray", vmin=0, vmax=255)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    _save(figure, path)


def energy_figure(energies: Tensor, data_energy: Tensor, path: Path) -> None:
    """Plot energies along chains, [T + 1, N] from start to end, with those of held-out data, [N]."""
    figure, axis = plt.subplots(figsize=(6, 4))
    low, middle, high = (energies.quantile(q, dim=1) for q in (0.1, 0.5, 0.9))
    steps = range(len(energies))
    axis.fill_between(steps, low, high, alpha=0.25, label="chains, 10% to 90%")
    axis.plot(steps, middle, label="chains, median")
    axis.axhline(float(data_energy.median()), color="black", linestyle="--", label="held-out data, median")
    axis.set(xlabel="Langevin step", ylabel="energy E(x)", title="Energies along the chain")
    axis.legend()
    _save(figure, path)


def training_figure(folder: Path, path: Path) -> None:
    """Plot training curves of both stages from the metrics.jsonl files in `folder`/vae and `folder`/energy."""
    panels = [
        ("vae", ["bits_per_dim"], "bits per dimension"),
        ("vae", ["kl"], "KL (nats)"),
        ("energy", ["energy_data", "energy_negative"], "energy"),
        ("energy", ["loss"], "energy gap, data - negatives"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axis, (stage, names, label) in zip(axes, panels, strict=True):
        records = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        for name in names:
            there = [record for record in records if name in record]  # rolled-back steps have no energies
            axis.plot([r["step"] for r in there], [r[name] for r in there], label=name.replace("_", " "))
        axis.set(xlabel=f"{'NVAE' if stage == 'vae' else 'energy network'} step", ylabel=label)
        if len(names) > 1:
            axis.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
