"""What was measured on GPUs (`measured.json`), by which backend="auto" decides on a CUDA device.

A backend of an op or of a frozen pair is used if its GPU tests passed with these kernels, and if it was faster than
plain PyTorch at every shape measured in this dtype: on this GPU model or, where it was not measured, on every other
model of the same compute capability. Otherwise plain PyTorch is used. `make gpu` measures and writes the file. A test
requires that the kernels' sources are those that were measured; the Python and C++ around them may have changed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources

import torch

PAIR = "frozen pair"


@dataclass(frozen=True)
class Measured:
    """A backend of an op, or of a `PAIR`, in one dtype on one GPU model, such as "NVIDIA H200" of capability "9.0".

    speedup: over plain PyTorch in the same run, the least of all `cases`, or 0 if it failed; at `commit` on `date`.
    sources: digest of the kernels' sources.
    """

    what: str
    backend: str
    dtype: str
    speedup: float
    cases: int
    device: str
    capability: str
    date: str
    commit: str
    sources: str


@functools.cache
def table() -> tuple[Measured, ...]:
    """All rows of `measured.json`."""
    rows = json.loads(resources.files("vaebm_fast.ops").joinpath("measured.json").read_text(encoding="utf-8"))
    return tuple(Measured(**row) for row in rows)


def rows_for(device: torch.device) -> list[Measured]:
    """The rows that hold for a CUDA device: its model's, and for what was not measured there, its capability's."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return []  # ROCm's devices are called cuda, too
    name, capability = model_of(torch.cuda.current_device() if device.index is None else device.index)
    own = {(row.what, row.backend, row.dtype): row for row in table() if row.device == name}
    others = [row for row in table() if row.capability == capability and row.device != name]
    return [*own.values(), *(row for row in others if (row.what, row.backend, row.dtype) not in own)]


@functools.cache
def model_of(index: int) -> tuple[str, str]:
    """(name, compute capability) of a GPU."""
    major, minor = torch.cuda.get_device_capability(index)
    return torch.cuda.get_device_name(index), f"{major}.{minor}"


def fastest(device: torch.device, dtype: torch.dtype, whats: Iterable[str], backends: Iterable[str]) -> str:
    """The backend of `backends` that speeds up all of `whats`, by the largest factor; "reference" if none does."""
    whats, name = tuple(whats), str(dtype).removeprefix("torch.")
    rows = [row for row in rows_for(device) if row.dtype == name and row.what in whats]
    factors = {}
    for backend in backends:
        found = [row for row in rows if row.backend == backend]
        if {row.what for row in found} == set(whats):
            factors[backend] = min(row.speedup for row in found)
    best = max(factors, key=lambda backend: factors[backend], default="reference")
    return best if factors.get(best, 0.0) > 1.0 else "reference"
