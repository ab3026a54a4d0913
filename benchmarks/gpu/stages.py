"""What holds on this GPU, and how fast? Build, smoke tests, figures, tests and tuning within nine minutes.

    make gpu, or: python3 -m benchmarks gpu [--budget SECONDS] [--results FOLDER] [--logs FOLDER] [--stage NAME ...]

Builds in place with the Python that runs this. Each stage is a process with a time limit; only a failed build stops the
others. Smoke tests run every op of a backend once: a backend whose smoke tests fail is not measured. A pair or chain is
timed only after its gradient has agreed with the plain modules'. Other failing tests are reported and withhold nothing.
Every stage writes its results as it goes; gpu_run.json in the results folder records the outcome of each stage, the
logs folder its output. At the end it prints the measured tables and which of the design's targets hold. --stage runs
what a budget left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.gate import REPOSITORY
from benchmarks.gpu.targets import verdict
from benchmarks.report import NHWC, PLAIN, write_table
from benchmarks.step.pair import COMPILED_BF16, FROZEN, NHWC_BF16
from vaebm_fast.runtime.files import expanded, write

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
BENCHMARK = (sys.executable, "-m", "benchmarks")
PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()  # compiling kernels takes most of the time
SMOKE = ("-m", "gpu", "tests/test_gpu.py", "-k")
SANITISED = (*SMOKE, "sanitised")  # cases that take seconds under compute-sanitizer
LOGS = REPOSITORY / "build" / "gpu_logs"
# Cases of the pair, most important first; the last stage may not finish all.
CASES = (
    ("celeba_256:16", "celeba_64:16", "cifar10:16", "celeba_256:1", "celeba_256:64"),
    ("celeba_256:4", "celeba_64:64", "cifar10:64", "celeba_64:4", "celeba_64:1", "cifar10:4", "cifar10:1"),
)
HALF = ("frozen, cuda, bf16", "frozen, triton, bf16")
CANDIDATES = (*HALF, PLAIN, "frozen, cuda, bf16, eager", NHWC_BF16)
OTHERS = (NHWC, *(name for name in FROZEN if name not in CANDIDATES))
SMOKE_OF = {backend: f"smoke, {backend}" for backend in ("triton", "cuda")}
NEEDED_BY = {"triton": ("triton",), "cuda": ("triton", "cuda")}  # a pair on "cuda" uses kernels of both
COMPILED = ("celeba_64:16", "celeba_256:16")  # fastest to compile first

Command = Sequence[str]


class Stage(NamedTuple):
    """`command(sound)` is the command line, given the backends that may be measured; limit_s: its time limit.

    needs: stages that must have passed.
    """

    name: str
    command: Callable[[Collection[str]], Command]
    limit_s: float
    needs: tuple[str, ...] = ("build",)


def stages(results: Path) -> list[Stage]:
    """All stages in order."""
    into = ("--results", str(results))

    def fixed(name: str, limit_s: float, *command: str, needs: tuple[str, ...] = ("build",)) -> Stage:
        return Stage(name, lambda sound: command, limit_s, needs)

    def figures(name: str, limit_s: float, *command: str) -> Stage:
        def without_unsound(sound: Collection[str]) -> Command:
            left_out = (backend for backend in SMOKE_OF if backend not in sound)
            return (*BENCHMARK, *command, "--tested", *into, *(f"--without={backend}" for backend in left_out))

        return Stage(name, without_unsound, limit_s)

    def pair(
        name: str, limit_s: float, file: str, cases: Sequence[str], candidates: Sequence[str], *options: str
    ) -> Stage:
        chosen = [f"--case={case}" for case in cases] + [f"--candidate={name}" for name in candidates]
        return figures(name, limit_s, "pair", "--into", file, *chosen, *options)

    def profile(backend: str) -> Stage:
        command = (*BENCHMARK, "profile", "celeba_256", "16", backend, *into)
        return fixed(f"profile, {backend}", 60, *command, needs=("build", SMOKE_OF[backend]))

    def chain(name: str, limit_s: float, preset: str, blocks: int, *options: str) -> Stage:
        sizes = ("--batch", "16", "--blocks", str(blocks), "--rounds", "2", "--dtype", "bfloat16")
        command = (*BENCHMARK, "chains", "--preset", preset, *sizes, *options, *into)
        return Stage(name, lambda sound: (*command, "--backend", fastest_backend(results, preset, sound)), limit_s)

    def sanitiser(tool: str, limit_s: float) -> Stage:
        uncached = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")  # separate allocations, so that overruns are seen
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITISED)
        return fixed(tool, limit_s, *uncached, *command)

    compiled = (f"--compile={case}" for case in COMPILED)
    beside = (*HALF, NHWC, COMPILED_BF16)
    chain_alone = ("--compile", "--no-job", "--into", "chain_celeba_256_16_bf16_compiled")
    return [
        fixed("build", 180, sys.executable, "setup.py", "build_ext", "--inplace", needs=()),
        *(fixed(SMOKE_OF[name], 60, *PYTEST, *PARALLEL, *SMOKE, f"sanitised and {name}") for name in SMOKE_OF),
        pair("pair", 130, "pair", CASES[0][:1], CANDIDATES),
        profile("cuda"),
        profile("triton"),
        chain("chain, celeba_256", 60, "celeba_256", 4, "--plain"),
        fixed("tests", 120, *PYTEST, *PARALLEL, "-m", "gpu", "tests", "-k", "not sanitised"),
        chain("chain, celeba_64", 150, "celeba_64", 16, "--plain", "--compile"),
        pair("pair, other presets", 90, "pair_presets", CASES[0][1:], CANDIDATES),
        figures("ops", 60, "ops"),
        sanitiser("memcheck", 45),
        chain("chain, celeba_256, torch.compile", 240, "celeba_256", 2, *chain_alone),
        pair("pair, torch.compile", 300, "pair_compiled", COMPILED, beside, *compiled),
        pair("pair, float32", 120, "pair_float32", CASES[0][:3], (*HALF, *OTHERS)),
        sanitiser("racecheck", 60),
        pair("pair, other sizes", 150, "pair_sizes", CASES[1], CANDIDATES),
        fixed("training", 150, *BENCHMARK, "training", "--preset", "celeba_64", "--batch", "16", *into),
        fixed("tune", 600, *BENCHMARK, "tune"),
    ]


def fastest_backend(results: Path, preset: str, sound: Collection[str]) -> str:
    """The backend in `sound` whose pair was fastest in bfloat16 at N = 16.

    If none was measured, "cuda" before "triton"; if none is sound, "reference".
    """
    paths = [path for name in ("pair", "pair_presets") if (path := results / f"{name}_cuda.json").exists()]
    rows = [row for path in paths for row in json.loads(path.read_text())["results"]]
    rows = [row for row in rows if (row["preset"], row["batch"]) == (preset, 16) and row["candidate"] in HALF]
    rows = [row for row in rows if row["backend"] in sound]
    if rows:
        return str(min(rows, key=lambda row: float(row["median_s"]))["backend"])
    return next((backend for backend in ("cuda", "triton") if backend in sound), "reference")


def chosen(planned: Sequence[Stage], names: Sequence[str]) -> list[Stage]:
    """The build, the smoke tests, then the named stages (all if no name is given).

    Raises ValueError for an unknown name.
    """
    unknown = sorted(set(names) - {stage.name for stage in planned})
    if unknown:
        raise ValueError(f"No stage is named {', '.join(unknown)}; there are {'; '.join(s.name for s in planned)}.")
    always = {"build", *SMOKE_OF.values()}
    return [stage for stage in planned if not names or stage.name in always or stage.name in names]


def run_stages(planned: Sequence[Stage], budget_s: float, path: Path, logs: Path = LOGS) -> list[dict[str, Any]]:
    """Run the stages until `budget_s` has passed; writes outcomes to `path` after every stage."""
    ends = time.monotonic() + budget_s
    done: list[dict[str, Any]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    for stage in planned:
        left_s = ends - time.monotonic()
        passed = {entry["stage"] for entry in done if entry["outcome"] == "passed"}
        missing = [name for name in stage.needs if name not in passed]
        if missing:
            done.append({"stage": stage.name, "outcome": f"not run: it needs {' and '.join(missing)}"})
        elif left_s < 5:
            done.append({"stage": stage.name, "outcome": "no time left"})
        else:
            sound = [name for name, needed in NEEDED_BY.items() if all(SMOKE_OF[other] in passed for other in needed)]
            log = logs / f"{stage.name.replace(', ', '_').replace(' ', '_')}.log"
            done.append({"stage": stage.name, **_run(stage.command(sound), min(stage.limit_s, left_s), log)})
        write(path, json.dumps({"environment": environment(), "stages": done}, indent=2) + "\n")
        print(f"{stage.name}: {done[-1]['outcome']}, {done[-1].get('seconds', 0):.0f} s", flush=True)
    return done


def _run(command: Command, limit_s: float, log: Path) -> dict[str, Any]:
    """Run one stage with its output in `log`; returns outcome, seconds and last lines."""
    began = time.monotonic()
    variables = {**os.environ, "VAEBM_CUDA": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with log.open("w", errors="replace") as output:
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
            os.killpg(process.pid, signal.SIGKILL)  # also kills compilers and a sanitiser's children
            process.wait()
            outcome = f"stopped after {limit_s:.0f} s"
    last_lines = log.read_text(errors="replace").splitlines()[-25:]
    return {"outcome": outcome, "seconds": round(time.monotonic() - began, 1), "last_lines": last_lines}


def measured_since(began: float, results: Path) -> list[Path]:
    """The result files in `results` written since `began` (time.time())."""
    found = sorted(
        path for name in ("ops", "pair*", "chain_*", "training") for path in results.glob(f"{name}_cuda.json")
    )
    return [path for path in found if path.stat().st_mtime >= began]


def main(arguments: Sequence[str]) -> int:
    """Run all stages on the GPU at hand; exit code 1 if one did not pass."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=500, metavar="SECONDS")
    parser.add_argument("--results", type=expanded, default=RESULTS)
    parser.add_argument("--logs", type=expanded, default=LOGS)
    parser.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this one, and what it needs")
    options = parser.parse_args(arguments)
    try:
        planned = chosen(stages(options.results), options.stage)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; `make gpu` needs one.")
    began = time.time()
    done = run_stages(planned, options.budget, options.results / "gpu_run.json", options.logs)
    for path in measured_since(began, options.results):
        print(f"\n{write_table(path)}", flush=True)
    print(f"\n{verdict(options.results)}", flush=True)
    return int(any(stage["outcome"] != "passed" for stage in done))
