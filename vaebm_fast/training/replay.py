"""Replay buffer of persistent chains: a ring of flat states with O(1) push and gather.

Owns storage of states and transfers between host and GPU. The trainer chooses which chains start from which states.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vaebm_fast.config import Placement
from vaebm_fast.runtime.errors import UserError

MEMINFO, CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


class ReplayRing:
    """Ring buffer of `capacity` states [D]; once full, it overwrites the oldest states.

    device: device of the states that `gather` returns. placement: "device" stores states there; "host" stores them in
    pinned memory, for when GPU memory is short. rank, world_size: each process has its own ring, and a saved ring loads
    only with the same rank and world size. All memory is allocated at construction.
    Raises ValueError for a capacity below 1, for "host" without a GPU, and if free memory is insufficient.
    """

    def __init__(
        self,
        capacity: int,
        dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        placement: Placement = "device",
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if capacity < 1:
            raise UserError(f"capacity is {capacity}; it must be at least 1.")
        self.device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._states = _allocate(capacity, dim, dtype, self.device, pinned=placement == "host")
        self._pushed = 0
        self._copies: torch.cuda.Event | None = None  # pending copies between the GPU and host rows

    @property
    def capacity(self) -> int:
        """Maximum number of states."""
        return self._states.shape[0]

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    @torch.no_grad()
    def push(self, states: Tensor) -> None:
        """Store states [N, D], N <= capacity. Raises ValueError for other shapes."""
        if states.dim() != 2 or states.shape[1] != self._states.shape[1]:
            raise ValueError(
                f"states have shape {tuple(states.shape)}; this replay buffer takes [N, {self._states.shape[1]}]."
            )
        count = states.shape[0]
        if count > self.capacity:
            raise ValueError(f"{count} states exceed the replay buffer's capacity of {self.capacity}.")
        self._wait()
        at = self._pushed % self.capacity
        unwrapped = min(count, self.capacity - at)
        # Asynchronous only from a GPU, whose stream keeps the order; the caller may modify a host tensor at any time.
        self._states[at : at + unwrapped].copy_(states[:unwrapped], non_blocking=states.is_cuda)
        self._states[: count - unwrapped].copy_(states[unwrapped:], non_blocking=states.is_cuda)
        self._remember(states.device)
        self._pushed += count

    def clear(self) -> None:
        """Drop all states; the next push starts at the first row."""
        self._pushed = 0

    @torch.no_grad()
    def gather(self, indices: Tensor) -> Tensor:
        """Copy the states at `indices` [N] to float32 [N, D]. Host indices avoid a synchronisation.

        Raises IndexError for an index outside 0..len(self)-1.
        """
        rows = indices.tolist()
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"Index {row} is out of range for a replay buffer with {len(self)} states.")
        self._wait()
        gathered = torch.empty(len(rows), self._states.shape[1], dtype=torch.float32, device=self.device)
        for n, row in enumerate(rows):
            gathered[n].copy_(self._states[row], non_blocking=True)  # bfloat16 rows are converted on the GPU
        self._remember(self.device)
        return gathered

    def _remember(self, device: torch.device) -> None:
        """Record an event for the copies just issued if `device` is a GPU and the rows are on the host."""
        if device.type == "cuda" and not self._states.is_cuda:
            self._copies = torch.cuda.Event()
            self._copies.record(torch.cuda.current_stream(device))

    def _wait(self) -> None:
        """Wait for pending copies, so that the host or another stream may access the rows."""
        if self._copies is not None:
            self._copies.synchronize()
            self._copies = None

    def state_dict(self) -> dict[str, Any]:
        """Stored states (a view), the number pushed since the ring was empty, rank and world size."""
        self._wait()
        kept = self._states[: len(self)]
        return {"states": kept, "pushed": self._pushed, "rank": self._rank, "world_size": self._world_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s state. Raises ValueError if it does not match this ring."""
        kept = state["states"]
        if (state["rank"], state["world_size"]) != (self._rank, self._world_size):
            raise UserError(
                f"The saved replay buffer belongs to rank {state['rank']} of {state['world_size']}, but this is "
                f"rank {self._rank} of {self._world_size}; resume with the same number of processes."
            )
        if kept.shape[0] != min(state["pushed"], self.capacity) or kept.shape[1:] != self._states.shape[1:]:
            raise UserError(
                f"The saved replay buffer has shape {tuple(kept.shape)}; this one has {tuple(self._states.shape)}."
            )
        if kept.dtype != self._states.dtype:
            raise UserError(
                f"The saved replay buffer is {kept.dtype}, this one is {self._states.dtype}; "
                "resume with the same dtype."
            )
        self._wait()
        self._states[: kept.shape[0]] = kept
        self._pushed = int(state["pushed"])


def _allocate(capacity: int, dim: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    """Zeros [capacity, dim] for a ring used by `device`, with all memory committed."""
    if pinned and device.type != "cuda":
        raise UserError(
            "The replay buffer's placement is host, which needs a GPU for pinned memory, but the device is "
            f"{device.type}; use placement device."
        )
    kept_on = torch.device("cpu") if pinned else device
    size = capacity * dim * dtype.itemsize
    if pinned:
        size = 1 << (size - 1).bit_length()  # torch rounds pinned allocations up to powers of two
    free = free_memory(kept_on)
    if size > free:
        raise UserError(
            f"A replay buffer of {capacity} states [{dim}] in {dtype} needs {size / 1e9:.1f} GB of "
            f"{'pinned ' if pinned else ''}{kept_on.type} memory, of which {free / 1e9:.1f} GB are free; lower its "
            "size, use dtype bfloat16, or change its placement."
        )
    # zero_() commits all host pages now, so that training cannot run out of memory later.
    return torch.empty(capacity, dim, dtype=dtype, device=kept_on, pin_memory=pinned).zero_()


def free_memory(device: torch.device) -> int:
    """Bytes available on `device` without swapping or killing other processes."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = int(_fields(MEMINFO)["MemAvailable:"]) * 1024
    limit = CGROUP / "memory.max"  # container limit; absent or "max" if unlimited
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        used = int((CGROUP / "memory.current").read_text())
        reclaimable = int(_fields(CGROUP / "memory.stat")["inactive_file"])
        available = min(available, int(most) - used + reclaimable)
    return available


def _fields(path: Path) -> dict[str, str]:
    """{first word: second word} of each line."""
    return {words[0]: words[1] for line in path.read_text().splitlines() if len(words := line.split()) > 1}
