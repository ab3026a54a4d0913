"""The replay buffer of persistent chains: a ring of flat states, with O(1) push and gather."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class ReplayRing:
    """A ring of `capacity` states [D]; once full, the oldest states are overwritten first."""

    def __init__(
        self, capacity: int, dim: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; a replay buffer keeps at least one state.")
        self._states = torch.zeros(capacity, dim, dtype=dtype, device=device)
        self._pushed = 0

    @property
    def capacity(self) -> int:
        """The most states it keeps."""
        return self._states.shape[0]

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def push(self, states: Tensor) -> None:
        """Store states [N, D], N at most the capacity. Raises ValueError where they do not fit."""
        if states.dim() != 2 or states.shape[1] != self._states.shape[1]:
            raise ValueError(
                f"states have shape {tuple(states.shape)}; this replay buffer takes [N, {self._states.shape[1]}]."
            )
        count = states.shape[0]
        if count > self.capacity:
            raise ValueError(f"{count} states do not fit a replay buffer of {self.capacity}.")
        at = torch.arange(self._pushed, self._pushed + count, device=self._states.device) % self.capacity
        self._states[at] = states.detach().to(self._states)
        self._pushed += count

    def gather(self, indices: Tensor) -> Tensor:
        """The states at `indices` [N], each below len(self), as float32 [N, D]."""
        return self._states[indices.to(self._states.device)].float()

    def state_dict(self) -> dict[str, Any]:
        """The states kept and the count ever pushed."""
        return {"states": self._states[: len(self)], "pushed": self._pushed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`'s state. Raises ValueError where it does not fit this ring."""
        kept = state["states"]
        if kept.shape[0] != min(state["pushed"], self.capacity) or kept.shape[1:] != self._states.shape[1:]:
            raise ValueError(
                f"The saved replay buffer holds {tuple(kept.shape)}; this one takes {tuple(self._states.shape)}."
            )
        self._states[: kept.shape[0]] = kept
        self._pushed = int(state["pushed"])
