"""Training loop for both stages: progress, logs, sample grids, checkpoints, resuming.

A `Trainee` implements one step, which depends only on the trainee's state and the step number (all randomness is
counter-based). Running the same command again therefore resumes bit for bit from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vaebm_fast.checkpoint import CheckpointError, load_training, save_training
from vaebm_fast.config import PlainFields
from vaebm_fast.config.settings import differences, in_present_terms, names_data_by_path
from vaebm_fast.data import Loader, UnreadableDataError
from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import naming, remove_temporaries, require_writable, write
from vaebm_fast.runtime.locks import Lock
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
class RunOptions(PlainFields):
    """Output folder of a run and intervals of its outputs."""

    out: Path  # output folder; an unfinished run with the same settings there is resumed
    log_every: int = 20  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints; an interrupted run also saves
    grid_every: int = 500  # steps between sample grids
    progress: bool = True  # progress bar; if stderr is not a terminal, one line per log_every

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("log_every", "save_every", "grid_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it is a number of steps and must be at least 1.")


class Trainee(Stateful, Protocol):
    """One training stage."""

    total_steps: int
    loader: Loader
    network_file: str  # name of the exported network

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

    On SIGINT or SIGTERM, finishes the step, saves and returns None. Before the first step, raises LockedError if
    another process trains in `out`, CheckpointError if `out` contains a run with other settings or images, and OSError
    if it cannot be written to. Raises FloatingPointError if a scalar is not finite, DivergedError after exporting the
    last good network, and UnreadableDataError after saving the completed steps.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    with Lock(options.out / ".lock", options.out):
        return _train(trainee, options, draw)


def _train(trainee: Trainee, options: RunOptions, draw: DrawSamples | None) -> Path | None:
    """`train` in a folder that is locked."""
    state_file, total = options.out / STATE_FILE, trainee.total_steps
    grids = options.out / "samples"
    remove_temporaries(options.out)
    if draw is not None:
        grids.mkdir(exist_ok=True)
        remove_temporaries(grids)
    for destination in (state_file, options.out / trainee.network_file, *([grids / "step.png"] if draw else [])):
        require_writable(destination)
    start = _resume(trainee, state_file)
    scalars: Scalars = {}
    bar = Progress(start, total, shown=options.progress)
    with closing(_Log(options.out, start)) as log, closing(bar), noted() as stopped:
        for step in range(start, total):
            try:
                scalars = trainee.step(step)
            except DivergedError:
                trainee.export(options.out)
                raise
            except UnreadableDataError as error:
                names = _save_before_unreadable(trainee, state_file, step, scalars)
                raise UnreadableDataError(f"{error} {_what_to_do(names, step, options.out)}") from error
            done, last, stop = step + 1, step + 1 == total, stopped()
            bar.advance()
            if done % options.log_every == 0 or last:
                values = finite(scalars, done)
                log.write(done, values)
                bar.report(done, values)
            if draw is not None and (done % options.grid_every == 0 or last):
                _draw(draw, trainee, grids / f"step_{done:07d}.png")
            if done % options.save_every == 0 or last or stop:
                _save(trainee, state_file, done, scalars)
            if stop and not last:
                return None
    return trainee.export(options.out)


def _save(trainee: Trainee, path: Path, done: int, scalars: Scalars) -> None:
    """Write the checkpoint after `done` steps; raises FloatingPointError if the last scalars are not finite."""
    finite(scalars, done)
    save_training({"step": done, "settings": trainee.settings(), "state": trainee.state_dict()}, path)


def _save_before_unreadable(trainee: Trainee, path: Path, done: int, scalars: Scalars) -> list[str]:
    """Save the steps before images that cannot be read, then again with the names of all such images, and return them.

    The first save does not wait for the search for the others.
    """
    if done > 0:
        _save(trainee, path, done, scalars)
    known = set(trainee.loader.unreadable)
    names = trainee.loader.find_unreadable() if known else []
    if done > 0 and trainee.loader.unreadable != known:
        _save(trainee, path, done, scalars)
    return names


def _what_to_do(names: list[str], done: int, out: Path) -> str:
    """Advice after images could not be read; writes a long list of names to a file."""
    if not names:
        return "Mend that, then run the same command again to continue."
    found = ""
    if len(names) > 1:
        found = f"{len(names)} images cannot be read: {', '.join(names[:SHOWN])}"
        if len(names) > SHOWN:
            listed = out / "unreadable.txt"
            write(listed, b"".join(os.fsencode(name) + b"\n" for name in names))
            found += f" and {len(names) - SHOWN} more, listed in {listed}"
        found += ". "
    if done == 0:
        return f"{found}Replace or remove them, then run the same command again."
    return (
        f"{found}With replacements of the same names, the same command continues this run; without these images, start "
        "a new run in another output folder."
    )


def _draw(draw: DrawSamples, trainee: Trainee, path: Path) -> None:
    """Draw a grid of samples; warns if sampling fails, as it may shortly before a rollback."""
    try:
        images = trainee.sample_images()
    except UserError as error:
        warnings.warn(f"{path.name} was not drawn: {error}", stacklevel=2)
        return
    draw(images, path)


def _resume(trainee: Trainee, path: Path) -> int:
    """Load the checkpoint, if any, and return the number of completed steps.

    Reads all images once to identify them: a save, which may be the last before a kill, shall not wait for that.
    """
    if not path.exists():
        trainee.settings()
        return 0
    state, _ = load_training(path)
    saved = state["settings"]
    trainee.loader.unreadable.update(saved.get("unreadable", ()))
    settings = trainee.settings()
    if names_data_by_path(saved):
        _require_same_number(settings, in_present_terms(saved, settings), path)
    _require_same(settings, saved, path)
    if names_data_by_path(saved) and state["step"] < trainee.total_steps:
        warnings.warn(
            f"{path} is of an older version, which recorded the data by path and number of images only: make sure that "
            "the images are the same. The next checkpoint identifies them by content.",
            stacklevel=2,
        )
    trainee.load_state_dict(state["state"])
    return int(state["step"])


def _require_same_number(settings: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if an older version counted other images."""
    if saved.get("images") != settings["images"]:
        raise CheckpointError(
            f"{path} is of an older version, which found {saved.get('images')} images where this one finds "
            f"{settings['images']}. Unless images were added or removed: this one follows links, takes .jfif and .jpe, "
            "and passes over hidden and system files. Give it a folder with just the images of then, or another output "
            "folder."
        )


