"""What a sampling job is asked for, and the seeds it is asked for."""

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

MOST_SEEDS = 100_000_000  # of a job, which keeps a list of its blocks


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Sample images, one per seed, into a folder; the same command, run again, completes what is missing there.

    All GPUs are used, one process each; under torchrun, the processes it starts. An image depends on its seed and the
    settings: not on the number of processes, and on the batch size within one grey level.
    """

    nvae: Path
    """The NVAE, published or ours; below temperature 1 the readjusted one that `vaebm-fast readjust` writes."""
    seeds: str
    """Such as 0-49999, or 0-99,200-299,1000: one image each."""
    out: Path
    """The folder to write to; it holds one job."""
    energy: Path | None = None
    """The energy network, published or ours; not needed, nor read, with --steps 0."""
    preset: str | None = None
    """Whose steps, step size, potential and temperature are used where they are not given."""
    steps: int | None = None
    """Steps of a chain; 0 gives the NVAE's own samples."""
    step_size: float | tuple[float, ...] | None = None
    """Step size h; or one for each step, such as --steps 3 --step-size 4e-6 3e-6 2e-6."""
    potential: Potential | None = None
    """What the chain descends; published checkpoints use official."""
    temperature: float | None = None
    """Of the prior's standard deviations."""
    start_temperature: float = 1.0
    """Standard deviation of the noise that chains start from."""
    format: Format = "png"
    """Folders of 1000 PNG files, a zip of PNG files, webdataset tars of 1000, or all images as one uint8 array."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and features."""
    backend: Backend = "auto"
    """What the frozen networks run on; auto is cpp with the compiled part on a CPU, else reference."""
    batch_size: int | None = None
    """Images at a time; by default found from the memory, and kept for later runs in the same folder."""
    device: DeviceName = "auto"
    """Where to compute; auto is the GPUs where there are any."""
    processes: int | None = None
    """Processes to start; by default one per GPU, or one on a CPU."""
    energy_arch: str | None = None
    """The energy network of a published file, such as celeba_64 or '1-1d 1-2'; by default recognised."""
    progress: bool = True
    """Show a progress bar, where the output is a terminal."""

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
        """The preset's chain with what is given in its place.

        Raises ValueError where neither says enough, for steps that make no chain, and for some without an energy.
        """
        published = None if self.preset is None else find_preset(self.preset).sampling
        steps = published.steps if self.steps is None and published else self.steps
        step_size = published.step_size if self.step_size is None and published else self.step_size
        if steps == 0 and step_size is None:
            step_size = ()
        if steps is None or step_size is None:
            raise UserError("The chain is not known: name a preset, or give both the steps and the step size.")
        if steps > 0 and self.energy is None:
            raise UserError("A chain's steps need an energy network: give --energy, or --steps 0 for the NVAE's own.")
        return ChainConfig(
            steps,
            step_size,
            self.potential or (published.potential if published else "official"),
            self.temperature if self.temperature is not None else (published.temperature if published else 1.0),
            self.start_temperature,
        )


class Seeds:
    """Distinct seeds in ascending order, kept as ranges; blocks of them are what a job deals to its processes."""

    def __init__(self, ranges: Sequence[range]) -> None:
        self.ranges = tuple(ranges)
        self._ends = list(accumulate(map(len, self.ranges)))

    @classmethod
    def parse(cls, text: str) -> Seeds:
        """From such as `0-99,200-299,1000`. Raises ValueError for anything else, repeated seeds and too many."""
        ranges = []
        for word in text.split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", word, re.ASCII)
            if match is None:
                raise UserError(f"Seeds {word.strip()!r} are not of the form FIRST-LAST or SEED, such as 0-49999.")
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first or last >= 2**64:
                raise UserError(f"Seeds {word.strip()!r} do not run upwards within 0 to 2^64-1; give FIRST-LAST so.")
            if last - first >= 2**40:
                raise UserError(f"Seeds {word.strip()!r} are more images than any disk holds; give fewer.")
            ranges.append(range(first, last + 1))
        seeds = cls(_joined(sorted(ranges, key=lambda seeds: seeds.start)))
        if len(seeds) > MOST_SEEDS:
            raise UserError(f"{len(seeds):,} seeds are too many for one folder; give at most {MOST_SEEDS:,} to each.")
        return seeds

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __str__(self) -> str:
        return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in self.ranges)

    @property
    def largest(self) -> int:
        """The last seed."""
        return self.ranges[-1][-1]

    def between(self, first: int, stop: int) -> list[int]:
        """The seeds at positions first, ..., stop - 1 of all; those beyond the last are left out."""
        at = bisect_right(self._ends, first)
        found: list[int] = []
        for seeds, end in zip(self.ranges[at:], self._ends[at:], strict=True):
            if end - len(seeds) >= stop:
                break
            skipped = end - len(seeds)
            found += seeds[max(0, first - skipped) : stop - skipped]
        return found

    def total_blocks(self, batch_size: int) -> int:
        """How many blocks the seeds make."""
        return -(-len(self) // batch_size)

    def block(self, index: int, batch_size: int) -> list[int]:
        """Block `index` of `batch_size` seeds; the last may have fewer."""
        return self.between(index * batch_size, (index + 1) * batch_size)

    def without(self, left_out: Collection[int]) -> str:
        """The seeds but these, as `parse` reads them; an empty text where none is left."""
        kept = []
        for seeds in self.ranges:
            start = seeds.start
            for seed in sorted(seed for seed in left_out if seed in seeds):
                kept.append(range(start, seed))
                start = seed + 1
            kept.append(range(start, seeds.stop))
        return str(Seeds([seeds for seeds in kept if seeds]))


def _joined(ranges: Sequence[range]) -> list[range]:
    """Ascending ranges, those that touch made one, so that equal seeds have one spelling."""
    joined: list[range] = []
    for seeds in ranges:
        if joined and seeds.start < joined[-1].stop:
            raise UserError(f"Seed {seeds.start} is given twice; an image is made once.")
        if joined and seeds.start == joined[-1].stop:
            joined[-1] = range(joined[-1].start, seeds.stop)
        else:
            joined.append(seeds)
    return joined
