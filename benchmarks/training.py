"""How long does a training iteration of each stage take, beside the same iteration on the plain modules?

Stage 1 is one update of the NVAE, stage 2 the chains of the negatives and one update of the energy network, at the
preset's settings with random images; reading them is measured by `loaders`. The plain candidate keeps all modules in
PyTorch's default memory format and runs stage 2's chains on them; the update itself is the same code. Candidates take
turns in one process. A GPU holds both at once.

    python -m benchmarks training [--preset NAME] [--stage vae|energy] [--batch N] [--steps T] [--rounds R]
                                  [--into NAME] [--results FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count
from typing import Literal

import numpy as np
import torch
from torch import nn

from benchmarks import report
from benchmarks.environment import RESULTS
from benchmarks.measure import default_device, summary, take_turns
from benchmarks.options import at_least_one
from benchmarks.report import PLAIN
from benchmarks.results_file import ResultsFile, Row
from benchmarks.step.chain_candidates import OtherPair
from vaebm_fast import PRESETS
from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.chain.noise import Stream
from vaebm_fast.config import EnergyTraining, Preset
from vaebm_fast.data import ArraySource, Loader, TorchLoader
from vaebm_fast.models import NVAE
from vaebm_fast.runtime.files import expanded
from vaebm_fast.training.energy import EnergyTrainer
from vaebm_fast.training.vae import VAETrainer

Stage = Literal["vae", "energy"]
STAGES: tuple[Stage, ...] = ("vae", "energy")
TRAINER = "trainer"


def measure(
    preset: str, stage: Stage, batch: int, device: torch.device, *, steps: int | None = None, rounds: int | None = None
) -> list[Row]:
    """A row per candidate: seconds of an iteration of `batch` images. steps: length of stage 2's chains, if given."""
    make = vae_iterations if stage == "vae" else partial(energy_iterations, steps=steps)
    candidates = {name: make(PRESETS[preset], batch, device, plain=name == PLAIN) for name in (TRAINER, PLAIN)}
    samples = take_turns(candidates, device, rounds=rounds)
    facts = {"preset": preset, "stage": stage, "batch": batch}
    rows = {name: {**facts, "candidate": name, **summary(taken)} for name, taken in samples.items()}
    for row in rows.values():
        row["over plain"] = rows[PLAIN]["median_s"] / row["median_s"]
    return list(rows.values())


def vae_iterations(preset: Preset, batch: int, device: torch.device, *, plain: bool) -> Callable[[], object]:
    """Stage 1: each call is the next iteration, the first with the data-dependent initialisation."""
    training = replace(preset.vae_training, batch_size=batch)
    trainer = VAETrainer(preset.nvae, training, _loader(preset, batch), device=device)
    if not plain:
        return _next_step(trainer.step)
    _contiguous(trainer.vae)

    def step(index: int) -> object:
        x = trainer.images(index).contiguous()
        if index == 0:
            trainer.vae.initialize_from_data(x, trainer.noise(index))
        return trainer.update(x, trainer.noise(index), index)

    return _next_step(step)


def energy_iterations(
    preset: Preset, batch: int, device: torch.device, *, plain: bool, steps: int | None = None
) -> Callable[[], object]:
    """Stage 2, without a replay buffer, whose cost docs/performance.md counts; calls as in `vae_iterations`."""
    trainer = energy_trainer(preset, batch, _loader(preset, batch), device, steps)
    training = trainer.training
    if not plain:
        return _next_step(trainer.step)
    _contiguous(trainer.model)

    def step(index: int) -> object:
        if index == 0:
            trainer.initialize()
        x = trainer.images(index).contiguous()
        other = OtherPair(trainer.model, trainer.model.potential_and_grad)
        sampler = LangevinSampler(other, **asdict(training.chain), capture=False)
        chains = sampler.run(trainer.chain_seeds(index), stream=Stream.TRAIN_CHAIN)
        with torch.no_grad():
            mean = training.use_mean_negatives
            images = chains.images if mean else trainer.model.image(*sampler.noise_layout.split(chains.eps))
        return trainer.update(x, images.contiguous())

    return _next_step(step)


def energy_trainer(
    preset: Preset, batch: int, loader: Loader, device: torch.device | str = "cpu", steps: int | None = None
) -> EnergyTrainer:
    """Stage 2 of a preset with an untrained NVAE, without a replay buffer."""
    training = _energy_training(preset, batch, steps)
    torch.manual_seed(0)
    return EnergyTrainer(NVAE(preset.nvae), preset.energy, training, loader, device=device)


def _energy_training(preset: Preset, batch: int, steps: int | None) -> EnergyTraining:
    training = replace(preset.energy_training, batch_size=batch, buffer=None)
    if steps is None:
        return training
    step_size = training.chain.step_sizes[0] if training.chain.steps else 1e-6
    return replace(training, chain=replace(training.chain, steps=steps, step_size=step_size))


def _loader(preset: Preset, batch: int) -> TorchLoader:
    """Random images, as many as a batch."""
    channels, side, _ = preset.nvae.image_shape
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, channels), np.uint8)
    return TorchLoader(ArraySource("random images", images), batch, workers=1)


def _contiguous(module: nn.Module) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = tensor.data.contiguous()


def _next_step(step: Callable[[int], object]) -> Callable[[], object]:
    """A call that runs steps 0, 1, ..."""
    indices: Iterator[int] = count()
    return lambda: step(next(indices))


def main(arguments: Sequence[str]) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="celeba_64")
    parser.add_argument("--stage", choices=STAGES, action="append", help="by default both")
    parser.add_argument("--batch", type=at_least_one, default=4)
    parser.add_argument("--steps", type=at_least_one, help="of stage 2's chains; by default the preset's")
    parser.add_argument("--rounds", type=at_least_one)
    parser.add_argument("--into", metavar="NAME", default="training", help="the result file")
    parser.add_argument("--results", type=expanded, default=RESULTS)
    options = parser.parse_args(arguments)
    file = ResultsFile(options.into, "How long does a training iteration take?", {}, options.results)
    for stage in options.stage or STAGES:
        rows = measure(
            options.preset, stage, options.batch, default_device(), steps=options.steps, rounds=options.rounds
        )
        for row in rows:
            file.add(row)
        report.write_table(file.path)
    print(report.write_table(file.path))
