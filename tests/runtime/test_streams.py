"""Commands whose terminal has gone or lacks characters: the work is done, and the exit code says so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vaebm_fast

# Imports the runtime without the package's __init__, which takes seconds because it imports torch.
LIGHT = f"""
import sys, types
sys.modules["vaebm_fast"] = types.ModuleType("vaebm_fast")
sys.modules["vaebm_fast"].__path__ = [{str(Path(vaebm_fast.__file__).parent)!r}]
"""
# Prints as a command does, then leaves a mark: the work.
WORK = f"""{LIGHT}
import warnings
from pathlib import Path
from vaebm_fast.runtime import command
def work(arguments):
    for line in range(4000):
        print("line", line, "\\u2500", flush=True)
        print("note", line, "\\u2014", file=sys.stderr)
    warnings.warn("a warning")
    Path(arguments[0]).write_text("done")
    return 0
sys.exit(command.run(work, sys.argv[1:]))
"""


def run(shell: str, mark: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """The work in a shell, with `shell` behind its command."""
    return subprocess.run(
        ["bash", "-c", f'set -o pipefail; "$0" -c "$1" "$2" {shell}', sys.executable, WORK, str(mark)],
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("shell", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "| head -1", "2>&1 | true"])
def test_the_work_is_done_without_anyone_to_read(shell: str, tmp_path: Path) -> None:
    ended = run(shell, tmp_path / "mark")
    assert (tmp_path / "mark").read_text() == "done" and ended.returncode == 0
    assert b"Traceback" not in ended.stderr and b"Exception ignored" not in ended.stderr


def test_a_full_disk_behind_stdout_is_told_after_the_work(tmp_path: Path) -> None:
    ended = run("> /dev/full", tmp_path / "mark")
    assert (tmp_path / "mark").read_text() == "done" and ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == b"error: <stdout>: No space left on device."


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_a_terminal_lacks_are_replaced(encoding: str, tmp_path: Path) -> None:
    ended = run("", tmp_path / "mark", PYTHONIOENCODING=encoding)
    assert ended.returncode == 0 and ended.stdout.splitlines()[3999] == b"line 3999 ?"
    assert b"note 3999 ?" in ended.stderr


def test_the_streams_are_as_before_after_a_command() -> None:
    program = LIGHT + (
        "from vaebm_fast.runtime import command; before = sys.stdout, sys.stderr, sys.stdout.errors; "
        "command.run(lambda _: 0, []); assert before == (sys.stdout, sys.stderr, sys.stdout.errors)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
