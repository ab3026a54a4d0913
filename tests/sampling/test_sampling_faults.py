"""The sampling job killed, starved, stopped and doubled, for real: run again, it leaves what an undisturbed one does.

Processes are copies of this one, which has torch loaded, so beginning one takes little; one test begins the command.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.file_systems import without_root
from tests.helpers.sampling_jobs import exit_code, images_in, options_for, run_apart, run_ranks, save_networks
from vaebm_fast.runtime.locks import LockedError
from vaebm_fast.runtime.ranks import Ranks
from vaebm_fast.sampling import SampleOptions, SamplingError, run_job
from vaebm_fast.sampling.blocks import Block, BlockSampler

Networks = tuple[Path, Path]
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Networks:
    return save_networks(tmp_path_factory.mktemp("networks"))


@pytest.fixture(scope="module")
def undisturbed(networks: Networks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, bytes]]:
    """The files of a job in one process that nothing happened to."""
    known: dict[str, dict[str, bytes]] = {}

    def files(**settings: Any) -> dict[str, bytes]:
        key = json.dumps(settings)
        if key not in known:
            out = tmp_path_factory.mktemp("undisturbed")
            assert run_job(options_for(networks, out, **settings)) == 0
            known[key] = images_in(out)
        return known[key]

    return files


def slowed(seconds: float) -> Callable[[], None]:
    """Makes every block of the process take this much longer."""

    def slow() -> None:
        run = BlockSampler.run

        def run_slowly(self: BlockSampler, index: int, seeds: Sequence[int]) -> Block:
            time.sleep(seconds)
            return run(self, index, seeds)

        BlockSampler.run = run_slowly  # type: ignore[method-assign]

    return slow


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait for something to hold."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.005)


def finished_blocks(out: Path) -> list[int]:
    """The blocks in the journals, each as often as it is recorded; safe while the job runs.

    A starting job collects the journals of the run before it into one and removes them: a journal that is gone
    before it was read means that the list of names is old, so read again.
    """
    while True:
        try:
            journals = [path.read_bytes() for path in sorted(out.glob(".job/journal*"))]
        except FileNotFoundError:
            continue
        lines = [line for journal in journals for line in journal.splitlines(keepends=True)]
        return [json.loads(line)["block"] for line in lines if line.endswith(b"\n")]


# Killed.
@pytest.mark.parametrize("format", ["png", "tar"])
def test_killed_at_random_moments_and_run_again_nothing_is_lost_or_doubled(
    format: str, networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    """Some moments are anywhere after the beginning, in its loading too; some are after a block was finished."""
    settings = {"seeds": "0-239", "format": format}
    expected = undisturbed(**settings)
    options, delays, survivors = options_for(networks, tmp_path / "out", **settings), random.Random(format), [0]
    for attempt in range(8):
        process = run_apart(options, before=slowed(0.05))
        if attempt % 2 == 0:
            until(lambda: len(set(finished_blocks(options.out))) > survivors[-1])
        time.sleep(delays.uniform(0, 0.3))
        process.kill()
        assert exit_code(process) == -signal.SIGKILL, "it was not done yet"
        survivors.append(len(set(finished_blocks(options.out))))
    assert survivors == sorted(survivors) and 4 <= survivors[-1] < 60, "what was finished stays finished"
    assert exit_code(run_apart(options)) == 0
    assert images_in(options.out) == expected
    assert sorted(finished_blocks(options.out)) == list(range(60))


@pytest.mark.parametrize("format", ["png", "zip"])
def test_killed_before_or_after_any_file_gets_its_name_the_job_completes_to_the_same_files(
    format: str, networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    """Every renaming of the job in turn: of pictures or parts, of the journal, of the product, of its note."""
    settings = {"seeds": "0-2", "batch_size": 2, "format": format}
    for after in (False, True):
        for which in range(100):
            options = options_for(networks, tmp_path / f"{after}-{which}", **settings)
            code = exit_code(run_apart(options, before=killed_at_renaming(which, after)))
            assert exit_code(run_apart(options)) == 0
            assert images_in(options.out) == undisturbed(**settings)
            if code == 0:
                break
            assert code == -signal.SIGKILL
        assert 5 < which < 100, "the job was killed at each of its renamings, until there were no more"


def killed_at_renaming(which: int, after: bool) -> Callable[[], None]:
    def prepare() -> None:
        replace_file, count = os.replace, iter(range(10**6))

        def renaming(source: Path, destination: Path) -> None:
            here = next(count) == which
            if here and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            replace_file(source, destination)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = renaming  # type: ignore[assignment]

    return prepare


# No room, no right to write.
@pytest.mark.parametrize("which", [0, 3, 9])
def test_a_full_disk_stops_the_job_with_one_sentence_and_it_goes_on_later(
    which: int,
    networks: Networks,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def full_disk() -> None:
        write, count = Path.write_bytes, iter(range(10**6))

        def write_bytes(path: Path, data: bytes) -> int:
            if next(count) >= which + 2:  # manifest and journal come first
                write(path, data[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return write(path, data)

        Path.write_bytes = write_bytes  # type: ignore[method-assign, assignment]

    options = options_for(networks, tmp_path / "out")
    assert exit_code(run_apart(options, before=full_disk)) == 1
    error = capfd.readouterr().err
    assert error.startswith(f"error: {options.out}/000000/") and error.count("\n") == 1
    assert "No space left on device; fix that, then run the same command again" in error
    assert len(images_in(options.out)) == 1 + which, "what was written is whole, and nothing else is there"
    assert exit_code(run_apart(options)) == 0
    assert images_in(options.out) == undisturbed()


def test_a_limit_of_the_system_that_the_product_alone_exceeds_is_told_and_survived(
    networks: Networks,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = {"seeds": "0-29", "format": "npy"}
    options = options_for(networks, tmp_path / "out", **settings)
    limit = 2000  # bytes: parts have 320, the product 1568 with its header
    assert len(undisturbed(**settings)["samples.npy"]) < limit

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    assert exit_code(run_apart(options, before=limited)) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "File too large; fix that, then" in error
    assert exit_code(run_apart(options)) == 0
    assert images_in(options.out) == undisturbed(**settings)


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded() -> None:
    missing = (Path("no-nvae"), Path("no-energy"))
    readonly = Path(tempfile.mkdtemp())  # not pytest's own folder, which nobody may not even enter
    try:
        (readonly / "file").touch()
        readonly.chmod(0o555)
        with without_root(), pytest.raises(SamplingError, match=f"^{readonly}/out: Permission denied; fix that, then"):
            run_job(options_for(missing, readonly / "out"))
        with pytest.raises(SamplingError, match=f"^{readonly}/file/out: Not a directory; fix that, then"):
            run_job(options_for(missing, readonly / "file" / "out"))
    finally:
        readonly.chmod(0o755)
        shutil.rmtree(readonly)


# Stopped, and doubled.
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_job_with_130_and_keeps_what_is_finished(
    number: signal.Signals,
    networks: Networks,
    undisturbed: Callable[..., dict[str, bytes]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = options_for(networks, tmp_path / "out")
    process = run_apart(options, before=slowed(0.5))
    until(lambda: finished_blocks(options.out))
    os.kill(process.pid, number)
    began = time.monotonic()
    assert exit_code(process) == 130 and time.monotonic() - began < 5
    captured = capfd.readouterr()
    assert captured.out == "Stopped; run the same command again to continue.\n" and captured.err == ""
    assert 0 < len(finished_blocks(options.out)) < 3
    assert exit_code(run_apart(options)) == 0
    assert images_in(options.out) == undisturbed()


def test_a_second_job_in_the_same_folder_is_refused_and_the_first_completes(
    networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    options = options_for(networks, tmp_path / "out")
    first = run_apart(options, before=slowed(0.3))
    until(lambda: finished_blocks(options.out))
    with pytest.raises(LockedError, match=f"is being written by process {first.pid} on .*; wait for it, or stop it"):
        run_job(options)
    assert exit_code(first) == 0 and images_in(options.out) == undisturbed()
    assert run_job(options) == 0, "the lock has gone with its holder"


# Several processes.
@pytest.mark.parametrize("format", ["png", "npz"])
@pytest.mark.parametrize("world", [2, 3])
def test_any_number_of_processes_writes_equal_files(
    world: int, format: str, networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    """Three blocks, of 4, 4 and 2."""
    options = options_for(networks, tmp_path / "out", format=format)
    assert run_ranks(options, world, tmp_path / "store") == [0] * world
    assert images_in(options.out) == undisturbed(format=format)
    summary = json.loads((options.out / "summary.json").read_text())
    made = [process["images"] for process in summary["this_run"]["processes"]]
    assert made == ([6, 4] if world == 2 else [4, 4, 2])


def test_fewer_blocks_than_processes_are_no_trouble(
    networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    options = options_for(networks, tmp_path / "out", seeds="0-2")
    assert run_ranks(options, 3, tmp_path / "store") == [0, 0, 0]
    assert images_in(options.out) == undisturbed(seeds="0-2")


def test_one_process_killed_ends_the_others_and_another_number_completes_the_job(
    networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = options_for(networks, tmp_path / "out", seeds="0-39")
    processes = [run_apart(options, Ranks(rank, 3, rank, 3), tmp_path / "store", slowed(0.1)) for rank in range(3)]
    until(lambda: len(finished_blocks(options.out)) >= 2)
    processes[1].kill()
    codes = [exit_code(process) for process in processes]
    assert codes == [1, -signal.SIGKILL, 1]
    error = "error: Another process of this job has ended early; run the same command again to continue.\n"
    assert capfd.readouterr().err == error, "one tells it for all"
    assert run_ranks(options, 2, tmp_path / "store2") == [0, 0]
    assert images_in(options.out) == undisturbed(seeds="0-39")
    assert sorted(finished_blocks(options.out)) == list(range(10))


def test_what_one_process_cannot_do_is_told_once_and_ends_all(
    networks: Networks, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    good = options_for(networks, tmp_path / "out")
    bad = replace(good, energy=tmp_path / "missing")
    processes = [
        run_apart(options, Ranks(rank, 2, rank, 2), tmp_path / "store") for rank, options in enumerate((good, bad))
    ]
    assert [exit_code(process) for process in processes] == [1, 0]
    assert capfd.readouterr().err == f"error: {tmp_path}/missing: there is no such file.\n"
    assert pictures_of(good) == set()


def pictures_of(options: SampleOptions) -> set[str]:
    return {name for name in images_in(options.out) if name.endswith(".png")}


# The command itself.
MAIN = "import sys\nfrom vaebm_fast.cli import main\nif __name__ == '__main__':\n    sys.exit(main())"


@pytest.mark.slow
def test_the_command_begins_processes_stops_them_and_torchrun_completes_what_they_began(
    networks: Networks, undisturbed: Callable[..., dict[str, bytes]], tmp_path: Path
) -> None:
    pytest.importorskip("tyro")
    out, settings = tmp_path / "out", {"seeds": "0-199", "steps": 10}
    arguments = ["sample", "--nvae", str(networks[0]), "--energy", str(networks[1]), "--out", str(out)]
    arguments += ["--seeds", "0-199", "--steps", "10", "--step-size", "0.05", "--batch-size", "4", "--device", "cpu"]
    program = tmp_path / "command.py"
    program.write_text(MAIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = subprocess.Popen(
        [sys.executable, str(program), *arguments, "--processes", "2"],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    until(lambda: finished_blocks(out), seconds=120)
    command.send_signal(signal.SIGINT)
    printed, errors = command.communicate(timeout=60)
    assert command.returncode == 130, errors
    assert printed == "Stopped; run the same command again to continue.\n" and errors == ""
    assert 0 < len(set(finished_blocks(out))) < 50

    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program)]
    done = subprocess.run([*launcher, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "all 200 are in" in done.stdout and done.stdout.count("\n") == 1
    assert images_in(out) == undisturbed(**settings)
