"""Which GPU kernels may "auto" take? Writes what `make gpu` measured of them into vaebm_fast/ops/measured.json.

    python -m benchmarks measured [--results FOLDER]

A row says by how much a backend of an op or of a frozen pair is faster than plain PyTorch in the same run: the least
factor of all shapes. The factor is 0 if the backend failed at one of them, or if a pair's gradient was not that of the
plain modules. Figures count if, by gpu_run.json in their folder, the smoke tests passed and the GPU tests ran to their
end with these kernels. A red test of a kernel makes its factor 0 until its stage has ended without it, and the kernel
has been measured again.

Rows of other GPU models stay. Rows of kernels whose code is no longer what was measured are dropped: there "auto" is
plain PyTorch until they are measured again. The code is that of the kernels, not of the Python and C++ around them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.captured import EAGER
from benchmarks.environment import RESULTS
from benchmarks.gate import GPU_TESTS, REPOSITORY
from benchmarks.gpu.sources import digest, digest_of_all
from benchmarks.results_file import Row
from benchmarks.step.pair import FROZEN
from vaebm_fast.ops._backend import GPU_BACKENDS, OP_BACKENDS, OpBackends
from vaebm_fast.ops._measured import PAIR, Measured
from vaebm_fast.runtime.files import expanded, write

TABLE = REPOSITORY / "vaebm_fast" / "ops" / "measured.json"
DAMAGED = (ValueError, KeyError, TypeError, AttributeError)  # of a file with other contents
Subject = tuple[str, str, str]  # (op or PAIR, backend, dtype)
TF32 = "tf32"
RUN = "gpu_run.json"  # what `make gpu` writes of its stages
SMOKE, TESTS = "smoke, {}", "tests"
SANITISERS = ("memcheck", "racecheck")
FOUND = "exit code 9"  # of a sanitiser that found an error, as `stages` asks
KERNEL_TESTS = (GPU_TESTS[0], "tests/csrc/", "tests/ops/", "tests/chain/test_noise.py")
PLAIN_BACKENDS = ("reference", "plain modules", "plain modules, autocast")


def update(old: Sequence[Measured], contents: Sequence[dict[str, Any]], run: dict[str, Any]) -> list[Measured]:
    """The table after these result files and the run of `make gpu` beside them, by its gpu_run.json.

    Rows of other subjects or GPU models stay; none is of a kernel whose code has changed since.
    """
    ran, tested = run["environment"], tested_backends(run)
    rows = {(row.device, row.what, row.dtype, row.backend): row for row in old if is_present(row)}
    own = [content for content in contents if content["environment"]["device"] == ran["device"]]
    for row in rows_of(own):
        key = row.device, row.what, row.dtype, row.backend
        before = rows.get(key, row)
        is_partial = row.cases < before.cases and row.speedup > before.speedup  # such as of a stage that was stopped
        if _kernels(row.what, row.backend)[1] <= tested and not is_partial:
            rows[key] = row
    for row in [row for row in rows.values() if row.capability == ran["capability"]]:
        if _red(row, run):  # also if another model's row held here
            facts = {"device": ran["device"], "date": ran["date"], "commit": ran["commit"]}
            rows[ran["device"], row.what, row.dtype, row.backend] = replace(row, **facts, speedup=0.0, cases=0)
    return [rows[key] for key in sorted(rows)]


def _entries(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that ran on the GPU model of the last run."""
    device = run["environment"]["device"]
    return [entry for entry in run["stages"] if entry.get("device", device) == device]


def tested_backends(run: dict[str, Any]) -> set[str]:
    """Those whose smoke tests passed with today's kernels, if the other GPU tests, too, ran to their end with them."""
    kernels = digest_of_all()
    entries = {entry["stage"]: entry for entry in _entries(run) if entry.get("kernels") == kernels}
    tests = entries.get(TESTS, {})
    seen = tests["green"] if tests.get("ended") else ()  # backends that were there when the tests ran
    return {name for name in seen if entries.get(SMOKE.format(name), {}).get("outcome") == "passed"}


def _red(row: Measured, run: dict[str, Any]) -> list[str]:
    """What is red of the row's kernels."""
    red = [test for entry in _entries(run) for test in entry.get("red", ())]
    return [test for test in red if _speaks_against(row.what, row.backend, test)]


def rows_of(contents: Sequence[dict[str, Any]]) -> list[Measured]:
    """The rows that follow from the result files of one GPU model. Factors are of one case in one file.

    A subject that failed in one of the files has factor 0.
    """
    factors: dict[Subject, list[float]] = defaultdict(list)
    least: dict[Subject, Measured] = {}
    for content in contents:
        ran = content["environment"]
        for row in (*content["results"], *content["refused"]):
            if row.get("sources") is None or row["candidate"].endswith(EAGER):  # plain PyTorch; for comparison alone
                continue
            subject = what, backend, dtype = _subject(row)
            if dtype == TF32 or row["sources"] != digest(what, backend):
                continue
            same_case = [other for other in content["results"] if _case(other) == _case(row)]
            plain_s = [other["median_s"] for other in same_case if _is_plain(other, dtype)]
            if row.get("failed"):
                factor = 0.0
            elif "median_s" in row and plain_s:
                factor = min(plain_s) / row["median_s"]
            else:  # nothing to compare with, or it did not fit into memory
                continue
            factors[subject].append(factor)
            if factor == min(factors[subject]):
                least[subject] = Measured(
                    *subject, round(factor, 2), 0, ran["device"], ran["capability"], ran["date"], ran["commit"],
                    row["sources"],
                )  # fmt: skip
    return [replace(row, cases=len(factors[subject])) for subject, row in least.items()]


