"""Memory that a frozen pair keeps: what is reused, what is given back, and that torch's own allocator returns."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

import vaebm_fast as vf
from vaebm_fast.frozen.memory import reused_memory

CPU = torch.device("cpu")
FLOATS = 1 << 20  # 4 MiB


class Owner:
    """What a frozen pair is to the memory."""


@pytest.fixture
def owner(compiled: None) -> Owner:
    gc.collect()
    torch.ops.vaebm_fast.release_memory()
    return Owner()


def test_a_freed_block_is_used_again_for_the_same_size_and_a_slightly_smaller_one(owner: Owner) -> None:
    with reused_memory(owner, CPU):
        held = [torch.empty(FLOATS) for _ in range(2)]  # with these in use, a kept block is not freed for a small one
        first = torch.empty(FLOATS).data_ptr()
        assert torch.empty(FLOATS).data_ptr() == first not in [tensor.data_ptr() for tensor in held]
        assert torch.empty(FLOATS * 9 // 10).data_ptr() == first
        assert torch.empty(FLOATS // 2).data_ptr() != first


def test_blocks_in_use_are_never_handed_out(owner: Owner) -> None:
    with reused_memory(owner, CPU):
        held = [torch.full((FLOATS,), float(i)) for i in range(4)]
        del held[1]
        held += [torch.full((FLOATS,), 9.0) for _ in range(3)]
        assert [t[0].item() for t in held] == [0, 2, 3, 9, 9, 9]
        assert all((t == t[0]).all() for t in held)


@pytest.mark.parametrize("floats", [0, 1, 1000, 16_383, 16_384, 16_385, 524_287, 524_289])
def test_blocks_of_every_size_are_aligned_and_hold_what_is_written(floats: int, owner: Owner) -> None:
    with reused_memory(owner, CPU):
        tensors = [torch.full((floats,), float(i)) for i in range(3)]
        assert all(t.data_ptr() % 64 == 0 and (t == i).all() for i, t in enumerate(tensors))


def test_a_tensor_outlives_the_scope_and_its_block_comes_back(owner: Owner) -> None:
    with reused_memory(owner, CPU):
        kept = torch.arange(FLOATS)
    assert kept.sum() == FLOATS * (FLOATS - 1) // 2
    address = kept.data_ptr()
    kept.resize_(2 * FLOATS)[FLOATS:] = 1
    assert kept[FLOATS - 1] == FLOATS - 1
    del kept
    with reused_memory(owner, CPU):
        assert torch.empty(FLOATS, dtype=torch.int64).data_ptr() == address


def test_kept_blocks_stay_within_a_quarter_above_what_was_used_at_one_time(owner: Owner) -> None:
    with reused_memory(owner, CPU):
        for i in range(1, 20):
            torch.empty(i * FLOATS // 2)  # each fits none of those before
    most_used = 4 * (19 * FLOATS // 2)
    assert most_used <= torch.ops.vaebm_fast.release_memory() <= 1.25 * most_used + (1 << 20)


def test_torchs_allocator_returns_after_an_error_and_after_nested_and_concurrent_scopes(owner: Owner) -> None:
    def is_ours() -> bool:
        kept_before = torch.empty(FLOATS).data_ptr()
        return torch.empty(FLOATS).data_ptr() == kept_before and torch.ops.vaebm_fast.release_memory() > 0

    assert not is_ours()
    with pytest.raises(RuntimeError, match="on purpose"), reused_memory(owner, CPU):
        raise RuntimeError("on purpose")
    assert not is_ours()
    with reused_memory(owner, CPU):
        with reused_memory(owner, CPU):
            pass
        assert is_ours()
    assert not is_ours()
    inside, leave = threading.Barrier(3), threading.Event()

    def use() -> None:
        with reused_memory(owner, CPU):
            inside.wait()
            leave.wait()

    threads = [threading.Thread(target=use) for _ in range(2)]
    for thread in threads:
        thread.start()
    inside.wait()
    assert is_ours()
    leave.set()
    for thread in threads:
        thread.join()
    assert not is_ours()


def test_the_last_frozen_pair_takes_its_memory_with_it(owner: Owner) -> None:
    model = vf.VAEBM.from_preset("digits")
    pairs = [model.freeze(), model.freeze()]
    noise = [torch.randn(64, *shape) for shape in [*model.latent_shapes, model.image_shape]]
    for pair in pairs:
        pair.potential_and_grad(noise[:-1], noise[-1])
    del pair
    gc.collect()
    pairs.pop()
    pairs[0].potential_and_grad(noise[:-1], noise[-1])
    pairs.clear()
    gc.collect()
    assert torch.ops.vaebm_fast.release_memory() == 0


def test_other_devices_and_a_missing_compiled_part_are_left_alone(
    owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with reused_memory(owner, torch.device("meta")):
        torch.empty(FLOATS)
    monkeypatch.setattr("vaebm_fast.runtime.extension._why_missing", "the compiled part has not been built")
    with reused_memory(owner, CPU):
        torch.empty(FLOATS)
    assert torch.ops.vaebm_fast.release_memory() == 0
