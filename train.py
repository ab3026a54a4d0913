"""Train a VAEBM in two stages: first its NVAE, then its energy network against that NVAE.

    python train.py vae --preset NAME [--data FOLDER] [options]
    python train.py energy --preset NAME --nvae FILE [--data FOLDER] [options]

Every value of a preset is an option: `python train.py vae --preset NAME --help` lists them with that preset's values.
The same command, run again, continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from vaebm_fast import _command
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
    format_blocks,
    parse_blocks,
)
from vaebm_fast.data import open_source
from vaebm_fast.training import EnergyTrainer, RunOptions, VAETrainer, train

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
    device: _command.DeviceName = "auto"
    """Where to train; auto is the GPU where there is one."""
    run: tyro.conf.OmitArgPrefixes[RunOptions]

    def trainer_options(self) -> dict[str, Any]:
        """What both trainers take by these names."""
        return {
            "seed": self.seed,
            "horizontal_flip": self.horizontal_flip,
            "random_crop": self.random_crop,
            "device": _command.choose_device(self.device),
        }


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


def train_vae(arguments: Sequence[str]) -> int:
    """`train.py vae`; returns the exit code."""
    preset, common = start_options("vae", arguments)
    defaults = VAEOptions(**common, model=preset.nvae, training=preset.vae_training)
    options = parse("vae", defaults, arguments)
    model = options.model
    source = open_source(options.data, image_size=model.image_size, image_channels=model.image_channels)
    trainer = VAETrainer(model, options.training, source, **options.trainer_options())
    compare_batches(preset.vae_gpus, preset.vae_training.batch_size, options.training.batch_size)
    return finish(trainer, options.run)


def train_energy(arguments: Sequence[str]) -> int:
    """`train.py energy`; returns the exit code."""
    preset, common = start_options("energy", arguments)
    buffer = preset.energy_training.buffer
    shown = replace(preset.energy_training, buffer=buffer or ReplayBuffer())
    defaults = EnergyOptions(
        **common, nvae=tyro.MISSING, buffer=buffer is not None, energy=preset.energy, training=shown
    )
    options = parse("energy", defaults, arguments)
    training = options.training
    if not options.buffer:
        if training.buffer != shown.buffer:
            raise ValueError("The replay buffer is off, so its values mean nothing; add --training.buffer to use it.")
        training = replace(training, buffer=None)
    vae, energy = load_nvae(options.nvae), options.energy
    source = open_source(options.data, image_size=energy.image_size, image_channels=energy.image_channels)
    trainer = EnergyTrainer(vae, energy, training, source, **options.trainer_options())
    compare_batches(preset.energy_gpus, preset.energy_training.batch_size, training.batch_size)
    return finish(trainer, options.run)


STAGES: Mapping[str, Callable[[Sequence[str]], int]] = {"vae": train_vae, "energy": train_energy}


def start_options(stage: str, arguments: Sequence[str]) -> tuple[Preset, dict[str, Any]]:
    """The preset that `arguments` name, and what it and the stage make the defaults of `Options`.

    Found before all other options, because it decides their defaults. Raises ValueError for one that does not exist.
    """
    finder = argparse.ArgumentParser(prog=f"train.py {stage}", add_help=False, allow_abbrev=False)
    finder.add_argument("--preset")
    name = finder.parse_known_args(arguments)[0].preset
    if name is not None and name not in PRESETS:
        raise ValueError(f"Preset {name!r} is not known; there are {', '.join(PRESETS)}.")
    preset = PRESETS[name or SHOWN_PRESET]
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


def parse(stage: str, defaults: OptionsT, arguments: Sequence[str]) -> OptionsT:
    """The options that `arguments` ask for; tyro explains arguments that do not fit, and exits with 2."""
    return tyro.cli(
        type(defaults),
        prog=f"train.py {stage}",
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
    path = train(trainer, run)
    if path is None:
        print("Stopped; run the same command again to continue.")
        return _command.INTERRUPTED
    print(f"The trained network is {path}.")
    return 0


def _run(arguments: Sequence[str]) -> int:
    stage = arguments[0] if arguments else "--help"
    if stage in ("-h", "--help"):
        print(f"{__doc__}\nPresets: {', '.join(PRESETS)}")
        return 0
    if stage not in STAGES:
        raise ValueError(f"{stage!r} is not a stage of training; begin with one of {', '.join(STAGES)}.")
    return STAGES[stage](arguments[1:])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `train.py` with these arguments, by default the command line's; returns the exit code."""
    return _command.run(_run, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
