"""Long commands that run beside the tests: `conftest` begins them, one after another, before the first test.

A test that is marked `pytest.mark.ahead(*arguments, **environment)` stands for a run of Python with these arguments and
variables, and reads what became of it from its fixture `ahead`. Most of the tests keep one core busy; this is for the
other. It is a process of its own that begins them, since tests change what a child inherits (limits, folder, umask).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
Run = tuple[tuple[str, ...], dict[str, str]]  # arguments of Python, variables of the environment
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")


class Ran(NamedTuple):
    """What became of a command; stdout and stderr are one text."""

    returncode: int
    output: str


class Queue:
    """Runs of Python, one after another."""

    def __init__(self, runs: Sequence[Run], folder: Path) -> None:
        self._folder = folder
        command = [sys.executable, __file__, str(folder), json.dumps(runs)]
        self._process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True) if runs else None

    def wait(self, number: int) -> Ran:
        """The end of the run with this number."""
        assert self._process is not None
        done = self._folder / f"{number}.json"
        while not done.exists():
            assert self._process.poll() in (None, 0), "The process that runs commands ahead has ended."
            time.sleep(0.05)
        return Ran(*json.loads(done.read_text()))

    def close(self) -> None:
        """End what still runs."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def main(folder: Path, runs: list[Any]) -> None:
    tests = os.getppid()
    for number, (arguments, variables) in enumerate(runs):
        if os.getppid() != tests:  # they were killed
            return
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        unfinished = folder / "unfinished"
        unfinished.write_text(json.dumps([done.returncode, done.stdout]))
        unfinished.rename(folder / f"{number}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
