"""Detects divergence of energy training, rolls back to the last good state, and raises after too many rollbacks.

Contrastive training of an unbounded energy diverges in one way: the energy gap between data and negatives grows ever
faster. This automates watching that gap and restarting from the last good checkpoint.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from typing import Any

from vaebm_fast.runtime.errors import UserError
from vaebm_fast.training.state import Stateful


class DivergedError(UserError, RuntimeError):
    """Training diverged more than `max_rollbacks` times; the trainee is restored to its last good state."""


class DivergenceGuard:
    """Monitors the energy gap; keeps two snapshots, `interval` steps apart, and restores the older one.

    It restores the older one because the newer may date from after divergence began. The criterion is an exponential
    mean of |gap| over about ten steps, which tolerates single spikes; a non-finite gap always counts as divergence.
    """

    def __init__(self, trainee: Stateful, *, max_gap: float, max_rollbacks: int, interval: int = 50) -> None:
        self._trainee, self._max_gap, self._max_rollbacks, self._interval = trainee, max_gap, max_rollbacks, interval
        self._snapshots: deque[dict[str, Any]] = deque(maxlen=2)
        self._mean_gap = 0.0
        self.rollbacks = 0

    def before_step(self, step: int) -> None:
        """Take a snapshot at the first step and at every multiple of `interval`."""
        if not self._snapshots or step % self._interval == 0:
            self._snapshots.append(copy.deepcopy(self._trainee.state_dict()))

    def after_step(self, step: int, gap: float, cause: str = "") -> bool:
        """Check the step's gap; returns True if it rolled back. Raises DivergedError beyond `max_rollbacks` rollbacks.

        cause: why the gap is not finite, for the error message.
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
                f"Energy training diverged again at step {step} ({cause}) after {self._max_rollbacks} rollbacks; "
                "exported the last good network. Lower the learning rate or the step size."
            )
        return True

    def state_dict(self) -> dict[str, Any]:
        """All state that the next check depends on."""
        return {"snapshots": list(self._snapshots), "mean_gap": self._mean_gap, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        self._snapshots = deque(state["snapshots"], maxlen=2)
        self._mean_gap, self.rollbacks = state["mean_gap"], state["rollbacks"]
