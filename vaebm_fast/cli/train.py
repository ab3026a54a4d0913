"""`python train.py` and `vaebm-fast train`: train a VAEBM in two stages, its NVAE and then its energy network."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vaebm_fast.checkpoint import load_nvae
from vaebm_fast.config import (
    PRESETS,
    EnergyBlock,
    EnergyConfig,
    EnergyTraining,
    NVAEConfig,
    Preset,
    ReplayBuffer,
    VAETraining,
    find_preset,
    format_blocks,
    parse_blocks,
)
from vaebm_fast.data import Loader, TorchLoader, open_source
from vaebm_fast.report import save_grid
from vaebm_fast.runtime import command
from vaebm_fast.runtime.devices import DeviceName, choose_device
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer, train

USAGE = """Train a VAEBM in two stages: first its NVAE, then its energy network against that NVAE.

    {prog} vae --preset NAME [--data FOLDER] [options]
    {prog} energy --preset NAME --nvae FILE [--data FOLDER] [options]

Every value of a preset is an option: `{prog} vae --preset NAME --help` lists them with that preset's values.
The same command, run again, continues a run that was stopped.

Presets: {presets}"""
SHOWN_PRESET = "digits"  # whose values --help shows where no preset is named


@dataclass(frozen=True, kw_only=True)
class Options:
    """What both stages ask for."""

    preset: Annotated[str, tyro.conf.arg(metavar="|".join(PRESETS))]
    """The settings that are the defaults of all other options; help without it shows those of digits."""
    data: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """A folder of images or of idx files to train on, or `digits`, which are built in."""
    horizontal_flip: bool
    """Mirror half of the training images."""
    random_crop: bool
    """Cut training images that are not square at random places, not in the middle."""
    seed: int = 0
    """Decides the first weights, the order of the images and all noise."""
    device: DeviceName = "auto"
    """Where to train; auto is the GPU where there is one."""
    run: tyro.conf.OmitArgPrefixes[RunOptions]

    def loader(self, image_shape: tuple[int, int, int], batch_size: int) -> Loader:
        """Training batches for a network of images (C, H, W)."""
        channels, side, _ = image_shape
        return TorchLoader(
            open_source(self.data, image_size=side, image_channels=channels),
            batch_size,
            seed=self.seed,
            horizontal_flip=self.horizontal_flip,
            random_crop=self.random_crop,
            pinned=choose_device(self.device).type == "cuda",
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
    """Stage 2: train an energy network against an NVAE, which stays as it is."""

    nvae: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The NVAE: stage 1's nvae.safetensors, or a published file."""
    buffer: Annotated[bool, tyro.conf.arg(name="training.buffer")]
    """Start some chains where earlier ones ended; how, is set by --training.buffer.size and so on."""
    energy: EnergyConfig
    training: EnergyTraining


OptionsT = TypeVar("OptionsT", bound=Options)


def train_vae(arguments: Sequence[str], prog: str) -> int:
    """Stage 1; returns the exit code."""
    preset, common = start_options("vae", arguments)
    defaults = VAEOptions(**common, model=preset.nvae, training=preset.vae_training)
    options = parse(f"{prog} vae", defaults, arguments)
    model = options.model
    loader = options.loader(model.image_shape, options.training.batch_size)
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
            raise UserError("The replay buffer is off, so its values mean nothing; add --training.buffer to use it.")
        training = replace(training, buffer=None)
    vae, energy = load_nvae(options.nvae), options.energy
    loader = options.loader(energy.image_shape, training.batch_size)
    trainer = EnergyTrainer(vae, energy, training, loader, **options.trainer_options())
    compare_batches(preset.energy_gpus, preset.energy_training.batch_size, training.batch_size)
    return finish(trainer, options.run)


STAGES: Mapping[str, Callable[[Sequence[str], str], int]] = {"vae": train_vae, "energy": train_energy}


def start_options(stage: str, arguments: Sequence[str]) -> tuple[Preset, dict[str, Any]]:
    """The preset that `arguments` name, and what it and the stage make the defaults of `Options`.

    Found before all other options, because it decides their defaults. Raises ValueError for one that does not exist.
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
        "run": RunOptions(Path("runs", preset.name, stage)),
    }


_registry = ConstructorRegistry()


@_registry.primitive_rule
def _blocks_as_one_option(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[tuple[EnergyBlock, ...]] | None:
    """--energy.blocks '1-1d 1-2': one word of the command line, read by `parse_blocks`."""
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
    """The options that `arguments` ask for; tyro explains arguments that do not fit, and exits with 2."""
    return tyro.cli(
        type(defaults),
        prog=prog,
        args=arguments,
        default=defaults,
        config=(tyro.conf.AvoidSubcommands,),  # the replay buffer's values are options, not a command
        registry=_registry,
    )


def compare_batches(processes: int, published: int, batch_size: int) -> None:
    """Say on stderr where the preset's other settings were published for a larger batch, on several processes."""
    if processes > 1 and processes * published != batch_size:
        print(
            f"Published: {processes} processes of {published} images; this run: 1 process of {batch_size}.",
            file=sys.stderr,
        )


def finish(trainer: VAETrainer | EnergyTrainer, run: RunOptions) -> int:
    """Train to the end, or until a signal stops it; returns the exit code."""
    path = train(trainer, run, save_grid)
    if path is None:
        print("Stopped; run the same command again to continue.")
        return command.INTERRUPTED
    print(f"The trained network is {path}.")
    return 0


def run(arguments: Sequence[str], prog: str) -> int:
    """Run the stage that `arguments` begin with, for a command line that begins with `prog`; returns the exit code."""
    stage = arguments[0] if arguments else "--help"
    if stage in ("-h", "--help"):
        print(USAGE.format(prog=prog, presets=", ".join(PRESETS)))
        return 0
    if stage not in STAGES:
        raise UserError(f"{stage!r} is not a stage of training; begin with one of {', '.join(STAGES)}.")
    return STAGES[stage](arguments[1:], prog)


def describe() -> None:
    """Train a VAEBM: `train vae` trains its NVAE, `train energy` its energy network; each has a --help of its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python train.py` with these arguments, by default the command line's; returns the exit code."""
    return command.run(partial(run, prog="python train.py"), sys.argv[1:] if arguments is None else arguments)
