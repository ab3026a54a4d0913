"""Commands that run beside the tests: each result is its own, and none outlives the tests."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.helpers.ahead import Queue, Ran


@pytest.mark.ahead("-c", "import os; print(6 * int(os.environ['SEVEN']))", SEVEN="7")
def test_a_marked_test_reads_what_became_of_its_run(ahead: Ran) -> None:
    assert ahead == Ran(0, "42\n")


def test_runs_that_fail_are_told_from_others(tmp_path: Path) -> None:
    queue = Queue([(("-c", "raise SystemExit('wrong')"), {}), (("-c", "print('right')"), {})], tmp_path)
    assert queue.wait(1) == Ran(0, "right\n") and queue.wait(0) == Ran(1, "wrong\n")
    queue.close()


def test_closing_ends_what_still_runs(tmp_path: Path) -> None:
    (tmp_path / "alive").touch()
    program = (
        f"import pathlib, time\nwhile True: pathlib.Path({str(tmp_path / 'alive')!r}).write_text('x'); time.sleep(0.01)"
    )
    queue = Queue([(("-c", program), {})], tmp_path)
    while not (tmp_path / "alive").read_text():
        time.sleep(0.01)
    queue.close()
    (tmp_path / "alive").write_text("")
    time.sleep(0.1)
    assert (tmp_path / "alive").read_text() == ""
