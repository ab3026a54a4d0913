"""Options of a sampling job, and its seeds."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from vaebm_fast.config import ChainConfig, Potential, find_preset, require_temperature
from vaebm_fast.ops._backend import Backend
from vaebm_fast.runtime.devices import DeviceName
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.sampling.outputs import Format

MOST_SEEDS = 100_000_000  # per job: the list of its blocks is in memory


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Sample images, one per seed, into a folder; rerun the same command to complete an interrupted job.

    Uses all GPUs, one process each; under torchrun, the processes that it starts. An image depends on its seed and the
    settings, not on the number of processes. The batch size changes it by at most one grey level.
    """

    nvae: Path
    """The NVAE, published or ours; below temperature 1 use the one that `vaebm-fast readjust` writes."""
    seeds: str
    """Seeds, one image each: such as 0-49999 or 0-99,200-299,1000."""
    out: Path
    """The output folder; one folder per job."""
    energy: Path | None = None
    """The energy network, published or ours; ignored with --steps 0."""
    preset: str | None = None
    """Preset that supplies steps, step size, potential and temperature where these are not given."""
    steps: int | None = None
    """Langevin steps per chain; 0 gives NVAE samples."""
    step_size: float | tuple[float, ...] | None = None
    """Step size h, or one per step, such as --steps 3 --step-size 4e-6 3e-6 2e-6."""
    potential: Potential | None = None
    """Potential of the chain; published checkpoints use official."""
    temperature: float | None = None
    """Temperature: scales the prior's standard deviations."""
    start_temperature: float = 1.0
    """Standard deviation of the initial noise."""
    format: Format = "png"
    """Folders of 1000 PNG files, a zip of PNG files, webdataset tars of 1000, or all images as one uint8 array."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Data type of weights and features."""
    backend: Backend = "auto"
    """Backend of the frozen networks; auto is cpp on a CPU with the compiled part, else reference."""
    batch_size: int | None = None
    """Images per batch; by default chosen from free memory, and reused by later runs in the same folder."""
    device: DeviceName = "auto"
    """Device; auto uses the GPUs if there are any."""
    processes: int | None = None
    """Number of processes; by default one per GPU, or one on a CPU."""
    energy_arch: str | None = None
    """The energy network of a published file, such as celeba_64 or '1-1d 1-2'; by default detected."""
    progress: bool = True
    """Show a progress bar if the output is a terminal."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1.")
        for name in ("temperature", "start_temperature"):
            value = getattr(self, name)
            if value is not None:
                require_temperature(name, value)

    def chain(self) -> ChainConfig:
        """The preset's chain, overridden by the options that are given.

        Raises ValueError if steps or step size is unknown or invalid, or if steps > 0 without an energy network.
        """
        published = None if self.preset is None else find_preset(self.preset).sampling
        steps = published.steps if self.steps is None and published else self.steps
        step_size = published.step_size if self.step_size is None and published else self.step_size
        if steps == 0 and step_size is None:
            step_size = ()
        if steps is None or step_size is None:
            raise UserError("The chain is not known: give --preset, or both --steps and --step-size.")
        if steps > 0 and self.energy is None:
            raise UserError("Langevin steps need an energy network: give --energy, or --steps 0 for NVAE samples.")
        return ChainConfig(
            steps,
            step_size,
            self.potential or (published.potential if published else "official"),
            self.temperature if self.temperature is not None else (published.temperature if published else 1.0),
            self.start_temperature,
        )


class Seeds:
    """Distinct ascending seeds, stored as ranges; a job distributes blocks of them to its processes."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = tuple(ranges)
        self._ends = list(accumulate(map(len, self.ranges)))

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """Parse text such as `0-99,200-299,1000`. Raises ValueError for other forms, repeated seeds and too many."""
        ranges = []
        for word in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word, re.ASCII)
            if match is None:
                raise UserError(f"Seeds {word.strip()!r} are not of the form FIRST-LAST or SEED, such as 0-49999.")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last >= 2**64:
                raise UserError(
                    f"Seeds {word.strip()!r} are not an ascending range within 0 to 2^64-1; give FIRST-LAST."
                )
            if last - first >= 2**40:
                raise UserError(f"Seeds {word.strip()!r} are more images than any disk holds; give fewer.")
            ranges.append(range(first, last + 1))
        seeds = cls(_joined(sorted(ranges, key=lambda seeds: seeds.start)))
        if len(seeds) > MOST_SEEDS:
            raise UserError(
                f"{len(seeds):,} seeds are too many for one folder; give at most {MOST_SEEDS:,} per folder."
            )
        return seeds

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __str__(self) -> str:
        return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in self.ranges)

    @property
    def largest(self) -> int:
        """The largest seed."""
        return self.ranges[-1][-1]

    def between(self, first: int, stop: int) -> list[int]:
        """The seeds at positions first, ..., stop - 1; positions past the end are dropped."""
        at = bisect_right(self._ends, first)
        found: list[int] = []
        for seeds, end in zip(self.ranges[at:], self._ends[at:], strict=True):
            if end - len(seeds) >= stop:
                break
            skipped = end - len(seeds)
            found += seeds[max(0, first - skipped) : stop - skipped]
        return found

    def total_blocks(self, batch_size: int) -> int:
        """Number of blocks."""
        return -(-len(self) // batch_size)

    def block(self, index: int, batch_size: int) -> list[int]:
        """Block `index` of `batch_size` seeds; the last may have fewer."""
        return self.between(index * batch_size, (index + 1) * batch_size)

    def without(self, left_out: Collection[int]) -> str:
        """All seeds except `left_out`, in the syntax of `parse`; empty if none is left."""
        kept = []
        for seeds in self.ranges:
            start = seeds.start
            for seed in sorted(seed for seed in left_out if seed in seeds):
                kept.append(range(start, seed))
                start = seed + 1
            kept.append(range(start, seeds.stop))
        return str(Seeds([seeds for seeds in kept if seeds]))


def _joined(ranges: Sequence[range]) -> list[range]:
    """Merge adjacent ascending ranges, so that equal sets of seeds have one spelling."""
    joined: list[range] = []
    for seeds in ranges:
        if joined and seeds.start < joined[-1].stop:
            raise UserError(f"Seed {seeds.start} is given twice; give each seed once.")
        if joined and seeds.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, seeds.stop)
        else:
            joined.append(seeds)
    return joined