def _require_same(settings: Mapping[str, Any], saved: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the run at `path` has another stage or other settings."""
    if settings["stage"] != saved["stage"]:
        raise CheckpointError(
            f"{path} belongs to a run of stage {saved['stage']}, but this run is of stage {settings['stage']}; use "
            "another output folder."
        )
    saved = in_present_terms(saved, settings)
    found = differences(saved, settings)
    if "data_sha256" in found and "data_sha256" in saved:
        before, now = (f"{each['images']} (SHA-256 {each['data_sha256'][:12]}...)" for each in (saved, settings))
        raise CheckpointError(
            f"{path} belongs to a run on other images: {before} then, {now} now. Give it the same images, which may "
            "lie elsewhere, to resume it, or another output folder to start a new run."
        )
    differing = list(found.items())
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

        self._path = out / "metrics.jsonl"
        kept = [record for record in _records(self._path) if record["step"] <= start]
        write(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        self._lines = self._path.open("a", buffering=1)
        self._events = out / "tensorboard"
        self._board = SummaryWriter(str(self._events), purge_step=start + 1)

    def write(self, done: int, values: Mapping[str, float]) -> None:
        """Log the scalars after `done` steps. Raises OSError, naming the file, on a full disk."""
        with naming(self._path):
            self._lines.write(json.dumps({"step": done, **values}) + "\n")
        with naming(self._events):
            for name, value in values.items():
                self._board.add_scalar(name, value, done)

    def close(self) -> None:
        """Flush and close both."""
        with naming(self._path):
            self._lines.close()
        with naming(self._events):
            self._board.close()


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a log; skips lines that a crash truncated or corrupted."""
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
