"""What the ranks of a job leave behind."""

from __future__ import annotations

from pathlib import Path

import torch

from vaebm_fast.runtime.ranks import Ranks, joined, start


def names_of_threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def gloo_threads_left(ranks: Ranks, store: Path) -> int:
    with joined(ranks, store):
        torch.use_deterministic_algorithms(True)  # imports most of torch, as torch.compile does
        assert ranks.exchange(ranks.rank) == [0, 1]
        ranks.wait(lambda: None)
        assert any("gloo" in name for name in names_of_threads())
    return sum("gloo" in name for name in names_of_threads())


def test_no_thread_of_the_group_outlives_it() -> None:
    """One that does may free a Python object at the interpreter's end, which aborts the process."""
    assert start(gloo_threads_left, 2) == 0
