"""How fast are replay buffer push and gather, compared with a Python list of tensors?

The list keeps what a sampler of separate latents has in hand: for each state a tuple of tensors [L, H, W], one per
group, each a copy in host memory; random picks are stacked group by group. The ring is `ReplayRing`, in float32 and
bfloat16, on the device and, where that is a GPU, in pinned memory. Every buffer holds the same states and all take
turns. A push is timed while the buffers fill, when the list takes fresh memory, and once they are full; a gather once
they are full.

    python -m benchmarks.replay [--preset NAME] [--batch N ...] [--capacity STATES] [--results FOLDER]

The default capacity is the preset's, or less where all buffers together would take more than 60% of the free memory.
Results go to results/ as JSON and a table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import RESULTS
from benchmarks.gate import why_red
from benchmarks.measure import ceilings, default_device, summary, take_turns
from benchmarks.results_file import ResultsFile
from vaebm_fast import PRESETS
from vaebm_fast.config import NoiseLayout, Placement, ReplayBuffer
from vaebm_fast.training.replay import ReplayRing, free_memory

DTYPES = (torch.float32, torch.bfloat16)
LIST = "list"
MOST_ROUNDS = 100


class ListBuffer:
    """Up to `capacity` states as tuples of host tensors; once full, the oldest are replaced first."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._capacity, self._device, self._pushed = capacity, device, 0
        self._kept: list[tuple[Tensor, ...]] = []

    def push(self, eps_z: Sequence[Tensor]) -> None:
        """Store N states, given as [N, L, H, W] per group."""
        for groups in zip(*eps_z, strict=True):
            state = tuple(group.to("cpu", copy=True) for group in groups)
            if len(self._kept) < self._capacity:
                self._kept.append(state)
            else:
                self._kept[self._pushed % self._capacity] = state
            self._pushed += 1

    def gather(self, indices: Tensor) -> list[Tensor]:
        """The states at `indices` [N] as [N, L, H, W] per group."""
        picked = [self._kept[index] for index in indices.tolist()]
        return [torch.stack(groups).to(self._device) for groups in zip(*picked, strict=True)]


