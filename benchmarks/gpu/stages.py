"""What holds on this GPU, and how fast? Build, smoke tests, figures, tests and tuning within nine minutes.

    make gpu, or: python3 -m benchmarks gpu [--budget SECONDS] [--results FOLDER] [--logs FOLDER] [--stage NAME] ...

Runs with the Python at hand, in place. Each stage is a process with a time limit, and says beforehand what it takes.
Smoke tests run every op of a backend once: a backend that was not built, or whose smoke tests fail, is not measured.
Nothing else stops a later stage: a pair or chain is timed once its own gradient has agreed with the plain modules', and
other red tests only mark the tables. By the estimates the stages up to `tune` fit the default budget. A smaller one
cuts from the end; --stage runs what was cut, and what stands behind `tune`. `pair` and `ops` bring `tests` along,
without which their figures decide nothing.

Every stage writes its results as it goes; gpu_run.json in the results folder records the outcome of each, the logs
folder its output. At the end come the measured tables, which of the design's targets hold, and the table by which
backend="auto" decides (`measured`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.environment import RESULTS, environment
from benchmarks.gate import REPOSITORY
from benchmarks.gpu import measured
from benchmarks.gpu.kit import TRITON_CACHE
from benchmarks.gpu.measured import FOUND, RUN, SMOKE, TESTS
from benchmarks.gpu.sources import digest_of_all
from benchmarks.gpu.targets import verdict
from benchmarks.gpu.tests import LOGS, PYTEST, red_tests
from benchmarks.report import NHWC, PLAIN, write_table
from benchmarks.results_file import as_text
from benchmarks.step.pair import COMPILED_BF16, FROZEN, NHWC_BF16
from vaebm_fast.runtime.files import expanded, write

BENCHMARK = (sys.executable, "-m", "benchmarks")
PARALLEL = ("-n", "8") if importlib.util.find_spec("xdist") else ()
SMALL = ("-m", "gpu", "tests/test_gpu.py", "-k")
# Kernels with barriers, in shapes that take seconds under racecheck.
RACES = (
    "sanitised and (inverted_residual and 1x32x18x18 or power_iteration and 2x37x140 or se_gate_residual and 2x40x9x9"
    " or energy_head and 2x17x9x9 or pointwise and 2x20x7x7)"
)
BUDGET_S = 500.0
# Outcomes, beside "passed", "exit code N" and "stopped after N s".
NO_TIME, NOT_RUN, ALL_SKIPPED = "no time left", "not run", "every test was skipped"
FAILED = ("exit code", "stopped", ALL_SKIPPED)
# Modules that stages import, without which their time would be spent on errors; Triton may be missing.
NEEDED = ("numpy", "safetensors", "PIL", "tqdm", "pytest", "pytest_benchmark")
# Cases of the pair, most important first; the last stage may not finish all.
CASES = (
    ("celeba_256:16", "celeba_64:16", "cifar10:16", "celeba_256:1", "celeba_256:64"),
    ("celeba_256:4", "celeba_64:64", "cifar10:64", "celeba_64:4", "celeba_64:1", "cifar10:4", "cifar10:1"),
)
HALF = ("frozen, triton, bf16", "frozen, cuda, bf16")
# In the order of running: a kernel that ends the process takes no figure of plain PyTorch with it.
CANDIDATES = (PLAIN, NHWC_BF16, "frozen, reference, bf16", *HALF, "frozen, cuda, bf16, eager")
OTHERS = (NHWC, *(name for name in FROZEN if name not in CANDIDATES))
SMOKE_OF = {backend: SMOKE.format(backend) for backend in ("triton", "cuda")}
CHECKS = (TESTS, *SMOKE_OF.values(), *measured.SANITISERS)  # stages of tests
NEEDED_BY = {"triton": ("triton",), "cuda": ("triton", "cuda")}  # a pair on "cuda" uses kernels of both
COMPILED = ("celeba_64:16", "celeba_256:16")  # fastest to compile first

Command = Sequence[str]


class Stage(NamedTuple):
    """`command(green)` is the command line, given the backends whose smoke tests have passed.

    takes_s: an estimate, from the times of an H200 where they are known; limit_s: when it is stopped.
    needs: stages that must have passed. variables: of its environment, beside those of all.
    """

    name: str
    takes_s: float
    limit_s: float
    command: Callable[[Collection[str]], Command]
    needs: tuple[str, ...] = ()
    variables: Mapping[str, str] = MappingProxyType({})


def stages(results: Path, logs: Path = LOGS) -> list[Stage]:
    """All stages in order, the most important first; those up to `tune` take BUDGET_S."""
    into = ("--results", str(results))

    def fixed(name: str, takes_s: float, limit_s: float, *command: str, needs: tuple[str, ...] = ()) -> Stage:
        return Stage(name, takes_s, limit_s, lambda green: command, needs)

    def figures(name: str, takes_s: float, limit_s: float, *command: str) -> Stage:
        def without_unsound(green: Collection[str]) -> Command:
            sound = green if command[0] == "ops" else sound_pairs(green)
            left_out = (backend for backend in SMOKE_OF if backend not in sound)
            return (*BENCHMARK, *command, "--tested", *into, *(f"--without={backend}" for backend in left_out))

        return Stage(name, takes_s, limit_s, without_unsound)

    def smoke(backend: str, takes_s: float, *needs: str) -> Stage:
        command = (*PYTEST, *PARALLEL, *SMALL, f"sanitised and {backend}")
        return fixed(SMOKE_OF[backend], takes_s, 60, *command, needs=needs)

    def pair(
        name: str, takes_s: float, limit_s: float, file: str, cases: Sequence[str], candidates: Sequence[str],
        *options: str,
    ) -> Stage:  # fmt: skip
        chosen = [f"--case={case}" for case in cases] + [f"--candidate={name}" for name in candidates]
        return figures(name, takes_s, limit_s, "pair", "--into", file, *chosen, *options)

    def profile(backend: str) -> Stage:
        command = (*BENCHMARK, "profile", "celeba_256", "16", backend, *into)
        return fixed(
            f"profile, {backend}", 15, 60, *command, needs=tuple(SMOKE_OF[name] for name in NEEDED_BY[backend])
        )

    def chain(name: str, takes_s: float, limit_s: float, preset: str, blocks: int, *options: str) -> Stage:
        sizes = ("--batch", "16", "--blocks", str(blocks), "--rounds", "2", "--dtype", "bfloat16")
        command = (*BENCHMARK, "chains", "--preset", preset, *sizes, *options, *into)
        return Stage(
            name,
            takes_s,
            limit_s,
            lambda green: (*command, "--backend", fastest_backend(results, preset, sound_pairs(green))),
        )

    def sanitiser(tool: str, takes_s: float, limit_s: float, cases: str) -> Stage:
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # separate allocations, so that overruns are seen
        command = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            FOUND.rpartition(" ")[2],
            *PYTEST,
            *SMALL,
            cases,
        )
        return Stage(tool, takes_s, limit_s, lambda green: command, variables=uncached)

    compiled = (f"--compile={case}" for case in COMPILED)
    beside = (*HALF, NHWC, COMPILED_BF16)
    chain_alone = ("--compile", "--no-job", "--into", "chain_celeba_256_16_bf16_compiled")
    return [
        fixed("build", 25, 180, *BENCHMARK, "kit", "install"),
        fixed("kernels", 25, 60, *BENCHMARK, "precompile"),
        smoke("triton", 12),
        smoke("cuda", 10, "build"),
        pair("pair", 55, 130, "pair", CASES[0][:1], CANDIDATES),
        profile("cuda"),
        profile("triton"),
        fixed(TESTS, 55, 250, *BENCHMARK, "tests", "--logs", str(logs)),
        chain("chain, celeba_256", 35, 70, "celeba_256", 4, "--plain", "--no-job"),
        chain("chain, celeba_64", 150, 200, "celeba_64", 16, "--plain", "--compile"),
        figures("ops", 20, 60, "ops"),
        sanitiser("memcheck", 12, 45, "sanitised"),
        sanitiser("racecheck", 15, 45, RACES),
        fixed("tune", 55, 600, *BENCHMARK, "tune"),
        # what there is no time for in a first run
        pair("pair, other presets", 60, 120, "pair_presets", CASES[0][1:], CANDIDATES),
        pair("pair, float32", 60, 120, "pair_float32", CASES[0][:3], (*HALF, *OTHERS)),
        chain("chain, celeba_256, with a job", 90, 150, "celeba_256", 4, "--plain"),
        chain("chain, celeba_256, torch.compile", 200, 240, "celeba_256", 2, *chain_alone),
        pair("pair, torch.compile", 250, 300, "pair_compiled", COMPILED, beside, *compiled),
        pair("pair, other sizes", 100, 150, "pair_sizes", CASES[1], CANDIDATES),
        fixed("training", 100, 150, *BENCHMARK, "training", "--preset", "celeba_64", "--batch", "16", *into),
    ]


def sound_pairs(green: Collection[str]) -> list[str]:
    """The backends of pairs that may be measured, given those whose smoke tests have passed."""
    return [name for name, needed in NEEDED_BY.items() if set(needed) <= set(green)]


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
    """The build, the kernels, the smoke tests, then the named stages (all if no name is given).

    With pairs or ops all GPU tests, too. Raises ValueError for an unknown name.
    """
    unknown = sorted(set(names) - {stage.name for stage in planned})
    if unknown:
        raise ValueError(f"No stage is named {', '.join(unknown)}; there are {'; '.join(s.name for s in planned)}.")
    decide = any(name.startswith(("pair", "ops")) for name in names)
    always = {"build", "kernels", *SMOKE_OF.values(), *([TESTS] if decide else [])}
    return [stage for stage in planned if not names or stage.name in always or stage.name in names]


def run_stages(planned: Sequence[Stage], budget_s: float, path: Path, logs: Path = LOGS) -> list[dict[str, Any]]:
    """Run the stages until `budget_s` has passed; writes outcomes to `path` after every stage.

    What `path` says of stages that do not run now, or of other GPUs, stays there; so does what was red in a stage that
    does not run to its end now.
    """
    ends = time.monotonic() + budget_s
    done: list[dict[str, Any]] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    logs.mkdir(parents=True, exist_ok=True)
    here = environment()
    ran = {**{fact: here[fact] for fact in ("device", "commit", "date")}, "kernels": digest_of_all()}
    recorded = _entries(path)
    for stage in planned:
        left_s = ends - time.monotonic()
        passed = {entry["stage"] for entry in done if entry["outcome"] == "passed"}
        missing = [name for name in stage.needs if name not in passed]
        if missing:
            done.append({"stage": stage.name, "outcome": f"{NOT_RUN}: it needs {' and '.join(missing)}"})
        elif left_s < 5:
            done.append({"stage": stage.name, "outcome": NO_TIME})
        else:
            green = [name for name, stage_name in SMOKE_OF.items() if stage_name in passed]
            log = logs / f"{stage.name.replace(', ', '_').replace(' ', '_')}.log"
            limit_s = min(stage.limit_s, left_s)
            print(f"{stage.name}: about {stage.takes_s:.0f} s, at most {limit_s:.0f} of {left_s:.0f} s", flush=True)
            found = _run(stage.command(green), stage.variables, limit_s, log)
            if found["outcome"].startswith("stopped") and limit_s < stage.limit_s:
                found["outcome"] = f"{NO_TIME}, {found['outcome']}"
            if stage.name in CHECKS:
                found = _judged(stage.name, found, recorded.get((here["device"], stage.name), {}).get("red", ()))
            done.append({"stage": stage.name, **ran, "green": green, **found})
        if "seconds" in done[-1]:
            recorded[here["device"], stage.name] = done[-1]
        others = [entry for entry in done if (here["device"], entry["stage"]) not in recorded]
        write(path, json.dumps({"environment": here, "stages": [*recorded.values(), *others]}, indent=2) + "\n")
        print(f"{stage.name}: {done[-1]['outcome']}, {done[-1].get('seconds', 0):.0f} s", flush=True)
        if done[-1]["outcome"].startswith(FAILED):
            print("\n".join(f"  {line}" for line in (*done[-1]["last_lines"][-1:], f"see {log}")), flush=True)
        if stage.name == "build":
            print("\n".join(f"  {line}" for line in done[-1].get("last_lines", ())[:1]), flush=True)
        for test in done[-1].get("red", ()):
            print(f"  red: {test}", flush=True)
    return done


def _entries(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What earlier runs found, by GPU model and stage."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text())
    device = content["environment"]["device"]
    return {(entry.get("device", device), entry["stage"]): entry for entry in content["stages"] if "seconds" in entry}


def _judged(name: str, found: dict[str, Any], red_before: Collection[str]) -> dict[str, Any]:
    """The outcome of a stage of tests, with what is red, and whether it has ended: has run all its tests.

    As a whole it is red if it failed and its log names no test, or if a sanitiser has found an error, which need not be
    that of a red test. If it has not ended, what was red before still counts.
    """
    outcome, red = found["outcome"], found.get("red", [])
    summary = "\n".join(found.get("last_lines", ()))
    if name in SMOKE_OF.values() and outcome == "passed" and not re.search(r"\b[1-9]\d* passed", summary):
        outcome = ALL_SKIPPED
    if outcome == FOUND or (outcome.startswith(FAILED) and not red):
        red = [*red, f"{name} ({outcome})"]
    names_tests = outcome == "exit code 1" and any(test.startswith("tests/") for test in red)
    ended = outcome in ("passed", FOUND) or names_tests
    if not ended:
        red = sorted({*red, *red_before})
    return {**found, "outcome": outcome, "ended": ended, **({"red": red} if red else {})}


def _run(command: Command, variables: Mapping[str, str], limit_s: float, log: Path) -> dict[str, Any]:
    """Run one stage with its output in `log`; returns outcome, seconds and last lines."""
    began = time.monotonic()
    inherited = {
        **os.environ,
        "TRITON_CACHE_DIR": str(TRITON_CACHE),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w", errors="replace") as output:
        try:
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**inherited, **variables},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            return {"outcome": f"{NOT_RUN}: {command[0]} is not on this machine"}
        try:
            code = process.wait(limit_s)
            outcome = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # also kills compilers and a sanitiser's children
            process.wait()
            outcome = f"stopped after {limit_s:.0f} s"
    text = log.read_text(errors="replace")
    red = {"red": red_tests(text)} if red_tests(text) else {}
    seconds = round(time.monotonic() - began, 1)
    return {"outcome": outcome, "seconds": seconds, **red, "last_lines": text.splitlines()[-25:]}


def measured_since(began: float, results: Path) -> list[Path]:
    """The result files in `results` written since `began` (time.time())."""
    found = sorted(
        path for name in ("ops", "pair*", "chain_*", "training") for path in results.glob(f"{name}_cuda.json")
    )
    return [path for path in found if path.stat().st_mtime >= began]


def mark(paths: Sequence[Path], red: Sequence[str]) -> None:
    """Note in result files which tests were red when they were measured; their tables say so."""
    for path in paths:
        content = json.loads(path.read_text())
        if red or "red" in content:
            write(path, as_text({**content, "red": list(red)}))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time to spend; name seconds, such as {BUDGET_S:.0f}")
    return seconds


def main(arguments: Sequence[str]) -> int:
    """Run all stages on the GPU at hand; exit code 1 if one did not pass, for which there was time and the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=_seconds, default=BUDGET_S, metavar="SECONDS", help="default: 500")
    parser.add_argument("--results", type=expanded, default=RESULTS, help="folder of JSON files and tables")
    parser.add_argument("--logs", type=expanded, default=LOGS, help="folder of the stages' output")
    names = "; ".join(stage.name for stage in stages(RESULTS))
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME",
        help=f"this stage, after build, kernels and smoke tests; may be given several times; the stages: {names}",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.results, options.logs = options.results.resolve(), options.logs.resolve()  # stages run elsewhere
    try:
        planned = chosen(stages(options.results, options.logs), options.stage)
    except ValueError as error:
        parser.error(str(error))
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{sys.executable} has no {', no '.join(missing)}; install them, or name another: GPU_PYTHON=...")
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; `make gpu` needs one.")
    began = time.time()
    done = run_stages(planned, options.budget, options.results / RUN, options.logs)
    paths = measured_since(began, options.results)
    mark(paths, [test for stage in done for test in stage.get("red", ())])
    for path in paths:
        print(f"\n{write_table(path)}", flush=True)
    print(f"\n{verdict(options.results)}\n", flush=True)
    try:
        measured.record(options.results)
    except ValueError as error:  # such as a damaged file of another run, which takes no figure of this one
        print(error, flush=True)
    absent = (f"{NOT_RUN}: compute-sanitizer",)
    fine = [stage["outcome"].startswith(("passed", NO_TIME, *absent)) and not stage.get("red") for stage in done]
    return int(not all(fine))
