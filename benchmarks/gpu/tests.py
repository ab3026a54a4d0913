"""Which GPU tests are red? Each file runs in a process of its own, so that an illegal access ends no other's tests.

    python -m benchmarks tests [--logs FOLDER]

Files run at the same time, and with pytest-xdist the tests of a file too. Prints what is red and a summary as each file
ends; whole logs go to the folder.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gate import REPOSITORY
from vaebm_fast.runtime.files import expanded

PYTEST = (sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider")
CHOSEN = ("-m", "gpu", "-k", "not sanitised")  # smoke tests have run the others
LOGS = REPOSITORY / "build" / "gpu_logs"
PER_FILE = 4  # processes
# A line of pytest's summary, or of this runner: the test's id, with its parameters, which may hold anything.
RED = re.compile(r"(?:FAILED|ERROR) (tests/\S+?\.py(?:::\w+)*(?:\[.*?\](?= - |$))?(?: \(exit code .*\))?)")
NONE_COLLECTED = 5  # pytest's exit code


class Ran(NamedTuple):
    """A file's exit code, red tests and last line."""

    code: int
    red: list[str]
    summary: str


def files() -> list[Path]:
    """The test files with GPU tests, the longest-running first."""
    found = [path for path in sorted((REPOSITORY / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    return sorted(found, key=lambda path: path.name != "test_gpu.py")


def run(path: Path, logs: Path) -> Ran:
    """Run a file's tests; a process that dies is red itself."""
    name = path.relative_to(REPOSITORY).as_posix()
    parallel = ("-n", str(PER_FILE)) if importlib.util.find_spec("xdist") else ()
    log = logs / f"tests_{path.stem}.log"
    with log.open("w") as output:
        code = subprocess.run(
            [*PYTEST, *parallel, *CHOSEN, str(path)],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    text = log.read_text(errors="replace")
    red = red_tests(text)
    if code not in (0, NONE_COLLECTED) and not red:
        red = [f"{name} (exit code {code}; see {log.name})"]
    return Ran(code, red, f"{name}: {next(reversed(text.strip().splitlines()), 'no output')}")


def red_tests(log: str) -> list[str]:
    """The tests that pytest's summary names as failed."""
    return [found[1] for line in log.splitlines() if (found := RED.match(line))]


def main(arguments: Sequence[str]) -> int:
    """Run all files; exit code 1 if a test is red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=expanded, default=LOGS, help="folder; default: build/gpu_logs")
    logs = parser.parse_args(arguments).logs
    if not torch.cuda.is_available():
        parser.error("these tests need a CUDA device, and there is none")
    logs.mkdir(parents=True, exist_ok=True)
    at_once = max(len(os.sched_getaffinity(0)) // PER_FILE, 1)
    with ThreadPoolExecutor(at_once) as pool:
        done = [pool.submit(run, path, logs) for path in files()]
        for each in as_completed(done):  # what is red is said even if there is no time for the rest
            print("\n".join([*(f"FAILED {test}" for test in each.result().red), each.result().summary]), flush=True)
    return int(any(each.result().red for each in done))
