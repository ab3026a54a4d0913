"""The counted work of a step is what counting it gives."""

from __future__ import annotations

import pytest

from benchmarks.counted import WORK, Work
from vaebm_fast import PRESETS
from vaebm_fast.evaluation.cost import least_traffic, pair_flops


def test_every_preset_has_its_work() -> None:
    assert set(WORK) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_work_is_counted_again(preset: str) -> None:
    traffic = least_traffic(preset)
    assert WORK[preset] == Work(*pair_flops(preset), int(traffic.per_image), int(traffic.per_step))


def test_bytes_follow_the_batch_and_the_size_of_an_element() -> None:
    work = Work(1, 1, bytes_per_image=10, bytes_per_step=4)
    assert work.least_bytes(3, 2) == 34 and work.least_bytes(3, 4) == 68
