"""Options of a sampling job, and the job that they resolve to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from vaebm_fast.config import ChainConfig, PlainFields, Potential, Preset, find_preset, require_temperature
from vaebm_fast.ops._backend import Backend
from vaebm_fast.runtime.devices import DeviceName, choose_device
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.sampling.outputs import Format, Output
from vaebm_fast.sampling.seeds import Seeds

Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions(PlainFields):
    """Sample images, one per seed, into a folder; the same command, run again, completes a partial folder.

    Uses all GPUs, one process each; under torchrun, its processes. An image depends on its seed and the settings, not
    on the number of processes; another batch size changes pixels by at most one grey level.
    """

    nvae: Path
    """NVAE checkpoint, official or ours; below temperature 1, one written by `vaebm-fast readjust`."""
    seeds: str
    """Seeds, one image each: 0-49999, or 0-99,200-299,1000."""
    out: Path
    """Output folder, for one job."""
    energy: Path | None = None
    """Energy network checkpoint, official or ours; ignored with --steps 0."""
    preset: str | None = None
    """Preset that provides defaults of steps, step size, potential and temperature."""
    steps: int | None = None
    """Langevin steps; 0 gives the NVAE's samples."""
    step_size: float | tuple[float, ...] | None = None
    """Step size h, or one per step: --steps 3 --step-size 4e-6 3e-6 2e-6."""
    potential: Potential | None = None
    """Potential of the chain; published checkpoints use official."""
    temperature: float | None = None
    """Scale of the prior's standard deviations."""
    start_temperature: float = 1.0
    """Standard deviation of the starting noise."""
    format: Format = "png"
    """Folders of 1000 PNG files, a zip of PNG files, webdataset tars of 1000, or all images as one uint8 array."""
    flat: bool = False
    """Put all PNG files of a folder or zip beside each other, as most FID tools want them, instead of 1000 a folder."""
    dtype: Dtype = "float32"
    """Type of weights and features."""
    backend: Backend = "auto"
    """Backend of the frozen networks; `vaebm-fast info` shows what auto chooses."""
    batch_size: int | None = None
    """Images per batch; by default chosen from free memory, and kept for later runs in the same folder."""
    device: DeviceName = "auto"
    """Device; auto uses GPUs if there are any."""
    processes: int | None = None
    """Processes to start; default: one per GPU, or one on a CPU."""
    energy_arch: str | None = None
    """Architecture of an official energy file, such as celeba_64 or '1-1d 1-2'; default: recognised."""
    progress: bool = True
    """Show a progress bar if stderr is a terminal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = {"format": Format, "dtype": Dtype, "backend": Backend, "device": DeviceName}
        for name, known in choices.items():
            given, names = getattr(self, name), get_args(known)
            if given not in names:
                raise UserError(f"{name} {given!r} is not known; it must be one of {', '.join(names)}.")
        if self.flat and self.format not in ("png", "zip"):
            raise UserError(f"flat is for the formats png and zip; {self.format} has no folders.")
        for name in ("batch_size", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        for name in ("temperature", "start_temperature"):
            value = getattr(self, name)
            if value is not None:
                require_temperature(name, value)

    def resolve(self) -> Job:
        """The job of these options. Raises UserError for an incomplete or invalid chain, invalid seeds or device."""
        preset = None if self.preset is None else find_preset(self.preset)
        chain = self._chain(preset)
        if chain.steps > 0 and self.energy is None:
            raise UserError("Langevin steps need an energy network: give --energy, or --steps 0 for NVAE samples.")
        return Job(
            options=self,
            seeds=Seeds.parse(self.seeds),
            chain=chain,
            energy=self.energy if chain.steps > 0 else None,
            image_shape=None if preset is None else preset.nvae.image_shape,
            device=choose_device(self.device),
        )

    def _chain(self, preset: Preset | None) -> ChainConfig:
        """The preset's chain with the given values replaced."""
        published = None if preset is None else preset.sampling
        steps = published.steps if self.steps is None and published else self.steps
        step_size = published.step_size if self.step_size is None and published else self.step_size
        if steps == 0 and step_size is None:
            step_size = ()
        if steps is None or step_size is None:
            raise UserError("The chain is incomplete: give --preset, or both --steps and --step-size.")
        return ChainConfig(
            steps,
            step_size,
            self.potential or (published.potential if published else "official"),
            self.temperature if self.temperature is not None else (published.temperature if published else 1.0),
            self.start_temperature,
        )


@dataclass(frozen=True, kw_only=True)
class Job:
    """A sampling job: options with their preset, seeds and device resolved once, before any process starts.

    energy: None for a chain of 0 steps. image_shape: (C, H, W) of the preset. device: without an index; every process
    uses its own GPU.
    """

    options: SampleOptions
    seeds: Seeds
    chain: ChainConfig
    energy: Path | None
    image_shape: tuple[int, int, int] | None
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and features."""
        dtype: torch.dtype = getattr(torch, self.options.dtype)
        return dtype

    def output(self, image_shape: tuple[int, int, int]) -> Output:
        """The output format for images (C, H, W)."""
        return Output(self.options.format, self.seeds.largest, image_shape, flat=self.options.flat)
