"""The replay buffer: comparison with a plain list, memory and errors. Pinned memory: test_replay_gpu.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vaebm_fast.checkpoint import load_training, save_training
from vaebm_fast.training import replay
from vaebm_fast.training.replay import ReplayRing, free_memory

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
OURS = {"rank": 0, "world_size": 4}


class ListBuffer:
    """Reference ring: a list of rounded rows; the oldest is replaced first."""

    def __init__(self, capacity: int, dtype: torch.dtype) -> None:
        self.capacity, self.dtype, self.pushed = capacity, dtype, 0
        self.rows: list[Tensor] = []

    def push(self, states: Tensor) -> None:
        for state in states.to(self.dtype).float():
            if len(self.rows) < self.capacity:
                self.rows.append(state)
            else:
                self.rows[self.pushed % self.capacity] = state
            self.pushed += 1


@settings(deadline=None, max_examples=60)
@given(
    capacity=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    work=st.lists(
        st.one_of(st.floats(0, 1), st.sampled_from(["restore", "clear"])), max_size=12
    ),  # fractions of the capacity to push
    picks=st.lists(st.floats(0, 1, exclude_max=True), max_size=8),
)
def test_ring_is_a_list_whose_oldest_states_are_replaced(
    capacity: int, dtype: torch.dtype, work: list[float | str], picks: list[float]
) -> None:
    ring, expected = ReplayRing(capacity, 3, dtype=dtype), ListBuffer(capacity, dtype)
    for what in work:
        if what == "clear":
            ring.clear()
            expected = ListBuffer(capacity, dtype)
        elif isinstance(what, str):
            restored = ReplayRing(capacity, 3, dtype=dtype)
            restored.push(torch.full((capacity, 3), -1.0))  # loading replaces former content
            restored.load_state_dict(ring.state_dict())
            ring = restored
        else:
            states = torch.randn(round(what * capacity), 3)
            ring.push(states)
            expected.push(states)
        assert len(ring) == len(expected.rows)
        indices = [int(pick * len(ring)) for pick in picks if len(ring)]
        gathered = ring.gather(torch.tensor(indices, dtype=torch.long))
        assert gathered.dtype == torch.float32 and gathered.shape == (len(indices), 3)
        assert all(torch.equal(row, expected.rows[index]) for row, index in zip(gathered, indices, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ring_copies_what_it_takes_and_gives_and_knows_no_gradient(dtype: torch.dtype) -> None:
    ring, states = ReplayRing(3, 4, dtype=dtype), torch.randn(2, 8, requires_grad=True)
    ring.push(states[:, ::2])  # not contiguous, like the latents of a noise vector
    assert not ring.state_dict()["states"].requires_grad
    kept = states.detach()[:, ::2].clone().to(dtype).float()
    with torch.no_grad():
        states.zero_()
    gathered = ring.gather(torch.tensor([1, 0, 1]))
    assert not gathered.requires_grad and torch.equal(gathered, kept[[1, 0, 1]])
    gathered.zero_()
    assert torch.equal(ring.gather(torch.tensor([0, 1])), kept)


def test_a_wrapping_push_makes_two_copies_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    copy = Tensor.copy_

    def counted(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        copied.append(len(source))
        return copy(self, source, non_blocking)

    ring = ReplayRing(5, 2)
    ring.push(torch.randn(4, 2))
    monkeypatch.setattr(Tensor, "copy_", counted)
    ring.push(torch.randn(3, 2))
    assert copied == [1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pushed", [0, 2, 7])
def test_a_ring_from_a_file_goes_on_as_the_saved_one(dtype: torch.dtype, pushed: int, tmp_path: Path) -> None:
    ring, restored = ReplayRing(3, 2, dtype=dtype), ReplayRing(3, 2, dtype=dtype)
    for _ in range(pushed):
        ring.push(torch.randn(1, 2))
    save_training(ring.state_dict(), tmp_path / "ring.safetensors")
    restored.load_state_dict(load_training(tmp_path / "ring.safetensors")[0])
    for _ in range(2):
        everything = torch.arange(len(ring))
        assert len(restored) == len(ring)
        assert torch.equal(restored.gather(everything), ring.gather(everything))
        states = torch.randn(2, 2)
        for each in (ring, restored):
            each.push(states)


def test_what_is_saved_is_the_ring_itself_not_a_copy() -> None:
    ring = ReplayRing(3, 2)
    ring.push(torch.zeros(3, 2))
    saved = ring.state_dict()
    ring.push(torch.ones(1, 2))
    assert saved["states"].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_ring_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"capacity is 0; it must be at least 1\."):
        ReplayRing(0, 4)
    with pytest.raises(ValueError, match=r"placement is host, .* but the device is cpu; use placement device\."):
        ReplayRing(3, 4, placement="host")
    ring = ReplayRing(3, 4)
    with pytest.raises(ValueError, match=r"4 states exceed the replay buffer's capacity of 3\."):
        ring.push(torch.zeros(4, 4))
    for shape in ((2, 1), (2, 3), (4,)):
        with pytest.raises(ValueError, match=r"states have shape .*; this replay buffer takes \[N, 4\]\."):
            ring.push(torch.zeros(shape))
    ring.push(torch.zeros(2, 4))
    for index in (2, -1):
        with pytest.raises(IndexError, match=rf"Index {index} is out of range for a replay buffer with 2 states\."):
            ring.gather(torch.tensor([0, index]))


@pytest.mark.parametrize(
    "other, reason",
    [
        (ReplayRing(2, 4, **OURS), r"saved replay buffer has shape \(3, 4\); this one has \(2, 4\)\."),
        (ReplayRing(3, 5, **OURS), r"saved replay buffer has shape \(3, 4\); this one has \(3, 5\)\."),
        (ReplayRing(3, 4, **OURS, dtype=torch.bfloat16), r"is torch\.float32, this one is torch\.bfloat16;"),
        (ReplayRing(3, 4, rank=1, world_size=4), r"to rank 0 of 4, but this is rank 1 of 4; resume with the"),
        (ReplayRing(3, 4, world_size=2), r"to rank 0 of 4, but this is rank 0 of 2; resume with the"),
    ],
    ids=["smaller", "wider", "bfloat16", "rank", "world"],
)
def test_another_ring_is_not_continued_and_nothing_half_loaded(other: ReplayRing, reason: str) -> None:
    ring = ReplayRing(3, 4, **OURS)
    ring.push(torch.ones(3, 4))
    other.push(torch.zeros(2, other.gather(torch.empty(0, dtype=torch.long)).shape[1]))
    with pytest.raises(ValueError, match=reason):
        other.load_state_dict(ring.state_dict())
    assert len(other) == 2 and not other.gather(torch.tensor([0, 1])).any()


def test_a_ring_that_does_not_fit_the_memory_is_refused_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"1000000000 states \[10000\] in torch\.float32 needs 40000\.0 GB of cpu"):
        ReplayRing(10**9, 10_000)
    monkeypatch.setattr(replay, "free_memory", lambda device: 7999)
    assert ReplayRing(1000, 2, dtype=torch.bfloat16).capacity == 1000
    with pytest.raises(ValueError, match="lower its size, use dtype bfloat16, or change its placement"):
        ReplayRing(1000, 2)


RESIDENT = """
import mmap, torch
from pathlib import Path
from vaebm_fast.training.replay import ReplayRing

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

before = resident()
ring = ReplayRing(2**10, 2**14)
taken = resident()
ring.push(torch.zeros(1, 2**14).expand(2**10, -1))
print(taken - before, resident() - taken)
"""


def test_the_memory_of_a_ring_is_there_from_the_start() -> None:
    """Runs in its own process, so that no freed block can be reused."""
    done = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True, check=True)
    at_first, later = map(int, done.stdout.split())
    assert at_first > 0.95 * 2**26 and later < 0.1 * 2**26


@pytest.mark.parametrize(
    "limit, used, free", [(None, 0, 3000), ("max", 0, 3000), ("2048000", 1024000, 1024), ("9" * 15, 0, 3000)]
)
def test_free_memory_is_what_linux_and_the_container_still_give(
    limit: str | None, used: int, free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(replay, "CGROUP", tmp_path)
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemFree: 10 kB\nMemAvailable: 3000 kB\nHugePages_Free:\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text("anon 77\ninactive_file 24576\n")
    assert free_memory(CPU) == free * 1024
