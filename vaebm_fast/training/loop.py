"""The loop around both training stages: progress, logs, sample grids, checkpoints, resuming.

A `Trainee` knows how to do one step; a step depends on the trainee's state and the step's number alone (all randomness
is counter-based), so running the same command again continues bit for bit where the last checkpoint stands.
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from vaebm_fast.checkpoint import CheckpointError, load_training, save_training
from vaebm_fast.training.guard import DivergedError
from vaebm_fast.training.pictures import save_grid

Scalars = Mapping[str, Tensor | float]
STATE_FILE = "training.safetensors"


@dataclass(frozen=True)
class RunOptions:
    """Where a run writes and how often; counts in steps."""

    out: Path
    log_every: int = 20
    save_every: int = 500
    grid_every: int = 500
    progress: bool = True  # a bar, where the output is a terminal

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "grid_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it counts steps and must be at least 1.")


class Trainee(Protocol):
    """One training stage."""

    total_steps: int

    def settings(self) -> dict[str, Any]:
        """JSON values that must not change between a checkpoint and its continuation."""

    def step(self, step: int) -> Scalars:
        """Do step number `step` (from 0) and return its scalars."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def sample_images(self) -> Tensor:
        """A few samples, uint8 [N, H, W, C], the same noise every time."""

    def export(self, out: Path) -> Path:
        """Write the trained network into `out` and return its path."""


def train(trainee: Trainee, options: RunOptions) -> Path | None:
    """Run the trainee to its last step, or continue it; returns the exported network's path.

    SIGINT and SIGTERM finish the step, save, and return None. Raises CheckpointError when `out` holds a run with other
    settings, FloatingPointError when a scalar is not finite, DivergedError after exporting the last good network.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    start = _resume(trainee, options.out / STATE_FILE)
    with _log(options.out, start) as log, _stop_signals() as stopped:
        bar = tqdm(range(start, trainee.total_steps), initial=start, total=trainee.total_steps,
                   disable=None if options.progress else True, mininterval=0.5, unit="step")  # fmt: skip
        for step in bar:
            try:
                scalars = trainee.step(step)
            except DivergedError:
                trainee.export(options.out)
                raise
            done, last = step + 1, step + 1 == trainee.total_steps
            if done % options.log_every == 0 or last:
                values = log.write(done, scalars)
                bar.set_postfix({name: f"{value:.4g}" for name, value in list(values.items())[:3]})
            if done % options.grid_every == 0 or last:
                save_grid(trainee.sample_images(), options.out / "samples" / f"step_{done:07d}.png")
            if done % options.save_every == 0 or last or stopped():
                _save(trainee, options.out / STATE_FILE, done)
            if stopped() and not last:
                return None
    return trainee.export(options.out)


def _save(trainee: Trainee, path: Path, done: int) -> None:
    save_training({"step": done, "settings": trainee.settings(), "state": trainee.state_dict()}, path)


def _resume(trainee: Trainee, path: Path) -> int:
    """Load the checkpoint, if there is one, and return the number of steps done."""
    if not path.exists():
        return 0
    saved, _ = load_training(path)
    settings = trainee.settings()
    differing = [name for name in sorted({*settings, *saved["settings"]})
                 if settings.get(name) != saved["settings"].get(name)]  # fmt: skip
    if differing:
        changes = "; ".join(f"{name}: {saved['settings'].get(name)} -> {settings.get(name)}" for name in differing)
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({changes}). Use the same settings to continue it, or "
            "another output folder to start anew."
        )
    trainee.load_state_dict(saved["state"])
    return int(saved["step"])


class _Log:
    """Scalars as JSON lines in metrics.jsonl and as TensorBoard events."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = out / "metrics.jsonl"
        kept = [record for record in _records(path) if record["step"] <= start]
        path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, done: int, scalars: Scalars) -> dict[str, float]:
        """Log the scalars after `done` steps; raises FloatingPointError naming the first that is not finite."""
        values = {name: float(value) for name, value in scalars.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} is {value} at step {done}; lower the learning rate.")
        self._lines.write(json.dumps({"step": done, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, done)
        return values

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log; lines that a crash cut short or garbled are dropped."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record


@contextmanager
def _log(out: Path, start: int) -> Iterator[_Log]:
    log = _Log(out, start)
    try:
        yield log
    finally:
        log.close()


@contextmanager
def _stop_signals() -> Iterator[Any]:
    """Yields a function that tells whether SIGINT or SIGTERM came; a second SIGINT interrupts at once."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
