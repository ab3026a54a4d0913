"""`vaebm-fast`: sampling, what is installed, what a checkpoint holds, conversion, likelihoods, costs, the demo.

Thin: options in, a call of the library, lines out. Training has a command of its own, `train.py`.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from vaebm_fast import __version__, _command, checkpoint
from vaebm_fast import cost as counting
from vaebm_fast.data import open_source
from vaebm_fast.evaluation.likelihood import evaluate_likelihood
from vaebm_fast.frozen import choose_backend
from vaebm_fast.ops import _backend
from vaebm_fast.sampling import SampleOptions, run_job
from vaebm_fast.training.readjust import load_readjusted_nvae, readjusted_path

Switch = tyro.conf.FlagCreatePairsOff[bool]
EnergyArch = Annotated[
    str | None,
    tyro.conf.arg(
        metavar="NAME|BLOCKS",
        help="The energy network of a published file: a name such as celeba64, or blocks such as '1-1d 1-2'. "
        "Without it the network is recognised from the weights.",
    ),
]
ImageSize = Annotated[
    int | None, tyro.conf.arg(metavar="N", help="Side in pixels of the images that a published energy network takes.")
]

# name: (module, package, who needs it) of what a part of the project uses
PACKAGES = {
    "TensorBoard": ("tensorboard", "tensorboard", "the logs of training"),
    "scikit-learn": ("sklearn", "scikit-learn", "the built-in digits"),
    "Matplotlib": ("matplotlib", "matplotlib", "the figures of the demo"),
    "NVML": ("pynvml", "nvidia-ml-py", "the use of GPUs and joules per image while sampling"),
}


def info(
    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None,
    *,
    energy_arch: EnergyArch = None,
    image_size: ImageSize = None,
    as_json: Annotated[Switch, tyro.conf.arg(name="json")] = False,
) -> None:
    """Say what is installed and what each missing piece would need or, given a FILE, what that checkpoint holds.

    Args:
        file: A checkpoint to describe, published or ours.
        as_json: Print JSON instead of lines.
    """
    facts = checkpoint.describe(file, arch=energy_arch, image_size=image_size) if file else environment()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(_file_text(facts) if file else _environment_text(facts))


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    destination: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DESTINATION")],
    *,
    energy_arch: EnergyArch = None,
    image_size: ImageSize = None,
    overwrite: Switch = False,
) -> None:
    """Write the network in SOURCE to DESTINATION in this project's own format.

    Args:
        source: The file to read, published or ours.
        destination: The file to write, usually named .safetensors.
        overwrite: Replace DESTINATION where it exists.
    """
    checkpoint.convert(source, destination, arch=energy_arch, image_size=image_size, overwrite=overwrite)
    print(f"Wrote {destination}.")


def sample(options: Annotated[SampleOptions, tyro.conf.arg(name="")]) -> int:
    """Sample images, one per seed, into a folder; the same command, run again, completes what is missing there."""
    return run_job(options)


def demo(*, out: Path = Path("runs/demo"), train_seeds: int = 1, progress: bool = True) -> None:
    """Train a small VAEBM on handwritten digits on the CPU, sample it, and judge what the energy network improved.

    Args:
        out: Folder for everything; an earlier demo in it is replaced.
        train_seeds: How often training is repeated, each time with another seed.
        progress: Show progress bars.
    """
    from vaebm_fast.demo import run_demo  # here, because the other commands work without Matplotlib

    run_demo(out, train_seeds=train_seeds, progress=progress)


def likelihood(
    nvae: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NVAE", help="An NVAE, published or ours.")],
    *,
    data: Annotated[str, tyro.conf.arg(metavar="FOLDER", help="Images, idx files, or `digits`, which are built in.")],
    split: Literal["train", "held_out"] = "held_out",
    importance_samples: int = 1,
    batch_size: int = 64,
) -> None:
    """Print an NVAE's negative ELBO and its importance-weighted bound on a data set, in bits per dimension.

    Args:
        split: Which part of the data.
        importance_samples: Samples of the posterior per image; more make the bound tighter.
        batch_size: Images at a time; it changes nothing but speed.
    """
    vae = checkpoint.load_nvae(nvae)
    channels, size, _ = vae.image_shape
    source = open_source(data, image_size=size, image_channels=channels, split=split)
    facts = evaluate_likelihood(vae, source, importance_samples=importance_samples, batch_size=batch_size)
    print(_aligned({name.replace("_", " "): value for name, value in asdict(facts).items()}))


def readjust(
    nvae: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="NVAE", help="An NVAE, published or ours.")],
    *,
    temperature: float,
    batches: int = 500,
) -> None:
    """Readjust an NVAE's batch normalisation to a sampling temperature below 1; the result is kept beside the file.

    Args:
        temperature: Of the prior's standard deviations.
        batches: Batches that the running statistics are made from.
    """
    load_readjusted_nvae(nvae, temperature, batches=batches)
    print(f"Readjusted to temperature {temperature:g}: {readjusted_path(nvae, temperature)}.")


def cost(*, preset: str) -> None:
    """Count what a chain step of a preset takes: FLOPs, memory traffic, and the least time of these on two GPUs.

    Args:
        preset: Name of the preset, such as celeba_256.
    """
    print(counting.text(counting.cost(preset)))


def environment() -> dict[str, Any]:
    """What is installed, what each missing part needs, and which backend `auto` picks, as JSON values."""
    missing = {
        "compiled part": _backend.why_absent("cpu"),
        "CUDA kernels": _backend.why_absent("cuda"),
        "CUDA device": _why_no_cuda_device(),
        "Triton": _backend.why_absent("triton"),
        **{name: _why_not_installed(name) for name in PACKAGES},
    }
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "vaebm_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "devices": ["cpu", *(f"cuda:{index} ({name})" for index, name in enumerate(gpus))],
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "parts": {name: {"present": reason is None, "needs": reason} for name, reason in missing.items()},
        "auto": {
            device: {
                "frozen pair": choose_backend("auto", torch.device(device), torch.float32),
                **{report.op: report.backend for report in _backend.report(torch.device(device))},
            }
            for device in ("cpu", "cuda")[: 1 + bool(gpus)]
        },
    }


def _why_no_cuda_device() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; a GPU needs a CUDA build of torch"
    return f"torch {torch.__version__} finds no GPU; it needs one by NVIDIA with a driver for CUDA {torch.version.cuda}"


def _why_not_installed(name: str) -> str | None:
    module, package, purpose = PACKAGES[name]
    try:
        present = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package above it is there
        present = False
    return None if present else f"{name}, for {purpose}, is not installed; `pip install {package}` installs it"


def _environment_text(facts: Mapping[str, Any]) -> str:
    rows = {
        "vaebm-fast": facts["vaebm_fast"],
        "python": facts["python"],
        "torch": facts["torch"],
        "devices": ", ".join(facts["devices"]),
        "threads": facts["threads"],
        "CPU capability": facts["cpu_capability"],
    }
    for name, part in facts["parts"].items():
        rows[name] = "there" if part["present"] else f"missing: {part['needs']}."
    picks = {f"{op} on {device}": name for device, picked in facts["auto"].items() for op, name in picked.items()}
    return f"{_aligned(rows)}\n\nWhat backend=auto picks:\n{_aligned(picks)}"


def _file_text(facts: Mapping[str, Any]) -> str:
    return _aligned({name.replace("_", " "): _shown(name, value) for name, value in facts.items()})


def _shown(name: str, value: Any) -> str:
    """A value of `describe` as a person would write it."""
    if name == "latent_shapes":
        return ", ".join(f"{len(list(same))} of {_shape(shape)}" for shape, same in groupby(value))
    if name == "image_shape":
        return _shape(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def _aligned(rows: Mapping[str, Any]) -> str:
    """One line per row, the values in one column."""
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _run(arguments: Sequence[str]) -> int:
    if list(arguments) == ["--version"]:
        print(f"vaebm-fast {__version__}")
        return 0
    code: int | None = tyro.extras.subcommand_cli_from_dict(
        {
            "sample": sample,
            "info": info,
            "convert": convert,
            "likelihood": likelihood,
            "readjust": readjust,
            "cost": cost,
            "demo": demo,
        },
        prog="vaebm-fast",
        description="Train, sample and evaluate VAEBM models fast. `vaebm-fast --version` prints the version.",
        args=arguments or ["--help"],
    )
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `vaebm-fast` with these arguments, by default the command line's; returns the exit code."""
    return _command.run(_run, sys.argv[1:] if arguments is None else arguments)
