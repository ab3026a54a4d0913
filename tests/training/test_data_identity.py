"""A run knows its images by content: it goes on wherever they lie, and on no others. One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.helpers.file_systems import files_of_at_most, refuse
from tests.helpers.trainers import QUIET, SOURCE, vae_trainer
from vaebm_fast.checkpoint import CheckpointError, load_training, save_training
from vaebm_fast.data import UnreadableDataError, open_source
from vaebm_fast.data.containers import ImageFolder
from vaebm_fast.data.containers.folder import FolderListing
from vaebm_fast.data.sources import StoredImages
from vaebm_fast.report import save_grid
from vaebm_fast.runtime.locks import Lock, LockedError
from vaebm_fast.training import RunOptions, VAETrainer, train
from vaebm_fast.training.loop import STATE_FILE

TOTAL = 384  # three batches of 128


class Stopped(Exception):
    """A crash."""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The first digits as PNG files."""
    root = tmp_path / "images"
    root.mkdir()
    for index, image in enumerate(SOURCE.images[:TOTAL]):
        Image.fromarray(image[..., 0]).save(root / f"{index:03d}.png")
    return root


def trainer_on(folder: Path | str) -> VAETrainer:
    return vae_trainer(open_source(folder, image_size=8, image_channels=1))


def options(out: Path, **changes: Any) -> RunOptions:
    return RunOptions(out, **{**QUIET, "save_every": 1, **changes})


def run(folder: Path | str, out: Path, stop_at: int | None = None, **changes: Any) -> bytes:
    """Train on the images of a folder, to the end or until a crash before a step; the network, if there is one."""
    trainer = trainer_on(folder)
    step = trainer.step

    def stepping(number: int) -> Any:
        if number == stop_at:
            raise Stopped
        return step(number)

    trainer.step = stepping  # type: ignore[method-assign]
    try:
        network = train(trainer, options(out, **changes))
    except Stopped:
        return b""
    finally:
        trainer.loader.close()
    assert network is not None
    return network.read_bytes()


