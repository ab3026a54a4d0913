"""How fast is each op, beside its plain PyTorch reference and the machine's ceilings?

    python -m benchmarks ops [--op depthwise_swish ...]

`cases` has the table of cases, `timing` times them; options are those of pytest and `benchmarks/conftest.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.conftest import REPLAY, replay, run_bench
from benchmarks.ops.cases import Case
from benchmarks.ops.timing import measure_case
from benchmarks.results_file import Keep, ResultsFile, Row


@pytest.mark.benchmark(timer=REPLAY)
def test_op(
    benchmark: Any,
    op_case: tuple[Case, str],
    open_results: Callable[[str, str], ResultsFile],
    measured_once: Callable[..., dict[str, Any]],
    request: pytest.FixtureRequest,
) -> None:
    case, backend = op_case
    device, option = measure.default_device(), request.config.getoption
    file = open_results("ops", "How fast is each op?")

    def take(keep: Keep) -> dict[str, Row]:
        return measure_case(case, device, rounds=option("--rounds"), without=option("--without"))

    row = measured_once(file, case.name, (case.tests,), take, backend)
    replay(benchmark, row, case.name)


def main(arguments: Sequence[str]) -> int:
    """Measure, write results/ops_<device>.json and its table; pytest's exit code."""
    return run_bench(__file__, __doc__, arguments)