def _kernels(what: str, backend: str) -> tuple[set[str], set[str]]:
    """The ops of a subject and the GPU backends that run them."""
    if what != PAIR:
        return {what.removesuffix("_backward")}, {backend}
    by_op = OpBackends.of(backend).by_op  # type: ignore[arg-type]
    return set(by_op), set(by_op.values())


def _speaks_against(what: str, backend: str, red: str) -> bool:
    """Whether a red test, or a file or stage that ended early, is about these kernels.

    It is if it names one of their backends and one of their ops, or none. A stage that was stopped, or that could not
    collect its tests, says nothing.
    """
    ops, backends = _kernels(what, backend)
    if red.startswith(("smoke", *SANITISERS)):
        code = rf"{FOUND}\b" if red.startswith(SANITISERS) else r"exit code (?![2-5]\b)"  # 2 to 5: pytest's, of no test
        return re.search(code, red) is not None and _is_about(backends, GPU_BACKENDS, red)
    file, _, test = red.partition("::")
    is_of_jobs = file == GPU_TESTS[0] and test and "sanitised" not in test and "frozen" not in test
    parameters = re.split(r"[^a-z]", test.partition("[")[2])
    is_of_plain = "reference" in parameters and not set(GPU_BACKENDS) & set(parameters)
    if not file.startswith(KERNEL_TESTS) or is_of_jobs or is_of_plain:
        return False
    if "noise" in red:
        return what.startswith(("philox", "langevin")) and _is_about(backends, GPU_BACKENDS, red)
    known = {op.removesuffix("_backward") for op in OP_BACKENDS}
    return _is_about(backends, GPU_BACKENDS, red) and _is_about(ops, known, red)


def _is_about(used: Collection[str], names: Iterable[str], red: str) -> bool:
    """Whether `red` names one of `used`, or none of `names`."""
    named = {name for name in names if name in red}
    return not named or not named.isdisjoint(used)


def _case(row: Row) -> tuple[object, ...]:
    """What rows of several backends share."""
    return row.get("op"), row.get("shape"), row.get("preset"), row["batch"] if "op" not in row else None


def _subject(row: Row) -> Subject:
    """(op or PAIR, backend, dtype); with TF32 products, which need a setting of torch, another "dtype"."""
    candidate = row["candidate"]
    if "op" in row:
        return row["op"], candidate, row["dtype"]
    backend, dtype = FROZEN.get(candidate, (candidate, torch.float32))
    return PAIR, backend, TF32 if candidate.endswith(TF32) else str(dtype).removeprefix("torch.")


def _is_plain(row: Row, dtype: str) -> bool:
    """Whether the row is plain PyTorch in this dtype or in float32, which a user without a GPU kernel might choose."""
    return row["backend"] in PLAIN_BACKENDS and row["dtype"] in (dtype, "float32")


def read() -> list[Measured]:
    """The rows of the table."""
    return [Measured(**row) for row in json.loads(TABLE.read_text(encoding="utf-8"))]


def write_rows(rows: Sequence[Measured]) -> None:
    """Write the table, one row a line."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    write(TABLE, f"[\n{lines}\n]\n" if rows else "[]\n")


def is_present(row: Measured) -> bool:
    """Whether the code of the kernels is what was measured."""
    return row.sources == digest(row.what, row.backend)


def record(results: Path) -> None:
    """Update the table from a folder of results of `make gpu`, and print it.

    Raises ValueError if gpu_run.json is missing or damaged; the table is then unchanged. Also if another file is no
    result file, after the table has been updated from the others.
    """
    if not (results / RUN).exists():
        raise ValueError(f"{TABLE.name} is unchanged: {results} has no {RUN}, which `make gpu` writes.")
    before = read()
    try:
        run = json.loads((results / RUN).read_text())
        update(before, [], run)
        tested = tested_backends(run)
    except DAMAGED as error:
        raise ValueError(f"{TABLE.name} is unchanged: {results / RUN} is damaged ({error!r}).") from error
    contents, damaged = [], []
    for path in sorted([*results.glob("ops_cuda.json"), *results.glob("pair*_cuda.json")]):
        try:
            content = json.loads(path.read_text())
            update(before, [content], run)
            contents.append(content)
        except DAMAGED as error:
            damaged.append(f"{path.name} ({error!r})")
    rows = update(before, contents, run)
    write_rows(rows)
    for backend in (name for name in GPU_BACKENDS if name not in tested):
        print(
            f"{backend}: no new rows, because its smoke tests have not passed, or the GPU tests have not run to their "
            "end, with these kernels"
        )
    for row in rows:
        taken = "" if row.speedup > 1 else "; not for auto"
        if row.device == run["environment"]["device"]:
            taken += "".join(f"; red: {test}" for test in _red(row, run)[:1])
        print(f"{_name(row)}: {row.speedup:.2f}x plain PyTorch ({row.device}, {row.date}){taken}")
    for name in sorted({_name(row) for row in before} - {_name(row) for row in rows}):
        print(f"{name}: dropped, because its kernel is no longer what was measured")
    if damaged:
        raise ValueError(f"{TABLE.name} has no figures of {', '.join(damaged)} in {results}: no result file.")


def main(arguments: Sequence[str]) -> int:
    """Update the table from a folder of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=expanded, default=RESULTS)
    results = parser.parse_args(arguments).results
    if not results.is_dir():
        parser.error(f"There is no folder {results}.")
    try:
        record(results)
    except ValueError as error:
        parser.error(str(error))
    return 0


def _name(row: Measured) -> str:
    return f"{row.what}, {row.backend}, {row.dtype}"
