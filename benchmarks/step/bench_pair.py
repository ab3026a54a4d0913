"""How long does one chain step take, by what computes U and its gradient?

    python -m benchmarks pair [--case celeba_64:4 ...] [--compile celeba_64:4 ...]

`pair` defines the candidates; options are those of pytest and `benchmarks/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.conftest import REPLAY, candidates_of, replay, run_bench
from benchmarks.results_file import Keep, ResultsFile, Row
from benchmarks.step import pair


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

    def take(keep: Keep) -> dict[str, Row]:
        return pair.measure_pair(preset, batch, names, device, rounds=rounds, keep=keep)

    row = measured_once(file, what, pair.TESTS, take, candidate)
    replay(benchmark, row, what)


def main(arguments: Sequence[str]) -> int:
    """Measure, write results/pair_<device>.json and its table; pytest's exit code."""
    return run_bench(__file__, __doc__, arguments)
