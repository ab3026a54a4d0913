"""Detects that energy training diverges, rolls back to the last good state, and gives up after a few times.

Contrastive training of an unbounded energy fails in one way: the gap between data and negatives explodes, faster every
iteration. People watch it by eye and keep the last good file; this does the same.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any, Protocol

from vaebm_fast.runtime.errors import UserError


class Trainable(Protocol):
    """What can be rolled back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class DivergedError(UserError, RuntimeError):
    """Training diverged more often than `max_rollbacks`; the trainee has been put back to its last good state."""


class DivergenceGuard:
    """Watches the energy gap; keeps two snapshots, `interval` healthy steps apart, and restores the older one.

    The older one, because the newer may have been taken on the way up. One step may spike: what counts is the gap's
    exponential mean over about ten steps, or a gap that is not finite.
    """

    def __init__(self, trainee: Trainable, *, max_gap: float, max_rollbacks: int, interval: int = 50) -> None:
        self._trainee, self._max_gap, self._max_rollbacks, self._interval = trainee, max_gap, max_rollbacks, interval
        self._snapshots: deque[dict[str, Any]] = deque(maxlen=2)
        self._mean_gap = 0.0
        self.rollbacks = 0

    def before_step(self, step: int) -> None:
        """Take a snapshot where one is due."""
        if not self._snapshots or step % self._interval == 0:
            self._snapshots.append(copy.deepcopy(self._trainee.state_dict()))

    def after_step(self, step: int, gap: float, cause: str = "") -> bool:
        """Judge the step's gap; True when it was rolled back. Raises DivergedError after the last permitted one.

        cause: why a gap is not finite, for the error.
        """
        self._mean_gap += 0.1 * (abs(gap) - self._mean_gap) if math.isfinite(gap) else math.inf
        if self._mean_gap <= self._max_gap:
            return False
        self._trainee.load_state_dict(copy.deepcopy(self._snapshots[0]))
        while len(self._snapshots) > 1:
            self._snapshots.pop()
        self._mean_gap = 0.0
        self.rollbacks += 1
        if self.rollbacks > self._max_rollbacks:
            cause = cause.rstrip(".") or f"|energy gap| above {self._max_gap:g}"
            raise DivergedError(
                f"Energy training diverged again at step {step} ({cause}) after {self._max_rollbacks} rollbacks; the "
                "last good network is exported. Lower the learning rate or the step size."
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """Everything the next verdict depends on."""
        return {"snapshots": list(self._snapshots), "mean_gap": self._mean_gap, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self._snapshots = deque(state["snapshots"], maxlen=2)
        self._mean_gap, self.rollbacks = state["mean_gap"], state["rollbacks"]