def test_a_run_goes_on_with_the_same_images_wherever_they_lie(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(images, tmp_path / "whole")
    run(images, tmp_path / "out", stop_at=1)
    monkeypatch.chdir(tmp_path)
    run("images/../images", tmp_path / "out", stop_at=2)
    moved = images.rename(tmp_path / "moved")
    assert run(moved, tmp_path / "out") == whole


def exchange(images: Path) -> None:
    first, second = (images / f"{index:03d}.png" for index in (0, 1))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


CHANGES: dict[str, Callable[[Path], object]] = {
    "other pixels": lambda images: Image.fromarray(255 - SOURCE.images[7, ..., 0]).save(images / "007.png"),
    "exchanged": exchange,
    "fewer": lambda images: (images / "007.png").unlink(),
    "renamed": lambda images: (images / "007.png").rename(images / "999.png"),
    "more": lambda images: shutil.copy(images / "007.png", images / "7.png"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_images_at_the_same_path_are_refused_and_nothing_changes(
    change: str, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(images, out, stop_at=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    CHANGES[change](images)
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE} belongs to a run on other images: 384 \(SHA-256 \w+\.\."):
        run(images, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def as_before(out: Path, data: str) -> None:
    """Turn a checkpoint into one of the version that named the data by path and number of images."""
    state, info = load_training(out / STATE_FILE)
    for name in ("images", "data_sha256"):
        del state["settings"][name]
    state["settings"]["data"] = data
    save_training(state, out / STATE_FILE, info)


def test_checkpoints_of_before_go_on_and_are_identified_from_then_on(images: Path, tmp_path: Path) -> None:
    whole, out = run(images, tmp_path / "whole"), tmp_path / "out"
    run(images, out, stop_at=1)
    as_before(out, f"/gone, and moved/images, {TOTAL} images")
    with pytest.warns(UserWarning, match="which recorded the data by path and number of images only"):
        run(images, out, stop_at=2)
    assert load_training(out / STATE_FILE)[0]["settings"]["images"] == TOTAL
    assert run(images, out) == whole
    run(images, tmp_path / "other", stop_at=1)
    as_before(tmp_path / "other", f"{images}, {TOTAL - 1} images")
    with pytest.raises(CheckpointError, match="which found 383 images where this one finds 384. Unless"):
        run(images, tmp_path / "other")


# Unreadable images: what the error advises works.
def cut(path: Path) -> bytes:
    """Truncate a file; returns what it was."""
    content = path.read_bytes()
    path.write_bytes(content[:60])
    return content


@pytest.mark.parametrize("save_every", [1, 100])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_replaced_image_continues_the_run(step: int, save_every: int, images: Path, tmp_path: Path) -> None:
    whole = run(images, tmp_path / "whole")
    broken = images / f"{int(trainer_on(images).loader.plan.batch(step).order[5]):03d}.png"
    content, out = cut(broken), tmp_path / "out"
    advice = (
        "With replacements of the same names" if step else "Replace or remove them, then run the same command again"
    )
    for _ in range(2):  # again without mending it: nothing is lost
        with pytest.raises(UnreadableDataError, match=rf"{broken} cannot be read as an image \(.*\)\. {advice}"):
            run(images, out, save_every=save_every)
        if step:
            assert load_training(out / STATE_FILE)[0]["step"] == step
    broken.write_bytes(content)
    assert run(images, out) == whole


def test_all_unreadable_images_are_named_at_once_and_may_be_replaced_at_once(images: Path, tmp_path: Path) -> None:
    loader = trainer_on(images).loader
    broken = sorted({f"{int(loader.plan.batch(step).order[at]):03d}.png" for step in (1, 2) for at in range(3)})
    for name in broken:
        cut(images / name)
    out = tmp_path / "out"
    with pytest.raises(
        UnreadableDataError, match=rf"6 images cannot be read: {', '.join(broken[:3])} and 3 more, listed"
    ):
        run(images, out, save_every=100)
    assert load_training(out / STATE_FILE)[0]["settings"]["unreadable"] == broken
    assert (out / "unreadable.txt").read_text().splitlines() == broken
    Image.new("L", (8, 8), 3).save(images / broken[0])
    with pytest.raises(UnreadableDataError, match="5 images cannot be read"):  # now
        run(images, out)
    for name in broken:
        Image.new("L", (8, 8), 3).save(images / name)
    assert run(images, out)


def test_a_disk_that_went_away_frees_no_image_from_its_identity(images: Path, tmp_path: Path) -> None:
    trainer = vae_trainer(
        StoredImages(ImageFolder(FolderListing(images)), image_size=8, image_channels=1, cache_bytes=0)
    )
    step = trainer.step

    def stepping(number: int) -> Any:
        if number == 1:
            images.rename(tmp_path / "unmounted")
            trainer.loader._drop()  # type: ignore[attr-defined]
            trainer.loader._next = -1  # type: ignore[attr-defined]  # reads the batch anew
        return step(number)

    trainer.step = stepping  # type: ignore[method-assign]
    with pytest.raises(UnreadableDataError, match="No such file or directory.. Mend that, then run the same command"):
        train(trainer, options(tmp_path / "out", save_every=100))
    assert "unreadable" not in load_training(tmp_path / "out" / STATE_FILE)[0]["settings"]
    images.mkdir()
    for index in range(TOTAL):
        Image.new("L", (8, 8), 3).save(images / f"{index:03d}.png")
    with pytest.raises(CheckpointError, match="other images"):
        run(images, tmp_path / "out")
    shutil.rmtree(images)
    (tmp_path / "unmounted").rename(images)
    assert run(images, tmp_path / "out")


def test_the_steps_are_saved_before_all_images_are_searched(images: Path, tmp_path: Path) -> None:
    trainer = trainer_on(images)
    cut(images / f"{int(trainer.loader.plan.batch(2).order[0]):03d}.png")

    def killed() -> list[str]:
        raise KeyboardInterrupt

    trainer.loader.find_unreadable = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(trainer, options(tmp_path / "out", save_every=100))
    assert load_training(tmp_path / "out" / STATE_FILE)[0]["step"] == 2


def test_the_steps_are_saved_if_memory_runs_out_while_images_are_read(tmp_path: Path) -> None:
    trainer = vae_trainer()
    batch = trainer.loader.batch

    def full(step: int) -> Any:
        if step == 2:
            raise UnreadableDataError("The images of step 2 do not fit in memory.")
        return batch(step)

    trainer.loader.batch = full  # type: ignore[method-assign]
    with pytest.raises(UnreadableDataError, match="do not fit in memory. Mend that, then run the same command again"):
        train(trainer, options(tmp_path, save_every=100))
    assert load_training(tmp_path / STATE_FILE)[0]["step"] == 2


def test_images_are_identified_before_the_first_step(images: Path, tmp_path: Path) -> None:
    """A save may be the last before a kill."""
    trainer, digest = trainer_on(images), trainer_on(images).settings()["data_sha256"]
    step = trainer.step

    def stepping(number: int) -> Any:
        if number == 1:
            shutil.rmtree(images)
        return step(number)

    trainer.step = stepping  # type: ignore[method-assign]
    with suppress(UnreadableDataError):  # unless the reading ahead was faster
        train(trainer, options(tmp_path / "out", save_every=100))
    assert load_training(tmp_path / "out" / STATE_FILE)[0]["settings"]["data_sha256"] == digest


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / f".{STATE_FILE}.{'0' * 32}.tmp"
    left.touch()
    (tmp_path / ".mine.tmp").touch()
    train(vae_trainer(), options(tmp_path))
    assert not left.exists() and (tmp_path / ".mine.tmp").exists()


def test_any_image_may_replace_the_unreadable_one_but_no_other(images: Path, tmp_path: Path) -> None:
    loader = trainer_on(images).loader
    late, early = (images / f"{int(loader.plan.batch(step).order[5]):03d}.png" for step in (2, 1))
    cut(late)
    out = tmp_path / "out"
    with pytest.raises(UnreadableDataError):
        run(images, out)
    Image.new("L", (9, 9), 3).save(late)
    kept = early.read_bytes()
    Image.new("L", (8, 8), 3).save(early)
    with pytest.raises(CheckpointError, match="other images"):
        run(images, out)
    early.write_bytes(kept)
    assert run(images, out)


def test_a_removed_image_needs_another_folder_as_the_error_says(images: Path, tmp_path: Path) -> None:
    broken = images / f"{int(trainer_on(images).loader.plan.batch(1).order[0]):03d}.png"
    cut(broken)
    with pytest.raises(UnreadableDataError, match="without these images, start a new run in another output folder"):
        run(images, tmp_path / "out")
    broken.unlink()
    with pytest.raises(CheckpointError, match="384 .* then, 383 .* now"):
        run(images, tmp_path / "out")
    assert run(images, tmp_path / "new")


# One run at a time.
def hold(out: Path, ready: Any) -> None:
    with Lock(out / ".lock", out):
        ready.set()
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_second_run_in_the_same_folder_is_refused_at_once(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(images, out, stop_at=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(out, ready))
    other.start()
    try:
        assert ready.wait(60)
        with pytest.raises(LockedError, match=f"{out} is being written by process {other.pid} on "):
            run(images, out)
    finally:
        other.kill()
        other.join()
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert run(images, out)


def test_a_file_system_without_locks_trains_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, fcntl, "flock", errno.ENOLCK)
    with pytest.warns(UserWarning, match="refuses to lock it"):
        assert train(vae_trainer(), options(tmp_path))


# Destinations, and full disks.
@pytest.mark.parametrize("name", ["nvae.safetensors", STATE_FILE, "samples", "metrics.jsonl", "tensorboard"])
def test_a_run_that_could_not_write_its_results_does_not_begin(name: str, tmp_path: Path) -> None:
    wrong = tmp_path / name
    wrong.mkdir() if "." in name else wrong.touch()
    trainer = vae_trainer()
    trainer.step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(OSError) as raised:
        train(trainer, options(tmp_path), save_grid)
    assert str(raised.value.filename).startswith(str(wrong))


def test_a_full_disk_leaves_the_log_whole_and_names_it(tmp_path: Path) -> None:
    train(vae_trainer(), options(tmp_path))
    log = tmp_path / "metrics.jsonl"
    lines = log.read_text()
    with files_of_at_most(len(lines) // 2), pytest.raises((OSError, CheckpointError)) as raised:
        train(vae_trainer(), options(tmp_path))
    assert str(log) in (str(raised.value.filename) if isinstance(raised.value, OSError) else str(raised.value))
    assert log.read_text() == lines


def test_a_disk_that_fills_while_training_names_the_log(tmp_path: Path) -> None:
    trainer = vae_trainer()
    step = trainer.step

    def filling(number: int) -> Any:
        if number == 2:
            size = (tmp_path / "metrics.jsonl").stat().st_size
            limit.enter_context(files_of_at_most(size + 10))
        return step(number)

    trainer.step = filling  # type: ignore[method-assign]
    with ExitStack() as limit, pytest.raises(OSError) as raised:
        train(trainer, options(tmp_path, save_every=100))
    assert str(raised.value.filename) == str(tmp_path / "metrics.jsonl")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:2]]
    assert [record["step"] for record in records] == [1, 2]


def test_identity_costs_one_reading_of_the_files(images: Path) -> None:
    trainer = trainer_on(images)
    settings = trainer.settings()
    for path in images.iterdir():
        path.unlink()
    assert trainer.settings() == settings and np.isfinite(settings["images"])
