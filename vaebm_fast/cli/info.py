"""`vaebm-fast info`: describe the installation or a checkpoint."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from vaebm_fast import __version__, checkpoint
from vaebm_fast.cli._options import EnergyArch, ImageSize, Switch, aligned
from vaebm_fast.ops import _backend, _measured

# optional packages; name: (module, package, purpose)
PACKAGES = {
    "TensorBoard": ("tensorboard", "tensorboard", "the logs of training"),
    "scikit-learn": ("sklearn", "scikit-learn", "the built-in digits"),
    "Matplotlib": ("matplotlib", "matplotlib", "the figures of the demo"),
    "LMDB": ("lmdb", "lmdb", "data sets in LMDB databases"),
    "CRC-32C": ("google_crc32c", "google-crc32c", "data sets in TFRecord files"),
    "DALI": ("nvidia.dali", "nvidia-dali-cuda130", "faster decoding of images"),
    "NVML": ("pynvml", "nvidia-ml-py", "GPU utilisation and joules per image while sampling"),
}


def info(
    file: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None,
    *,
    energy_arch: EnergyArch = None,
    image_size: ImageSize = None,
    as_json: Annotated[Switch, tyro.conf.arg(name="json")] = False,
) -> None:
    """Describe the installation and what each missing part needs or, given a FILE, that checkpoint.

    Args:
        file: A checkpoint to describe, published or ours.
        as_json: Print JSON instead of lines.
    """
    facts = checkpoint.describe(file, arch=energy_arch, image_size=image_size) if file else environment()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        print(_file_text(facts) if file else _environment_text(facts))


def environment() -> dict[str, Any]:
    """What is installed, what each missing part needs, and which backend `auto` picks, as JSON values."""
    missing = {
        "compiled part": _backend.why_absent("cpp"),
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
                "frozen pair": _backend.resolve("auto", torch.device(device), torch.float32).name,
                "frozen pair in bfloat16": _backend.resolve("auto", torch.device(device), torch.bfloat16).name,
                **{report.op: report.backend for report in _backend.report(torch.device(device))},
            }
            for device in ("cpu", "cuda")[: 1 + bool(gpus)]
        },
        "auto_on_cuda_by": _measurements() if gpus else None,
    }


def _measurements() -> str:
    """The measurements by which `auto` decides on the current GPU."""
    rows = _measured.rows_for(torch.device("cuda"))
    if not rows:
        name, capability = _measured.model_of(torch.cuda.current_device())
        return f"nothing: no {name} and no other GPU of compute capability {capability} was measured; `make gpu` does"
    return "; ".join(sorted({f"{row.device}, {row.date}, commit {row.commit}" for row in rows}))


def _why_no_cuda_device() -> str | None:
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; a GPU needs a CUDA build of torch"
    return f"torch {torch.__version__} finds no GPU; it needs an NVIDIA GPU and a driver for CUDA {torch.version.cuda}"


def _why_not_installed(name: str) -> str | None:
    module, package, purpose = PACKAGES[name]
    try:
        present = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing
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
    by = facts["auto_on_cuda_by"]
    decided = f"\n\nOn CUDA by these measurements: {by}." if by else ""
    return f"{aligned(rows)}\n\nWhat backend=auto picks, in float32 where no dtype is named:\n{aligned(picks)}{decided}"


def _file_text(facts: Mapping[str, Any]) -> str:
    return aligned({name.replace("_", " "): _shown(name, value) for name, value in facts.items()})


def _shown(name: str, value: Any) -> str:
    """Format a value of `describe` for people."""
    if name == "latent_shapes":
        return ", ".join(f"{len(list(same))} of {_shape(shape)}" for shape, same in groupby(value))
    if name == "image_shape":
        return _shape(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {entry}" for key, entry in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shape(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))
