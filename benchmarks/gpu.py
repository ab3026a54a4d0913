"""Everything that needs a GPU, most important first, within nine minutes: build, tests, sanitisers, benchmarks.

    make gpu, or: python3 -m benchmarks.gpu [--limit SECONDS] [--results FOLDER]

Builds in place with the Python that runs this. Each stage is a process with a limit of its own; one that fails or runs
out of time does not keep the next from running, except that nothing follows a failed build. gpu_run.json in the results
folder says after every stage what became of it, and what it printed last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.gate import REPOSITORY

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
SANITISED = ("-m", "gpu", "-k", "sanitised")  # cases that compute-sanitizer goes through in seconds
CASES = ("celeba_256:16", "celeba_256:64", "celeba_64:16", "cifar10:16", "celeba_256:4", "celeba_256:1")


class Stage(NamedTuple):
    """A command, and the most seconds it may take."""

    name: str
    command: Sequence[str]
    limit_s: float


def stages(results: Path) -> list[Stage]:
    """What is run, in this order."""
    kept = ("--results", str(results))
    memcheck, racecheck = (
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITISED)
        for tool in ("memcheck", "racecheck")
    )
    return [
        Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 180),
        Stage("tests", (*PYTEST, "-m", "gpu"), 120),
        Stage("memcheck", memcheck, 60),
        Stage("racecheck", racecheck, 60),
        Stage("pair", (*PYTEST, "benchmarks/bench_pair.py", *(f"--case={case}" for case in CASES), *kept), 260),
        Stage("ops", (*PYTEST, "benchmarks/bench_ops.py", *kept), 90),
    ]


def run_stages(planned: Sequence[Stage], limit_s: float, path: Path) -> list[dict[str, Any]]:
    """Run the stages until `limit_s` is over; what became of each is in `path` after every one."""
    ends = time.monotonic() + limit_s
    done: list[dict[str, Any]] = []
    for stage in planned:
        left_s = ends - time.monotonic()
        if left_s < 5:
            done.append({"stage": stage.name, "outcome": "no time left"})
        else:
            done.append({"stage": stage.name, **_run(stage, min(stage.limit_s, left_s))})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "stages": done}, indent=2) + "\n")
        print(f"{stage.name}: {done[-1]['outcome']}", flush=True)
        if stage.name == "build" and done[-1]["outcome"] != "passed":
            break
    return done


def _run(stage: Stage, limit_s: float) -> dict[str, Any]:
    """Outcome, seconds and the last lines of one stage."""
    began = time.monotonic()
    variables = {**os.environ, "VAEBM_CUDA": "1", "PYTHONPATH": str(REPOSITORY)}
    try:
        ran = subprocess.run(
            list(stage.command), cwd=REPOSITORY, env=variables, timeout=limit_s, capture_output=True, text=True
        )
        outcome, text = "passed" if ran.returncode == 0 else f"exit code {ran.returncode}", ran.stdout + ran.stderr
    except subprocess.TimeoutExpired as expired:
        outcome, text = f"stopped after {limit_s:.0f} s", _text(expired.stdout) + _text(expired.stderr)
    except FileNotFoundError:
        outcome, text = f"{stage.command[0]} is not on this machine", ""
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "last_lines": text.splitlines()[-25:]}


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def main() -> None:
    """Run all stages on the GPU at hand; exit code 1 where one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=520, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; `make gpu` needs one.")
    done = run_stages(stages(options.results), options.limit, options.results / "gpu_run.json")
    raise SystemExit(any(stage["outcome"] != "passed" for stage in done))


if __name__ == "__main__":
    main()
