"""`python train.py` and `vaebm-fast train`: train a VAEBM in two stages: NVAE, then energy network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from vaebm_fast.checkpoint import load_nvae
from vaebm_fast.cli._options import registry
from vaebm_fast.config import (
    PRESETS,
    EnergyBlock,
    EnergyConfig,
    EnergyTraining,
    NVAEConfig,
    Preset,
    ReplayBuffer,
    Transform,
    VAETraining,
    find_preset,
    format_blocks,
    parse_blocks,
)
from vaebm_fast.data import Loader, open_source
from vaebm_fast.data.containers import ImageFolder
from vaebm_fast.data.loading import CacheName, LoaderName, open_loader
from vaebm_fast.data.sources import StoredImages
from vaebm_fast.report import save_grid
from vaebm_fast.runtime import command
from vaebm_fast.runtime.devices import DeviceName, choose_device
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.ranks import of_torchrun
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer, train

USAGE = """Train a VAEBM in two stages: first its NVAE, then its energy network against that NVAE.

    {prog} vae --preset NAME [--data DATA] [options]
    {prog} energy --preset NAME --nvae FILE [--data DATA] [options]

Every value of a preset is an option: `{prog} vae --preset NAME --help` lists them with that preset's values.
Rerun the same command to continue a stopped run.

Presets: {presets}"""
SHOWN_PRESET = "digits"  # --help shows its values if no preset is named


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of both stages."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))]
    """Preset that supplies all other defaults; help without it shows those of digits."""
    data: Annotated[str, tyro.conf.arg(metavar="DATA")]
    """What `vaebm-fast prepare` made or reads: a folder or archive of images, LMDB, arrays, ...; or `digits`."""
    horizontal_flip: bool
    """Mirror half of the training images."""
    random_crop: bool
    """Crop non-square training images at random positions instead of the centre."""
    transform: Transform | None
    """How images become square; without it as fits the data: resized by the short side and cropped, or padded."""
    loader: LoaderName = "auto"
    """What decodes images: NVIDIA DALI or torch's threads; auto picks DALI for images that memory cannot cache."""
    cache: CacheName = "auto"
    """Where decoded images are kept: nowhere, in the host's memory as far as they fit, or all on the device."""
    seed: int = 0
    """Seed of initial weights, image order and all noise."""
    device: DeviceName = "auto"
    """Device; auto uses the GPU if there is one."""
    run: tyro.conf.OmitArgPrefixes[RunOptions]

    def open_loader(self, image_shape: tuple[int, int, int], batch_size: int) -> Loader:
        """Training batches for a network of images (C, H, W)."""
        channels, side, _ = image_shape
        source = open_source(self.data, image_size=side, image_channels=channels, transform=self.transform)
        folder = source.container if isinstance(source, StoredImages) else None
        if isinstance(folder, ImageFolder) and folder.would_read(self.run.out):
            raise UserError(
                f"The output folder {self.run.out} lies in the data, {folder.path}, where its sample grids would "
                "become training images; name another one with --out."
            )
        return open_loader(
            source,
            batch_size,
            loader=self.loader,
            cache=self.cache,
            device=choose_device(self.device),
            seed=self.seed,
            horizontal_flip=self.horizontal_flip,
            random_crop=self.random_crop,
        )

    def trainer_options(self) -> dict[str, Any]:
        """Keyword arguments of both trainers."""
        return {"seed": self.seed, "device": choose_device(self.device)}


@dataclass(frozen=True, kw_only=True)
class VAEOptions(Options):
    """Stage 1: train an NVAE."""

    model: NVAEConfig
    training: VAETraining


@dataclass(frozen=True, kw_only=True)
class EnergyOptions(Options):
    """Stage 2: train an energy network against a fixed NVAE."""

    nvae: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The NVAE: stage 1's nvae.safetensors, or a published file."""
    buffer: Annotated[bool, tyro.conf.arg(name="training.buffer")]
    """Start some chains from a replay buffer of earlier ends; see --training.buffer.size and so on."""
    energy: EnergyConfig
    training: EnergyTraining


OptionsT = TypeVar("OptionsT", bound=Options)


def train_vae(arguments: Sequence[str], prog: str) -> int:
    """Stage 1; returns the exit code."""
    preset, common = start_options("vae", arguments)
    defaults = VAEOptions(**common, model=preset.nvae, training=preset.vae_training)
    options = parse(f"{prog} vae", defaults, arguments)
    model = options.model
    loader = options.open_loader(model.image_shape, options.training.batch_size)
    trainer = VAETrainer(model, options.training, loader, **options.trainer_options())
    compare_batches(preset.vae_gpus, preset.vae_training.batch_size, options.training.batch_size)
    return finish(trainer, options.run)


