"""Training loop for both stages: progress, logs, sample grids, checkpoints, resuming.

A `Trainee` implements one step, which depends only on the trainee's state and the step number (all randomness is
counter-based). Running the same command again therefore resumes bit for bit from the last checkpoint.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vaebm_fast.checkpoint import CheckpointError, load_training, save_training
from vaebm_fast.config.settings import differences, in_present_terms
from vaebm_fast.data import UnreadableDataError
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import write
from vaebm_fast.runtime.signals import noted
from vaebm_fast.training.guard import DivergedError
from vaebm_fast.training.losses import finite
from vaebm_fast.training.progress import Progress
from vaebm_fast.training.state import Stateful

Scalars = Mapping[str, Tensor | float]
DrawSamples = Callable[[Tensor, Path], None]  # uint8 [N, H, W, C], and the PNG file to write
STATE_FILE = "training.safetensors"
SHOWN = 3  # differing settings listed in an error


@dataclass(frozen=True)
class RunOptions:
    """Output folder of a run and intervals of its outputs."""

    out: Path  # output folder; an unfinished run with the same settings there is resumed
    log_every: int = 20  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints; an interrupted run also saves
    grid_every: int = 500  # steps between sample grids
    progress: bool = True  # progress bar; if stderr is not a terminal, one line per log_every

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "grid_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a number of steps and must be at least 1.")


class Trainee(Stateful, Protocol):
    """One training stage."""

    total_steps: int

    def settings(self) -> dict[str, Any]:
        """JSON values that must match the checkpoint to resume."""

    def step(self, step: int) -> Scalars:
        """Run step number `step` (from 0) and return its scalars."""

    def sample_images(self) -> Tensor:
        """A few samples from fixed noise, uint8 [N, H, W, C]."""

    def export(self, out: Path) -> Path:
        """Write the trained network into `out` and return its path."""


def train(trainee: Trainee, options: RunOptions, draw: DrawSamples | None = None) -> Path | None:
    """Train to the last step, resuming from a checkpoint if there is one; returns the exported network's path.

    draw: writes sample grids, for example `vaebm_fast.report.save_grid`; None disables them.

    On SIGINT or SIGTERM, finishes the step, saves and returns None. Raises CheckpointError if `out` contains a run with
    other settings, FloatingPointError if a scalar is not finite, DivergedError after exporting the last good network,
    and UnreadableDataError after saving the completed steps.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    state_file, total = options.out / STATE_FILE, trainee.total_steps
    saved = start = _resume(trainee, state_file)
    scalars: Scalars = {}
    bar = Progress(start, total, shown=options.progress)
    with closing(_Log(options.out, start)) as log, closing(bar), noted() as stopped:
        for step in range(start, total):
            try:
                scalars = trainee.step(step)
            except DivergedError:
                trainee.export(options.out)
                raise
            except UnreadableDataError:
                if step > saved:
                    _save(trainee, state_file, step, scalars)
                raise
            done, last, stop = step + 1, step + 1 == total, stopped()
            bar.advance()
            if done % options.log_every == 0 or last:
                values = finite(scalars, done)
                log.write(done, values)
                bar.report(done, values)
            if draw is not None and (done % options.grid_every == 0 or last):
                _draw(draw, trainee, options.out / "samples" / f"step_{done:07d}.png")
            if done % options.save_every == 0 or last or stop:
                _save(trainee, state_file, done, scalars)
                saved = done
            if stop and not last:
                return None
    return trainee.export(options.out)


def _save(trainee: Trainee, path: Path, done: int, scalars: Scalars) -> None:
    """Write the checkpoint after `done` steps; raises FloatingPointError if the last scalars are not finite."""
    finite(scalars, done)
    save_training({"step": done, "settings": trainee.settings(), "state": trainee.state_dict()}, path)


def _draw(draw: DrawSamples, trainee: Trainee, path: Path) -> None:
    """Draw a grid of samples; warns if sampling fails, as it may shortly before a rollback."""
    try:
        images = trainee.sample_images()
    except UserError as error:
        warnings.warn(f"{path.name} was not drawn: {error}", stacklevel=2)
        return
    draw(images, path)


def _resume(trainee: Trainee, path: Path) -> int:
    """Load the checkpoint, if any, and return the number of completed steps."""
    if not path.exists():
        return 0
    state, _ = load_training(path)
    _require_same(trainee.settings(), state["settings"], path)
    trainee.load_state_dict(state["state"])
    return int(state["step"])


def _require_same(settings: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the run at `path` has another stage or other settings."""
    if settings["stage"] != saved["stage"]:
        raise CheckpointError(
            f"{path} belongs to a run of stage {saved['stage']}, but this run is of stage {settings['stage']}; use "
            "another output folder."
        )
    differing = list(differences(in_present_terms(saved, settings), settings).items())
    if differing:
        changes = "; ".join(f"{name}: {before} -> {now}" for name, (before, now) in differing[:SHOWN])
        more = f"; and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({changes}{more}). Use the same settings to resume it, or "
            "another output folder to start a new run."
        )


class _Log:
    """Writes scalars as JSON lines to metrics.jsonl and as TensorBoard events."""

    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = out / "metrics.jsonl"
        kept = [record for record in _records(path) if record["step"] <= start]
        write(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._lines = path.open("a", buffering=1)
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Log the scalars after `done` steps."""
        self._lines.write(json.dumps({"step": done, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, done)

    def close(self) -> None:
        """Flush and close both."""
        self._lines.close()
        self._board.close()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a log; skips lines that a crash truncated or corrupted."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
