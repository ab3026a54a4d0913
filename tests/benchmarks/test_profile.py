"""The profile of a step, but for what only a GPU can tell."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import profile


def event(name: str, microseconds: float, kind: Any = torch.autograd.DeviceType.CUDA) -> SimpleNamespace:
    return SimpleNamespace(name=name, device_time_total=microseconds, device_type=kind)


def test_kernels_are_summed_by_name_longest_first_without_the_hosts_events() -> None:
    events = [event("small", 500), event("large", 1500), event("small", 250), event("host", 9e9, None)]
    assert profile.rows_of(events) == [
        {"kernel": "large", "calls": 1, "time_ms": 1.5},
        {"kernel": "small", "calls": 2, "time_ms": 0.75},
    ]


def test_the_table_says_the_gaps_and_each_kernels_share() -> None:
    rows = profile.rows_of([event("large", 1500), event("small", 500)])
    found = profile.summary("celeba_256", 16, "cuda", "bfloat16", "CUDA graph", 5.0, 2.5, rows)
    assert found["gap_fraction"] == pytest.approx(0.2) and found["launches"] == 2
    head, first, second = profile.table(found).splitlines()
    assert "replay 2.50 ms" in head and "gaps 20% of the replay" in head and "0.156 ms per image" in head
    assert "75.0%" in first and "large" in first and "25.0%" in second


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="a profile needs one"):
        profile.main(["celeba_256", "16", "cuda"])