def train_energy(arguments: Sequence[str], prog: str) -> int:
    """Stage 2; returns the exit code."""
    preset, common = start_options("energy", arguments)
    buffer = preset.energy_training.buffer
    shown = replace(preset.energy_training, buffer=buffer or ReplayBuffer())
    defaults = EnergyOptions(
        **common, nvae=tyro.MISSING, buffer=buffer is not None, energy=preset.energy, training=shown
    )
    options = parse(f"{prog} energy", defaults, arguments)
    training = options.training
    if not options.buffer:
        if training.buffer != shown.buffer:
            raise UserError("The replay buffer is off, so its values have no effect; add --training.buffer to use it.")
        training = replace(training, buffer=None)
    vae, energy = load_nvae(options.nvae), options.energy
    loader = options.open_loader(energy.image_shape, training.batch_size)
    trainer = EnergyTrainer(vae, energy, training, loader, **options.trainer_options())
    compare_batches(preset.energy_gpus, preset.energy_training.batch_size, training.batch_size)
    return finish(trainer, options.run)


STAGES: Mapping[str, Callable[[Sequence[str], str], int]] = {"vae": train_vae, "energy": train_energy}


def start_options(stage: str, arguments: Sequence[str]) -> tuple[Preset, dict[str, Any]]:
    """(preset named in `arguments`, default values of `Options` for that preset and stage).

    Parsed before all other options because it sets their defaults. Raises ValueError for an unknown preset.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    name = finder.parse_known_args(arguments)[0].preset
    preset = find_preset(SHOWN_PRESET if name is None else name)
    return preset, {
        "preset": name or tyro.MISSING,
        "data": "digits" if preset.name == "digits" else tyro.MISSING,
        "horizontal_flip": preset.horizontal_flip,
        "random_crop": preset.random_crop,
        "transform": preset.transform,
        "run": RunOptions(Path("runs", preset.name, stage)),
    }


@registry.primitive_rule
def _blocks_as_one_option(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[EnergyBlock, ...]] | None:
    """--energy.blocks '1-1d 1-2': one argument, parsed by `parse_blocks`."""
    if info.type != tuple[EnergyBlock, ...]:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="BLOCKS",
        instance_from_str=lambda words: parse_blocks(words[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda blocks: [format_blocks(blocks)],
    )


def parse(prog: str, defaults: OptionsT, arguments: Sequence[str]) -> OptionsT:
    """Parse `arguments`; for invalid ones tyro prints the reason and exits with 2."""
    return tyro.cli(
        type(defaults),
        prog=prog,
        args=arguments,
        default=defaults,
        config=(tyro.conf.AvoidSubcommands,),  # the replay buffer's values stay options
        registry=registry,
    )


def compare_batches(processes: int, published: int, batch_size: int) -> None:
    """Print to stderr if the preset was published for another total batch on several processes."""
    if processes > 1 and processes * published != batch_size:
        print(
            f"Published: {processes} processes of {published} images; this run: 1 process of {batch_size}.",
            file=sys.stderr,
        )


def finish(trainer: VAETrainer | EnergyTrainer, run: RunOptions) -> int:
    """Train to the end, or until a signal stops it; returns the exit code."""
    try:
        path = train(trainer, run, save_grid)
    finally:
        trainer.loader.close()
    if path is None:
        print("Stopped; run the same command again to continue.")
        return command.INTERRUPTED
    print(f"The trained network is {path}.")
    return 0


def run(arguments: Sequence[str], prog: str) -> int:
    """Run the stage named by the first argument; `prog` is the command shown in help. Returns the exit code."""
    stage = arguments[0] if arguments else "--help"
    if stage in ("-h", "--help"):
        print(USAGE.format(prog=prog, presets=", ".join(PRESETS)))
        return 0
    if stage not in STAGES:
        raise UserError(f"{stage!r} is not a training stage; use one of {', '.join(STAGES)}.")
    ranks = of_torchrun()
    if ranks is not None and ranks.world > 1:
        raise UserError("Training uses one process; start it without torchrun.")
    return STAGES[stage](arguments[1:], prog)


def describe() -> None:
    """Train a VAEBM: `train vae` trains its NVAE, `train energy` its energy network; each has its own --help."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python train.py` with these arguments, by default the command line's; returns the exit code."""
    return command.run(partial(run, prog="python train.py"), sys.argv[1:] if arguments is None else arguments)
