"""Everything that needs a GPU, most important first, within nine minutes: build, tests, benchmarks, sanitisers, tuning.

    make gpu, or: python3 -m benchmarks.gpu [--limit SECONDS] [--results FOLDER]

Builds in place with the Python that runs this. Each stage is a process with a limit of its own; one that fails or runs
out of time does not keep the next from running, except those that need it: everything needs the build, and figures need
green tests. Every stage writes its results as it goes; gpu_run.json in the results folder says after each what became
of it, and what it printed last. At the end the tables of all that was measured are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.gate import REPOSITORY
from benchmarks.report import write_table

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITISED = ("-m", "gpu", "-k", "sanitised")  # cases that compute-sanitizer goes through in seconds
# The whole pair, most important first; the last stage of it may not get through all.
CASES = (
    ("celeba_256:16", "celeba_64:16", "cifar10:16", "celeba_256:64", "celeba_256:1"),
    ("celeba_256:4", "celeba_64:64", "cifar10:64", "celeba_64:4", "celeba_64:1", "cifar10:4", "cifar10:1"),
)
COMPILED = ("celeba_64:16", "celeba_256:16")  # the one that compiles faster first


class Stage(NamedTuple):
    """A command, the most seconds it may take, and the stages without whose success it is not run."""

    name: str
    command: Sequence[str]
    limit_s: float
    needs: tuple[str, ...] = ("build",)


def stages(results: Path) -> list[Stage]:
    """What is run, in this order."""
    measured = ("--tested", "--results", str(results))
    memcheck, racecheck = (
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITISED)
        for tool in ("memcheck", "racecheck")
    )

    def pair(into: str, cases: Sequence[str], *options: str) -> tuple[str, ...]:
        chosen = (f"--case={case}" for case in cases)
        return (*PYTEST, "benchmarks/bench_pair.py", "--into", into, *chosen, *options, *measured)

    figures = ("build", "tests")
    compiled = (f"--compile={case}" for case in COMPILED)
    return [
        Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 180, needs=()),
        Stage("tests", (*PYTEST, "-m", "gpu"), 150),
        Stage("pair", pair("pair", CASES[0]), 150, figures),
        Stage("ops", (*PYTEST, "benchmarks/bench_ops.py", *measured), 60, figures),
        Stage("memcheck", memcheck, 45),
        Stage("pair, torch.compile", pair("pair_compiled", COMPILED, *compiled), 240, figures),
        Stage("racecheck", racecheck, 60),
        Stage("pair, other sizes", pair("pair_sizes", CASES[1]), 120, figures),
        Stage("tune", (sys.executable, "-m", "benchmarks.tune_triton"), 600, figures),
    ]


def run_stages(planned: Sequence[Stage], limit_s: float, path: Path) -> list[dict[str, Any]]:
    """Run the stages until `limit_s` is over; what became of each is in `path` after every one."""
    ends = time.monotonic() + limit_s
    done: list[dict[str, Any]] = []
    for stage in planned:
        left_s = ends - time.monotonic()
        passed = {entry["stage"] for entry in done if entry["outcome"] == "passed"}
        missing = [name for name in stage.needs if name not in passed]
        if missing:
            done.append({"stage": stage.name, "outcome": f"not run: it needs {' and '.join(missing)}"})
        elif left_s < 5:
            done.append({"stage": stage.name, "outcome": "no time left"})
        else:
            done.append({"stage": stage.name, **_run(stage, min(stage.limit_s, left_s))})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "stages": done}, indent=2) + "\n")
        print(f"{stage.name}: {done[-1]['outcome']}", flush=True)
    return done


def _run(stage: Stage, limit_s: float) -> dict[str, Any]:
    """Outcome, seconds and the last lines of one stage."""
    began = time.monotonic()
    variables = {**os.environ, "VAEBM_CUDA": "1", "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                list(stage.command),
                cwd=REPOSITORY,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            return {"outcome": f"{stage.command[0]} is not on this machine", "seconds": 0.0, "last_lines": []}
        try:
            code = process.wait(limit_s)
            outcome = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # compilers and what a sanitiser started go with it
            process.wait()
            outcome = f"stopped after {limit_s:.0f} s"
        output.seek(0)
        last_lines = output.read().splitlines()[-25:]
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "last_lines": last_lines}


def measured_since(began: float, results: Path) -> list[Path]:
    """The result files in `results` that a stage has written since `began` (time.time())."""
    found = sorted([*results.glob("pair*_cuda.json"), *results.glob("ops_cuda.json")])
    return [path for path in found if path.stat().st_mtime >= began]


def main() -> None:
    """Run all stages on the GPU at hand; exit code 1 where one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=520, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; `make gpu` needs one.")
    began = time.time()
    done = run_stages(stages(options.results), options.limit, options.results / "gpu_run.json")
    for path in measured_since(began, options.results):
        print(f"\n{write_table(path)}", flush=True)
    raise SystemExit(any(stage["outcome"] != "passed" for stage in done))


if __name__ == "__main__":
    main()
