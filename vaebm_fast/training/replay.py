"""The replay buffer of persistent chains: a ring of flat states, with O(1) push and gather.

Owns where the states lie and how they get there and back. Which chains start from which state is the trainer's choice.
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
    """A ring of `capacity` states [D]; once full, the oldest states are overwritten first.

    device: where `gather` gives states. placement: "device" keeps them there too; "host" keeps them in pinned memory,
    for a GPU whose own is short. rank, world_size: which process of how many it belongs to; each has a ring of its own,
    and a saved one continues only as what it was. All memory is taken at once.
    Raises ValueError for a capacity below 1, for "host" without a GPU, and where the free memory is too small.
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
            raise UserError(f"capacity is {capacity}; a replay buffer keeps at least one state.")
        self.device, self._rank, self._world_size = torch.device(device), rank, world_size
        self._states = _allocate(capacity, dim, dtype, self.device, pinned=placement == "host")
        self._pushed = 0
        self._copies: torch.cuda.Event | None = None  # between the GPU and the host's rows, not known to be done

    @property
    def capacity(self) -> int:
        """The most states it keeps."""
        return self._states.shape[0]

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    @torch.no_grad()
    def push(self, states: Tensor) -> None:
        """Store states [N, D], N at most the capacity. Raises ValueError where they do not fit."""
        if states.dim() != 2 or states.shape[1] != self._states.shape[1]:
            raise ValueError(
                f"states have shape {tuple(states.shape)}; this replay buffer takes [N, {self._states.shape[1]}]."
            )
        count = states.shape[0]
        if count > self.capacity:
            raise ValueError(f"{count} states do not fit a replay buffer of {self.capacity}.")
        self._wait()
        at = self._pushed % self.capacity
        unwrapped = min(count, self.capacity - at)
        # Only from a GPU without waiting: its stream keeps the order, while the host may change its tensor at any time.
        self._states[at : at + unwrapped].copy_(states[:unwrapped], non_blocking=states.is_cuda)
        self._states[: count - unwrapped].copy_(states[unwrapped:], non_blocking=states.is_cuda)
        self._remember(states.device)
        self._pushed += count

    def clear(self) -> None:
        """Forget all states; the ring is filled from its first row again."""
        self._pushed = 0

    @torch.no_grad()
    def gather(self, indices: Tensor) -> Tensor:
        """The states at `indices` [N] as float32 [N, D], a copy of these rows alone. Indices on the host save a wait.

        Raises IndexError for one that is not within 0..len(self)-1.
        """
        rows = indices.tolist()
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"There is no state {row} in a replay buffer that holds {len(self)}.")
        self._wait()
        gathered = torch.empty(len(rows), self._states.shape[1], device=self.device)
        for n, row in enumerate(rows):
            gathered[n].copy_(self._states[row], non_blocking=True)  # pinned bfloat16 is widened on the GPU
        self._remember(self.device)
        return gathered

    def _remember(self, device: torch.device) -> None:
        """Note the copies just begun between `device` and the rows, if they are a GPU's and the host's."""
        if device.type == "cuda" and not self._states.is_cuda:
            self._copies = torch.cuda.Event()
            self._copies.record(torch.cuda.current_stream(device))

    def _wait(self) -> None:
        """Wait for the copies begun last: from here on the host, or another stream, may read and write the rows."""
        if self._copies is not None:
            self._copies.synchronize()
            self._copies = None

    def state_dict(self) -> dict[str, Any]:
        """The states kept (a view, no copy), the count pushed since it was empty, and whose ring it is."""
        self._wait()
        kept = self._states[: len(self)]
        return {"states": kept, "pushed": self._pushed, "rank": self._rank, "world_size": self._world_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s state. Raises ValueError where it does not fit this ring."""
        kept = state["states"]
        if (state["rank"], state["world_size"]) != (self._rank, self._world_size):
            raise UserError(
                f"The saved replay buffer is that of rank {state['rank']} of {state['world_size']}, this one that of "
                f"rank {self._rank} of {self._world_size}; continue with as many processes as before."
            )
        if kept.shape[0] != min(state["pushed"], self.capacity) or kept.shape[1:] != self._states.shape[1:]:
            raise UserError(
                f"The saved replay buffer holds {tuple(kept.shape)}; this one takes {tuple(self._states.shape)}."
            )
        if kept.dtype != self._states.dtype:
            raise UserError(
                f"The saved replay buffer is in {kept.dtype}, this one in {self._states.dtype}; "
                "continue with the dtype of before."
            )
        self._wait()
        self._states[: kept.shape[0]] = kept
        self._pushed = int(state["pushed"])


def _allocate(capacity: int, dim: int, dtype: torch.dtype, device: torch.device, pinned: bool) -> Tensor:
    """Zeros [capacity, dim] for a ring that serves `device`, all their memory there from the start."""
    if pinned and device.type != "cuda":
        raise UserError(
            "The replay buffer's placement is host, which is memory pinned for a GPU, but the device is "
            f"{device.type}; use placement device."
        )
    kept_on = torch.device("cpu") if pinned else device
    size = capacity * dim * dtype.itemsize
    if pinned:
        size = 1 << (size - 1).bit_length()  # torch takes pinned memory by powers of two
    free = free_memory(kept_on)
    if size > free:
        raise UserError(
            f"A replay buffer of {capacity} states [{dim}] in {dtype} takes {size / 1e9:.1f} GB of "
            f"{'pinned ' if pinned else ''}{kept_on.type} memory, of which {free / 1e9:.1f} GB are free; lower its "
            "size, keep it in bfloat16, or change its placement."
        )
    # A page of the host that was never written is not there yet: it would be missed in the middle of training.
    return torch.empty(capacity, dim, dtype=dtype, device=kept_on, pin_memory=pinned).zero_()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on `device`, before others are killed or swapped out for them."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    available = int(_fields(MEMINFO)["MemAvailable:"]) * 1024
    limit = CGROUP / "memory.max"  # a container's; absent or "max" where there is none
    if limit.exists() and (most := limit.read_text().strip()) != "max":
        used = int((CGROUP / "memory.current").read_text())
        reclaimable = int(_fields(CGROUP / "memory.stat")["inactive_file"])
        available = min(available, int(most) - used + reclaimable)
    return available


def _fields(path: Path) -> dict[str, str]:
    """The second word of each line by its first."""
    return {words[0]: words[1] for line in path.read_text().splitlines() if len(words := line.split()) > 1}
