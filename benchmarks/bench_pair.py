"""A chain step of the whole pair, all candidates interleaved; `pair` defines them.

make bench, or: python -m pytest benchmarks/bench_pair.py [--case celeba_64:4 ...] [--compile celeba_64:4 ...]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import measure, pair
from benchmarks.conftest import REPLAY, candidates_of, replay
from benchmarks.results_file import ResultsFile


@pytest.mark.benchmark(timer=REPLAY)
def test_chain_step(
    benchmark: Any,
    pair_case: tuple[str, int, str],
    open_results: Callable[[str, str], ResultsFile],
    measured_once: Callable[..., dict[str, Any]],
    request: pytest.FixtureRequest,
) -> None:
    preset, batch, candidate = pair_case
    option, what = request.config.getoption, f"{preset}, N = {batch}"
    names = candidates_of(f"{preset}:{batch}", option("--compile"), option("--candidate"), option("--without"))
    device, rounds = measure.default_device(), option("--rounds")
    file = open_results(option("--into"), "How long does a chain step take?")

    def take(keep: pair.Keep) -> dict[str, pair.Row]:
        return pair.measure_pair(preset, batch, names, device, rounds=rounds, keep=keep)

    row = measured_once(file, what, pair.TESTS, take, candidate)
    replay(benchmark, row, what)
