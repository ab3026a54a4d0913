"""Everything that needs a GPU, most important first, within nine minutes: build, tests, benchmarks, sanitisers, tuning.

    make gpu, or: python3 -m benchmarks.gpu [--limit SECONDS] [--results FOLDER] [--stage NAME ...] [--tested]

Builds in place with the Python that runs this. Each stage is a process with a limit of its own; one that fails or runs
out of time does not keep the next from running, except those that need it: everything needs the build, and figures need
green tests. Where those of the CUDA kernels alone are not green, figures are taken without these kernels. Every stage
writes its results as it goes; gpu_run.json in the results folder says after each what became of it, and what it printed
last. At the end the tables of all that was measured are printed, and which of the design's targets hold. What there was
no time for goes on with --stage, and where the tests have passed just now, --tested.
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
OF_CUDA = "tests, cuda"
TESTS = ("tests", OF_CUDA)
COMPILED = ("celeba_64:16", "celeba_256:16")  # the one that compiles faster first

Command = Sequence[str]


class Stage(NamedTuple):
    """A command, or what gives it for the stages that passed; the most seconds it may take.

    needs: the stages without whose success it is not run. uses: one without whose success `without` is added.
    """

    name: str
    command: Command | Callable[[set[str]], Command]
    limit_s: float
    needs: tuple[str, ...] = ("build",)
    uses: str | None = None
    without: Command = ()

    def words(self, passed: set[str]) -> list[str]:
        """What is run where these have passed."""
        command = self.command(passed) if callable(self.command) else self.command
        return [*command, *(self.without if self.uses is not None and self.uses not in passed else ())]


def stages(results: Path) -> list[Stage]:
    """What is run, in this order."""
    into = ("--results", str(results))
    memcheck, racecheck = (
        ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, *SANITISED)
        for tool in ("memcheck", "racecheck")
    )

    def figures(name: str, limit_s: float, *command: str) -> Stage:
        words = (*PYTEST, *command, "--tested", *into)
        return Stage(name, words, limit_s, ("build", "tests"), OF_CUDA, ("--without", "cuda"))

    def pair(
        name: str, limit_s: float, file: str, cases: Sequence[str], candidates: Sequence[str], *options: str
    ) -> Stage:
        chosen = [f"--case={case}" for case in cases] + [f"--candidate={name}" for name in candidates]
        return figures(name, limit_s, "benchmarks/bench_pair.py", "--into", file, *chosen, *options)

    def chain(name: str, limit_s: float, preset: str, blocks: int, *options: str) -> Stage:
        sizes = ("--batch", "16", "--blocks", str(blocks), "--rounds", "2", "--dtype", "bfloat16")
        command = (sys.executable, "-m", "benchmarks.sampling", "--preset", preset, *sizes, *options, *into)

        def on_the_fastest(passed: set[str]) -> Command:
            return (*command, "--backend", fastest_backend(results, preset, None if OF_CUDA in passed else "cuda"))

        return Stage(name, on_the_fastest, limit_s, ("build", "tests"), OF_CUDA)

    compiled = (f"--compile={case}" for case in COMPILED)
    beside = (*HALF, NHWC, COMPILED_BF16)
    chain_alone = ("--compile", "--no-job", "--into", "chain_celeba_256_16_bf16_compiled")
    return [
        Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 180, needs=()),
        Stage("tests", (*PYTEST, "-m", "gpu", "-k", "not cuda"), 120),
        Stage(OF_CUDA, (*PYTEST, "-m", "gpu", "-k", "cuda"), 90),
        pair("pair", 120, "pair", CASES[0], CANDIDATES),
        chain("chain, celeba_256", 110, "celeba_256", 16, "--plain"),
        chain("chain, celeba_64", 150, "celeba_64", 96, "--plain", "--compile"),
        figures("ops", 60, "benchmarks/bench_ops.py"),
        Stage("memcheck", memcheck, 45),
        chain("chain, celeba_256, torch.compile", 240, "celeba_256", 8, *chain_alone),
        pair("pair, torch.compile", 300, "pair_compiled", COMPILED, beside, *compiled),
        pair("pair, float32", 120, "pair_float32", CASES[0][:3], (*HALF, *OTHERS)),
        Stage("racecheck", racecheck, 60),
        pair("pair, other sizes", 150, "pair_sizes", CASES[1], CANDIDATES),
        Stage("tune", (sys.executable, "-m", "benchmarks.tune_triton"), 600, ("build", "tests")),
    ]


def fastest_backend(results: Path, preset: str, without: str | None = None) -> str:
    """The backend of the pair that was fastest in bfloat16 at N = 16; where none was measured, the best by design."""
    path = results / "pair_cuda.json"
    rows = json.loads(path.read_text())["results"] if path.exists() else []
    rows = [row for row in rows if (row["preset"], row["batch"]) == (preset, 16) and row["candidate"] in HALF]
    rows = [row for row in rows if row["backend"] != without]
    if not rows:
        return "triton" if without == "cuda" else "cuda"
    return str(min(rows, key=lambda row: float(row["median_s"]))["backend"])


def chosen(planned: Sequence[Stage], names: Sequence[str], *, tested: bool) -> list[Stage]:
    """The stages of these names, all without any, after those that they need or use; `tested` stands for all tests.

    Raises ValueError for a name that no stage has.
    """
    unknown = sorted(set(names) - {stage.name for stage in planned})
    if unknown:
        raise ValueError(f"No stage is named {', '.join(unknown)}; there are {'; '.join(s.name for s in planned)}.")
    asked = [stage for stage in planned if stage.name in names] if names else list(planned)
    wanted = {name for stage in asked for name in (stage.name, *stage.needs, stage.uses)}
    return [stage for stage in planned if stage.name in wanted and not (tested and stage.name in TESTS)]


def run_stages(
    planned: Sequence[Stage], limit_s: float, path: Path, passed_before: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run the stages until `limit_s` is over; what became of each is in `path` after every one."""
    ends = time.monotonic() + limit_s
    done: list[dict[str, Any]] = []
    for stage in planned:
        left_s = ends - time.monotonic()
        passed = {*passed_before, *(entry["stage"] for entry in done if entry["outcome"] == "passed")}
        missing = [name for name in stage.needs if name not in passed]
        if missing:
            done.append({"stage": stage.name, "outcome": f"not run: it needs {' and '.join(missing)}"})
        elif left_s < 5:
            done.append({"stage": stage.name, "outcome": "no time left"})
        else:
            done.append({"stage": stage.name, **_run(stage, passed, min(stage.limit_s, left_s))})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"environment": environment(), "stages": done}, indent=2) + "\n")
        print(f"{stage.name}: {done[-1]['outcome']}", flush=True)
    return done


def _run(stage: Stage, passed: set[str], limit_s: float) -> dict[str, Any]:
    """Outcome, seconds and the last lines of one stage."""
    began = time.monotonic()
    command = stage.words(passed)
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
    done = run_stages(planned, options.limit, options.results / "gpu_run.json", TESTS if options.tested else ())
    for path in measured_since(began, options.results):
        print(f"\n{write_table(path)}", flush=True)
    print(f"\n{verdict(options.results)}", flush=True)
    raise SystemExit(any(stage["outcome"] != "passed" for stage in done))


if __name__ == "__main__":
    main()
