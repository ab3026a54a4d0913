"""What every test starts from: one thread, and a seeded generator of its own; and what tests of kernels ask for.

The tests' tensors are small, and threads that wait for each other cost more than they give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from tests.helpers.ahead import Queue, Ran, Run
from vaebm_fast.runtime import extension

torch.set_num_threads(1)

# They import the commands, and so tyro, which the machine that `make gpu` runs on may lack.
collect_ignore = (
    [] if find_spec("tyro") else ["cli", "evaluation/test_cost.py", "data/test_prepare.py", "data/test_overview.py"]
)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _queue(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Callable[[], Ran]]]:
    """By the tests marked `ahead`: waits for the run that is theirs; equal marks share one."""
    marks = {item.nodeid: mark for item in request.session.items if (mark := item.get_closest_marker("ahead"))}
    runs: list[Run] = []
    for mark in marks.values():
        if (mark.args, mark.kwargs) not in runs:
            runs.append((mark.args, mark.kwargs))
    queue = Queue(runs, tmp_path_factory.mktemp("ahead"))
    yield {nodeid: partial(queue.wait, runs.index((mark.args, mark.kwargs))) for nodeid, mark in marks.items()}
    queue.close()


@pytest.fixture
def ahead(request: pytest.FixtureRequest, _queue: dict[str, Callable[[], Ran]]) -> Ran:
    """What became of the command in this test's mark (see the module `ahead`)."""
    return _queue[request.node.nodeid]()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty, in C++ too, gives NaNs."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(100).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiled() -> None:
    if not extension.is_available():
        pytest.skip(str(extension.why_missing()))
