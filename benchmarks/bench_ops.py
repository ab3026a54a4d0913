"""Every op interleaved with its reference; `ops` has the table of cases.

make bench, or: python -m pytest benchmarks/bench_ops.py [--op depthwise_swish ...]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import measure, ops, pair
from benchmarks.conftest import REPLAY, replay
from benchmarks.results_file import ResultsFile


@pytest.mark.benchmark(timer=REPLAY)
def test_op(
    benchmark: Any,
    op_case: tuple[ops.Case, str],
    open_results: Callable[[str, str], ResultsFile],
    measured_once: Callable[..., dict[str, Any]],
    request: pytest.FixtureRequest,
) -> None:
    case, backend = op_case
    device, option = measure.default_device(), request.config.getoption
    file = open_results("ops", "How fast is each op?")

    def take(keep: pair.Keep) -> dict[str, pair.Row]:
        return ops.measure_case(case, device, rounds=option("--rounds"), without=option("--without"))

    row = measured_once(file, case.name, (case.tests,), take, backend)
    replay(benchmark, row, case.name)