class Buffers:
    """All candidates, each with its own form of the same states to push, and what has been pushed so far."""

    def __init__(self, layout: NoiseLayout, capacity: int, most: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self._states = torch.randn(most, layout.dim, device=device)
        latents, _ = layout.split(self._states)
        self._groups = [group.contiguous() for group in latents]
        self._list = ListBuffer(capacity, device)
        self._rings = {
            f"ring, {str(dtype).removeprefix('torch.')}, {placement}": ReplayRing(
                capacity, layout.latent_dim, dtype=dtype, device=device, placement=placement
            )
            for placement in placements(device)
            for dtype in DTYPES
        }
        self._layout = layout

    def pushes(self, batch: int) -> dict[str, Callable[[], object]]:
        """A push of `batch` states into every buffer."""
        groups = [group[:batch] for group in self._groups]
        states = self._states[:batch, : self._layout.latent_dim]
        rings = {name: partial(ring.push, states) for name, ring in self._rings.items()}
        return {LIST: partial(self._list.push, groups), **rings}

    def gathers(self, batch: int) -> dict[str, Callable[[], object]]:
        """A gather of `batch` random states from every buffer, of the same ones in the same order."""
        picks = list(torch.randint(self.capacity, (MOST_ROUNDS, batch)))
        buffers: dict[str, ListBuffer | ReplayRing] = {LIST: self._list, **self._rings}

        def gather(buffer: ListBuffer | ReplayRing, mine: Any) -> object:
            return buffer.gather(next(mine))

        return {name: partial(gather, buffer, cycle(picks)) for name, buffer in buffers.items()}

    def fill(self, batch: int) -> None:
        """Push until all are full, and require that they hold the same."""
        pushes = self.pushes(batch)
        while any(len(ring) < self.capacity for ring in self._rings.values()):
            for push in pushes.values():
                push()
        indices = torch.randint(self.capacity, (batch,))
        expected = torch.cat([group.permute(0, 2, 3, 1).flatten(1) for group in self._list.gather(indices)], dim=1)
        for name, ring in self._rings.items():
            dtype = ring.state_dict()["states"].dtype
            if not torch.equal(ring.gather(indices), expected.to(dtype).float()):
                raise RuntimeError(f"{name} does not hold what the list holds.")


def placements(device: torch.device) -> tuple[Placement, ...]:
    """Where a ring of this device may lie."""
    return ("device", "host") if device.type == "cuda" else ("device",)


def default_capacity(buffer: ReplayBuffer, latent_dim: int) -> int:
    """The states that 60% of the host's free memory hold in the list and in one ring of each dtype; or the preset's."""
    state_bytes = latent_dim * (4 + sum(dtype.itemsize for dtype in DTYPES))
    return min(buffer.size, int(0.6 * free_memory(torch.device("cpu"))) // state_bytes)


def measure(buffers: Buffers, batches: Sequence[int], add: Callable[[dict[str, Any]], None]) -> None:
    """Give `add` one row per operation, batch and buffer."""

    def take(operation: str, batch: int, calls: Mapping[str, Callable[[], object]], rounds: int | None) -> None:
        for name, samples in take_turns(calls, buffers.device, rounds=rounds).items():
            add({"operation": operation, "batch": batch, "candidate": name, **summary(samples)})
        print(f"{operation}, N = {batch}: done", file=sys.stderr)

    for batch in batches:
        rounds = buffers.capacity // len(batches) // batch - 1  # one more push warms up
        take("push, filling", batch, buffers.pushes(batch), min(rounds, MOST_ROUNDS))
    buffers.fill(max(batches))
    for batch in batches:
        take("push, full", batch, buffers.pushes(batch), None)
        take("gather", batch, buffers.gathers(batch), None)


def table(content: Mapping[str, Any]) -> str:
    """The rows as a Markdown table: medians, p20 - p80 in brackets, and the list's time over each one's."""
    lines = [
        "| operation | N | buffer | time (ms) | page faults | the list takes |",
        "|---|---|---|---|---|---|",
    ]
    rows = content["results"]
    lists = {(row["operation"], row["batch"]): row["median_s"] for row in rows if row["candidate"] == LIST}
    for row in rows:
        median, p20, p80 = (1e3 * row[key] for key in ("median_s", "p20_s", "p80_s"))
        ratio = lists[row["operation"], row["batch"]] / row["median_s"]
        lines.append(
            f"| {row['operation']} | {row['batch']} | {row['candidate']} | {median:.2f} ({p20:.2f} - {p80:.2f}) "
            f"| {row['page_faults']:.0f} | {ratio:.2f}x |"
        )
    facts = {**content["what"], **content["environment"], "copy GB/s": round(content["ceilings"]["copy_gbps"], 1)}
    return "\n".join([*lines, "", ", ".join(f"{key} {value}" for key, value in facts.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure; the results are written as they come. Exits with a message if the ring's tests fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="celeba_256")
    parser.add_argument("--batch", nargs="+", type=int, default=[4, 32])
    parser.add_argument("--capacity", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    preset, device = PRESETS[options.preset], default_device()
    tests = "tests/training/test_replay_gpu.py" if device.type == "cuda" else "tests/training/test_replay.py"
    if (reason := why_red(tests)) is not None:
        raise SystemExit(f"Nothing is measured on red tests: {reason}")
    layout = preset.nvae.noise_layout
    buffer = preset.energy_training.buffer or ReplayBuffer()
    capacity = options.capacity or default_capacity(buffer, layout.latent_dim)
    fewest = 2 * len(options.batch) * max(options.batch)
    if capacity < fewest:
        raise SystemExit(f"A buffer of {capacity} states is too small to be filled by turns; {fewest} are the fewest.")
    file = ResultsFile("replay", "push and gather of a ring and of a list", ceilings(device), options.results)
    file.content["what"] = {"preset": preset.name, "capacity": capacity, "latents": layout.latent_dim}
    measure(Buffers(layout, capacity, max(options.batch), device), options.batch, file.add)
    text = table(file.content)
    file.path.with_suffix(".md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
