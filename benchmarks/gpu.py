"""Everything that needs a GPU, most important first, within nine minutes: build, tests, benchmarks, sanitisers, tuning.

    make gpu, or: python3 -m benchmarks.gpu [--limit SECONDS] [--results FOLDER] [--stage NAME ...] [--tested]

Builds in place with the Python that runs this. Each stage is a process with a limit of its own; one that fails or runs
out of time does not keep the next from running, except those that need it: everything needs the build, and figures need
green tests. Every stage writes its results as it goes; gpu_run.json in the results folder says after each what became
of it, and what it printed last. At the end the tables of all that was measured are printed, and which of the design's
targets hold. What there was no time for goes on with --stage, and where the tests have passed just now, --tested.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.gate import REPOSITORY
from benchmarks.pair import COMPILED_BF16, FROZEN, NHWC, NHWC_BF16, PLAIN
from benchmarks.report import write_table
from benchmarks.targets import verdict

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITISED = ("-m", "gpu", "-k", "sanitised")  # cases that compute-sanitizer goes through in seconds
# The whole pair, most important first; the last stage of it may not get through all.
CASES = (
    ("celeba_256:16", "celeba_64:16", "cifar10:16", "celeba_256:1", "celeba_256:64"),
    ("celeba_256:4", "celeba_64:64", "cifar10:64", "celeba_64:4", "celeba_64:1", "cifar10:4", "cifar10:1"),
)
HALF = ("frozen, cuda, bf16", "frozen, triton, bf16")
CANDIDATES = (*HALF, PLAIN, "frozen, cuda, bf16, eager", NHWC_BF16)
OTHERS = (NHWC, *(name for name in FROZEN if name not in CANDIDATES))
COMPILED = ("celeba_64:16", "celeba_256:16")  # the one that compiles faster first


class Stage(NamedTuple):
    """A command, or what gives it when its turn comes; the most seconds it may take; what it needs to have passed."""

    name: str
    command: Sequence[str] | Callable[[], Sequence[str]]
    limit_s: float
    needs: tuple[str, ...] = ("build",)


def stages(results: Path) -> list[Stage]:
    """What is run, in this order."""
    measured = ("--tested", "--results", str(results))
    memcheck, racecheck = (
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITISED)
        for tool in ("memcheck", "racecheck")
    )

    def pair(into: str, cases: Sequence[str], candidates: Sequence[str], *options: str) -> tuple[str, ...]:
        chosen = [f"--case={case}" for case in cases] + [f"--candidate={name}" for name in candidates]
        return (*PYTEST, "benchmarks/bench_pair.py", "--into", into, *chosen, *options, *measured)

    def chain(preset: str, blocks: int, *options: str) -> Callable[[], Sequence[str]]:
        sizes = ("--batch", "16", "--blocks", str(blocks), "--rounds", "2", "--dtype", "bfloat16")
        command = (sys.executable, "-m", "benchmarks.sampling", "--preset", preset, *sizes, *options, *measured[1:])
        return lambda: (*command, "--backend", fastest_backend(results, preset))

    figures = ("build", "tests")
    compiled = (f"--compile={case}" for case in COMPILED)
    beside = (*HALF, NHWC, COMPILED_BF16)
    into = ("--no-job", "--into", "chain_celeba_256_16_bf16_compiled")
    return [
        Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 180, needs=()),
        Stage("tests", (*PYTEST, "-m", "gpu"), 150),
        Stage("pair", pair("pair", CASES[0], CANDIDATES), 120, figures),
        Stage("chain, celeba_256", chain("celeba_256", 8, "--plain"), 110, figures),
        Stage("chain, celeba_64", chain("celeba_64", 32, "--plain", "--compile"), 150, figures),
        Stage("ops", (*PYTEST, "benchmarks/bench_ops.py", *measured), 60, figures),
        Stage("memcheck", memcheck, 45),
        Stage("chain, celeba_256, torch.compile", chain("celeba_256", 8, "--compile", *into), 240, figures),
        Stage("pair, torch.compile", pair("pair_compiled", COMPILED, beside, *compiled), 300, figures),
        Stage("pair, float32", pair("pair_float32", CASES[0][:3], (*HALF, *OTHERS)), 120, figures),
        Stage("racecheck", racecheck, 60),
        Stage("pair, other sizes", pair("pair_sizes", CASES[1], CANDIDATES), 150, figures),
        Stage("tune", (sys.executable, "-m", "benchmarks.tune_triton"), 600, figures),
    ]


def fastest_backend(results: Path, preset: str) -> str:
    """The backend of the pair that was fastest in bfloat16 at N = 16, CUDA's where none was measured."""
    path = results / "pair_cuda.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    rows = [row for row in rows if (row["preset"], row["batch"]) == (preset, 16) and row["candidate"] in HALF]
    return str(min(rows, key=lambda row: row["median_s"])["backend"]) if rows else "cuda"


def chosen(planned: Sequence[Stage], names: Sequence[str], *, tested: bool) -> list[Stage]:
    """The stages of these names, all without any, after those that they need; `tested` passes for the tests.

    Raises ValueError for a name that no stage has.
    """
    unknown = sorted(set(names) - {stage.name for stage in planned})
    if unknown:
        raise ValueError(f"No stage is named {', '.join(unknown)}; there are {'; '.join(s.name for s in planned)}.")
    if tested:
        without = [stage for stage in planned if stage.name != "tests"]
        planned = [s._replace(needs=tuple(need for need in s.needs if need != "tests")) for s in without]
    asked = [stage for stage in planned if stage.name in names] if names else list(planned)
    needed = {stage.name for stage in asked} | {need for stage in asked for need in stage.needs}
    return [stage for stage in planned if stage.name in needed]


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
    command = list(stage.command() if callable(stage.command) else stage.command)
    variables = {**os.environ, "VAEBM_CUDA": "1", "PYTHONPATH": str(REPOSITORY)}
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            return {"outcome": f"{command[0]} is not on this machine", "seconds": 0.0, "last_lines": []}
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
    found = sorted(path for name in ("ops", "pair*", "chain_*") for path in results.glob(f"{name}_cuda.json"))
    return [path for path in found if path.stat().st_mtime >= began]


def main() -> None:
    """Run all stages on the GPU at hand; exit code 1 where one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=520, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this one, and what it needs")
    parser.add_argument("--tested", action="store_true", help="this build's tests passed just now: leave them out")
    options = parser.parse_args()
    try:
        planned = chosen(stages(options.results), options.stage, tested=options.tested)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; `make gpu` needs one.")
    began = time.time()
    done = run_stages(planned, options.limit, options.results / "gpu_run.json")
    for path in measured_since(began, options.results):
        print(f"\n{write_table(path)}", flush=True)
    print(f"\n{verdict(options.results)}", flush=True)
    raise SystemExit(any(stage["outcome"] != "passed" for stage in done))


if __name__ == "__main__":
    main()
