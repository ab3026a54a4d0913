"""Runs `pair` and `ops` under pytest-benchmark: options, test gate, result files and tables.

pytest-benchmark times functions one after another. Here `measure` times the candidates interleaved, so that other load
affects all equally, and a timer replays each candidate's times to pytest-benchmark.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure, report
from benchmarks.environment import RESULTS
from benchmarks.gate import why_red
from benchmarks.ops import cases as op_cases
from benchmarks.options import at_least_one
from benchmarks.results_file import Keep, ResultsFile, Row
from benchmarks.step import pair
from vaebm_fast import PRESETS

DEFAULT_CASES = ("cifar10:1", "cifar10:4", "cifar10:8", "celeba_64:1", "celeba_64:4", "celeba_64:16", "celeba_256:1")

Rows = dict[str, Row]
Take = Callable[[Keep], Rows]  # may write rows before it returns all


class Replay:
    """A timer for pytest-benchmark that replays the times given to `load`, one per pair of calls."""

    def __init__(self) -> None:
        self._ticks: Iterator[float] = iter(())

    def load(self, times_s: list[float]) -> None:
        self._ticks = iter([tick for time_s in times_s for tick in (0.0, time_s)])

    def __call__(self) -> float:
        return next(self._ticks)


REPLAY = Replay()


def replay(benchmark: Any, row: dict[str, Any], group: str) -> None:
    """Report a measured row to pytest-benchmark."""
    benchmark.group = group
    benchmark.extra_info.update({key: value for key, value in row.items() if key != "times_s"})
    REPLAY.load(row["times_s"])
    benchmark.pedantic(lambda: None, rounds=row["rounds"], iterations=1)


def run_bench(file: str, description: str | None, arguments: Sequence[str]) -> int:
    """Run pytest on a file of benchmarks; returns its exit code. --help prints the options of these benchmarks."""
    if {"-h", "--help"} & set(arguments):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        for name, settings in OPTIONS.items():
            parser.add_argument(name, **settings)
        parser.print_help()
        return 0
    return int(pytest.main([file, "-q", "-p", "no:cacheprovider", "--benchmark-columns=median,rounds", *arguments]))


OPTIONS: dict[str, dict[str, Any]] = {
    "--case": {"action": "append", "metavar": "PRESET:N", "help": f"whole pair; {' '.join(DEFAULT_CASES)}"},
    "--candidate": {"action": "append", "metavar": "NAME", "help": "of the whole pair; default: all that run here"},
    "--compile": {
        "action": "append",
        "metavar": "PRESET:N",
        "help": "cases that include torch.compile; compiling takes minutes",
    },
    "--op": {"action": "append", "metavar": "NAME", "help": "ops to measure; default: all"},
    "--without": {"action": "append", "default": [], "metavar": "BACKEND", "help": "leave out this backend"},
    "--rounds": {"type": at_least_one, "help": "rounds; by default depends on the time of a call"},
    "--tested": {"action": "store_true", "help": "skip the tests: this build has just passed them"},
    "--into": {"default": "pair", "metavar": "NAME", "help": "name of the pair's result file; default: pair"},
    "--results": {"type": Path, "default": RESULTS, "help": "folder of the JSON and Markdown files"},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vaebm-fast benchmarks")
    for name, settings in OPTIONS.items():
        group.addoption(name, **settings)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if "pair_case" in metafunc.fixturenames:
        texts = option("--case") or DEFAULT_CASES
        strays = sorted(set(option("--compile") or ()) - set(texts))
        if strays:
            raise pytest.UsageError(f"--compile {', '.join(strays)}: not among the cases {', '.join(texts)}.")
        chosen = option("--compile"), option("--candidate"), option("--without")
        pairs = [(*_parsed(text), name) for text in texts for name in candidates_of(text, *chosen)]
        metafunc.parametrize("pair_case", pairs, ids=[f"{preset}-{batch}-{name}" for preset, batch, name in pairs])
    if "op_case" in metafunc.fixturenames:
        device = measure.default_device()
        try:
            known = op_cases.cases_of(option("--op"), device)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error
        kept = [case for case in known if op_cases.has_kernel(case.op, device)]
        cases = [(case, name) for case in kept for name in op_cases.backends_of(case.op, device, option("--without"))]
        metafunc.parametrize("op_case", cases, ids=[f"{case.name}-{name}" for case, name in cases])


def candidates_of(
    text: str, compiled: list[str] | None, chosen: list[str] | None = None, without: Sequence[str] = ()
) -> list[str]:
    """The candidates that run here, in the given order, without the backends in `without`; torch.compile is opt-in."""
    device = measure.default_device()
    usable = [name for name in chosen or pair.CANDIDATES if pair.why_not(name, device) is None]
    usable = [name for name in usable if name not in pair.FROZEN or pair.FROZEN[name][0] not in without]
    return [name for name in usable if name not in pair.TO_COMPILE or text in (compiled or ())]


def _parsed(text: str) -> tuple[str, int]:
    preset, _, batch = text.partition(":")
    if preset not in PRESETS or not batch.isdigit() or int(batch) < 1:
        raise pytest.UsageError(f"{text!r} is no PRESET:N with a PRESET of {', '.join(PRESETS)}.")
    return preset, int(batch)


@pytest.fixture(scope="session")
def open_results(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str], ResultsFile]]:
    """Opens result files by name, each with the machine's ceilings; writes their tables at the end."""
    ceilings = cache(lambda: measure.ceilings(measure.default_device()))
    opened: dict[str, ResultsFile] = {}

    def opener(name: str, question: str) -> ResultsFile:
        if name not in opened:
            opened[name] = ResultsFile(name, question, ceilings(), request.config.getoption("--results"))
        return opened[name]

    yield opener
    reporter = request.config.get_terminal_writer()
    for file in opened.values():
        text = report.write_table(file.path)
        reporter.write(f"\n\n{text}\n")


@pytest.fixture(scope="session")
def measured_once(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """measured_once(file, what, tests, take, candidate): the candidate's row; measures a case once for all candidates.

    `take(keep)` measures the case and may call `keep` to write rows early. If one of `tests` fails, the benchmark fails
    and the file records the reason. A refused candidate is skipped; it fails if its row says "failed".
    """
    is_tested = request.config.getoption("--tested")
    measured: dict[str, Rows] = {}
    refused: dict[str, str] = {}

    def measure_or_refuse(file: ResultsFile, what: str, tests: tuple[str, ...], take: Take) -> None:
        red = None if is_tested else why_red(*tests)
        if red is not None:
            refused[what] = red
            file.refuse(what, red)
            return
        kept: set[str] = set()

        def keep(name: str, entry: dict[str, Any]) -> None:
            kept.add(name)
            file.keep(f"{what}, {name}", entry)

        try:
            measured[what] = take(keep)
        except Exception as error:  # raised for the first candidate; the case is not measured again for the others
            refused[what] = f"{type(error).__name__}: {error}"
            file.refuse(what, refused[what])
            raise
        for name, entry in measured[what].items():
            if name not in kept:
                keep(name, entry)

    def row(file: ResultsFile, what: str, tests: tuple[str, ...], take: Take, candidate: str) -> dict[str, Any]:
        if what not in measured and what not in refused:
            measure_or_refuse(file, what, tests, take)
        if what in refused:
            pytest.fail(f"No figure for {what}: {refused[what]}", pytrace=False)
        entry = measured[what][candidate]
        if entry.get("failed"):
            pytest.fail(f"No figure for {what}, {candidate}: {entry['refused']}", pytrace=False)
        if "refused" in entry:
            pytest.skip(entry["refused"])
        return entry

    return row
