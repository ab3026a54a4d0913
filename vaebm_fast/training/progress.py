"""Training progress: a bar if stderr is a terminal, otherwise periodic lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

from tqdm import tqdm


class Progress:
    """Shows progress from step `start` to `total` on stderr; silent if `shown` is False."""

    def __init__(self, start: int, total: int, *, shown: bool) -> None:
        self._bar = tqdm(initial=start, total=total, disable=None if shown else True, mininterval=0.5, unit="step")
        self._has_lines = shown and self._bar.disable
        self._total, self._done, self._at = total, start, time.monotonic()

    def advance(self) -> None:
        """Count one completed step."""
        self._bar.update()

    def report(self, done: int, values: Mapping[str, float]) -> None:
        """Show the first scalars after `done` steps; a line adds the speed since the last line and the time left.

        Example: `step 40/1680: loss 33.41, 3.12 steps/s, 08:46 left`.
        """
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in list(values.items())[:3]})
        if self._has_lines and done > self._done:
            now = time.monotonic()
            speed = (done - self._done) / max(now - self._at, 1e-9)
            left = tqdm.format_interval((self._total - done) / speed)
            name, value = next(iter(values.items()))
            line = f"step {done}/{self._total}: {name} {value:.4g}, {speed:.3g} steps/s, {left} left"
            print(line, file=sys.stderr, flush=True)
            self._done, self._at = done, now

    def close(self) -> None:
        """Close the bar; it stays on screen."""
        self._bar.close()
