"""What every test starts from: one thread, and a seeded generator of its own.

The tests' tensors are small, and threads that wait for each other cost more than they give.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
