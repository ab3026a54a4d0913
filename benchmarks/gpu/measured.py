"""Which GPU kernels may "auto" take? Writes what `make gpu` measured of them into vaebm_fast/ops/measured.json.

    python -m benchmarks measured [--results FOLDER]

A row says by how much a backend of an op or of a frozen pair is faster than plain PyTorch in the same run: the least
factor of all shapes. The factor is 0 if the backend failed at one of them, if a pair's gradient was not that of the
plain modules, or if a GPU test of its kernels was red. Rows of other GPU models stay. Rows of kernels whose code is no
longer what was measured are dropped: for these "auto" is plain PyTorch until they are measured again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.captured import EAGER
from benchmarks.environment import RESULTS
from benchmarks.gate import GPU_TESTS, REPOSITORY
from benchmarks.gpu.sources import digest
from benchmarks.results_file import Row
from benchmarks.step.pair import FROZEN
from vaebm_fast.ops._backend import GPU_BACKENDS, OP_BACKENDS, OpBackends
from vaebm_fast.ops._measured import PAIR, Measured
from vaebm_fast.runtime.files import expanded, write

TABLE = REPOSITORY / "vaebm_fast" / "ops" / "measured.json"
Subject = tuple[str, str, str]  # (op or PAIR, backend, dtype)
TF32 = "tf32"
SANITISERS = ("memcheck", "racecheck")
KERNEL_TESTS = (GPU_TESTS[0], "tests/csrc/", "tests/ops/", "tests/chain/test_noise.py")
PLAIN_BACKENDS = ("reference", "plain modules", "plain modules, autocast")


def update(old: Sequence[Measured], contents: Sequence[dict[str, Any]]) -> list[Measured]:
    """The table after these result files: their rows, and the old ones of other subjects or GPU models.

    No row is of a kernel whose code has changed since.
    """
    rows = {(row.device, row.what, row.dtype, row.backend): row for row in old if is_present(row)}
    for device in {content["environment"]["device"] for content in contents}:
        own = [content for content in contents if content["environment"]["device"] == device]
        rows |= {(device, row.what, row.dtype, row.backend): row for row in _rows_of(own)}
    return [rows[key] for key in sorted(rows)]


def _rows_of(contents: Sequence[dict[str, Any]]) -> list[Measured]:
    """The rows that follow from the result files of one GPU model. Factors are of one case in one file.

    A subject that failed in one of the files, or that a red test speaks against, has factor 0.
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
            if row.get("failed") or any(_speaks_against(what, backend, test) for test in content.get("red", ())):
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


def withdrawn(rows: Sequence[Measured], run: dict[str, Any]) -> list[Measured]:
    """The rows after a run of `make gpu`: factor 0 on its GPU model for what its red tests speak against.

    A backend with red smoke tests is not measured, so that its earlier rows, or those of another model, would stay.
    """
    ran, red = run["environment"], [test for stage in run["stages"] for test in stage.get("red", ())]
    table = {(row.device, row.what, row.dtype, row.backend): row for row in rows}
    for row in (row for row in rows if row.capability == ran.get("capability")):
        if any(_speaks_against(row.what, row.backend, test) for test in red):
            facts = {"device": ran["device"], "date": ran["date"], "commit": ran["commit"]}
            table[ran["device"], row.what, row.dtype, row.backend] = replace(row, **facts, speedup=0.0, cases=0)
    return [table[key] for key in sorted(table)]


def _speaks_against(what: str, backend: str, test: str) -> bool:
    """Whether a red test or stage is about these kernels: about one of their backends and ops, or about any.

    A stage without a red test counts if its process died, or if a sanitiser found an error; not if it was stopped.
    """
    if not test.startswith(KERNEL_TESTS):
        return (
            test.startswith("smoke")
            and "exit code" in test
            and _is_about({backend}, GPU_BACKENDS, test)
            or (test.startswith(SANITISERS) and "exit code 9" in test)
        )
    if test.startswith(GPU_TESTS[0]) and "sanitised" not in test and "frozen" not in test:
        return False  # of jobs
    used = set(OpBackends.of(backend).by_op) if what == PAIR else {what.removesuffix("_backward")}  # type: ignore[arg-type]
    ops = {op.removesuffix("_backward") for op in OP_BACKENDS}
    if "noise" in test:
        return what.startswith(("philox", "langevin")) and _is_about({backend}, GPU_BACKENDS, test)
    return _is_about({backend, *(["triton"] if what == PAIR else [])}, GPU_BACKENDS, test) and _is_about(
        used, ops, test
    )


def _is_about(used: Collection[str], names: Iterable[str], test: str) -> bool:
    """Whether the test names one of `used`, or none of `names`."""
    named = {name for name in names if name in test}
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


def record(results: Path, run: dict[str, Any] | None = None) -> None:
    """Update the table from a folder of results, and from the red tests of the run of `make gpu` that ends; print it.

    Raises ValueError if a file is no result file; the table is then unchanged.
    """
    paths = sorted([*results.glob("ops_cuda.json"), *results.glob("pair*_cuda.json")])
    before = read()
    try:
        rows = update(before, [json.loads(path.read_text()) for path in paths])
    except (ValueError, KeyError) as error:
        names = ", ".join(path.name for path in paths)
        raise ValueError(
            f"{TABLE.name} is unchanged: one of {names} in {results} is no result file ({error!r})."
        ) from error
    rows = rows if run is None else withdrawn(rows, run)
    write_rows(rows)
    for row in rows:
        taken = "" if row.speedup > 1 else "; not for auto"
        print(f"{_name(row)}: {row.speedup:.2f}x plain PyTorch ({row.device}, {row.date}){taken}")
    for name in sorted({_name(row) for row in before} - {_name(row) for row in rows}):
        print(f"{name}: dropped, because its kernel is no longer what was measured")


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
