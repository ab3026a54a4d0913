"""On a GPU: the replay buffer on it and in pinned memory. Copies are held up, so that one not waited for shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vaebm_fast.config import Placement
from vaebm_fast.training.replay import ReplayRing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DIM = 200_000
PLACEMENTS: tuple[Placement, ...] = ("device", "host")
DTYPES = [torch.float32, torch.bfloat16]


def hold_up() -> None:
    """Nothing that is put on the current stream from now on begins within some 50 ms."""
    torch.cuda._sleep(10**8)


def states_of(first: int, count: int) -> Tensor:
    """Distinct rows [count, DIM] on the GPU, not contiguous, with bits that bfloat16 rounds away."""
    rows = torch.arange(first, first + count, device="cuda")[:, None] + 1
    return (rows * torch.linspace(0.1, 1, DIM + 7, device="cuda"))[:, :DIM]


def ring_of(dtype: torch.dtype, placement: Placement, **others: Any) -> ReplayRing:
    return ReplayRing(5, DIM, dtype=dtype, device="cuda", placement=placement, **others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ring_is_a_list_whose_oldest_states_are_replaced(placement: Placement, dtype: torch.dtype) -> None:
    ring, rows, pushed = ring_of(dtype, placement), {}, 0
    for count in (2, 2, 3, 0, 5, 1):
        states = states_of(pushed, count)
        expected = states.to(dtype).float().cpu()
        hold_up()
        ring.push(states)
        states.zero_()
        for row in expected:
            rows[pushed % 5] = row
            pushed += 1
        indices = torch.arange(len(ring)).flip(0)
        gathered = ring.gather(indices)
        assert gathered.device.type == "cuda" and gathered.dtype == torch.float32
        assert torch.equal(gathered.cpu(), torch.stack([rows[index] for index in indices.tolist()]))


def test_pinned_memory_is_pinned_and_the_host_sees_what_was_pushed() -> None:
    ring, states = ring_of(torch.bfloat16, "host"), states_of(0, 5)
    expected = states.bfloat16().cpu()
    hold_up()
    ring.push(states)
    kept = ring.state_dict()["states"]
    assert torch.equal(kept, expected) and kept.is_pinned()


def test_rows_are_not_overwritten_before_they_are_gathered() -> None:
    ring, states = ring_of(torch.float32, "host"), states_of(0, 5)
    ring.push(states)
    hold_up()
    gathered = ring.gather(torch.arange(5))
    ring.push(torch.zeros(5, DIM))  # written by the host
    assert torch.equal(gathered, states)
    ring.push(states)
    hold_up()
    gathered = ring.gather(torch.arange(5))
    ring.load_state_dict({**ring.state_dict(), "states": torch.zeros(5, DIM)})
    assert torch.equal(gathered, states)


def test_another_stream_finds_what_was_pushed() -> None:
    ring, states, other = ring_of(torch.float32, "host"), states_of(0, 5), torch.cuda.Stream()
    torch.cuda.synchronize()
    hold_up()
    ring.push(states)
    with torch.cuda.stream(other):
        gathered = ring.gather(torch.arange(5))
    other.synchronize()
    assert torch.equal(gathered, states)


def test_a_state_moves_between_placements() -> None:
    ring = ring_of(torch.bfloat16, "host")
    ring.push(states_of(0, 5))
    ring.push(states_of(5, 2))
    restored = ring_of(torch.bfloat16, "device")
    restored.load_state_dict(ring.state_dict())
    for each in (ring, restored):
        each.push(states_of(7, 1))
    assert torch.equal(restored.gather(torch.arange(5)), ring.gather(torch.arange(5)))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_ring_that_does_not_fit_the_memory_is_refused_with_the_numbers(placement: Placement) -> None:
    kind = "pinned cpu" if placement == "host" else "cuda"
    with pytest.raises(ValueError, match=rf"GB of {kind} memory, of which .* GB are free"):
        ReplayRing(10**9, 10_000, device="cuda", placement=placement)
