"""Compiles the Triton kernels that the stages of `make gpu` launch, in parallel, into Triton's cache.

    python -m benchmarks precompile [--for smoke] [--for pair] ... [--processes N]

Otherwise each stage compiles its own, one after another. What is not found here, or does not compile, is left to the
stage that launches it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial

import torch

from benchmarks.gpu.launches import META, Launch, launches_of, op_calls, pair_call
from benchmarks.gpu.tune import TUNERS, candidate_calls
from benchmarks.ops import cases
from benchmarks.options import at_least_one

Call = Callable[[], object]


def _pairs(*presets: str) -> Iterator[Call]:
    for preset in presets:
        for backend in cases.backends_of("depthwise_swish", META, without=("reference", "cpp")):
            yield pair_call(preset, 16, backend, torch.bfloat16)  # type: ignore[arg-type]


CALLS: dict[str, Callable[[], Iterator[Call]]] = {
    "smoke": lambda: op_calls(cases.SMALL_CASES),
    "pair": lambda: _pairs("celeba_256"),
    "ops": lambda: op_calls(cases.GPU_CASES),
    "other presets": lambda: _pairs("celeba_64", "cifar10"),
}
TUNED: dict[str, Callable[[], Iterator[Call]]] = {
    f"tune {name}{', all' if every else ''}": partial(candidate_calls, tuner, META, all_precisions=every)
    for name, tuner in TUNERS.items()
    for every in (False, True)
}


_inherited: list[Launch] = []  # by forked processes: a launch cannot be pickled


def recorded(names: Sequence[str]) -> tuple[list[Launch], list[str]]:
    """The launches of these parts, each of its specialisations once; and what could not be recorded, a line each."""
    launches: dict[object, Launch] = {}
    failures = []
    for name in names:
        try:
            for call in (CALLS | TUNED)[name]():
                launches |= {launch.specialisation: launch for launch in launches_of(call)}
        except Exception as error:  # other parts are compiled all the same
            failures.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
    return list(launches.values()), failures


def compile_all(launches: Sequence[Launch], processes: int, *, load: bool = True) -> list[str]:
    """Compile the launches for the active driver's GPU in forked processes; returns what went wrong, a line each.

    load: also build their launchers and load them, for which the GPU must be here. Raises RuntimeError if this process
    has initialised CUDA, which a fork cannot use.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is initialised in this process; kernels are compiled in forks, which cannot use it.")
    _inherited[:] = launches
    failures = []
    forks = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, forks, initializer=_initialise if load else None) as pool:
        running = {pool.submit(_compile, index, load): launches[index] for index in range(len(launches))}
        for done in as_completed(running):
            error = done.exception()
            if error is not None:
                failures.append(f"{running[done].kernel.__name__}: {type(error).__name__}: {error}".splitlines()[0])
    return failures


def _initialise() -> None:
    """Give the process a CUDA context."""
    torch.empty(1, device="cuda")


def _compile(index: int, load: bool) -> None:
    launch = _inherited[index]
    compiled = launch.kernel.run(*launch.args, grid=(1,), warmup=True, **launch.kwargs)
    if load:
        _ = compiled.run  # the property builds the launcher


def main(arguments: Sequence[str]) -> int:
    """Compile the kernels of the named parts, by default of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--for",
        dest="parts",
        action="append",
        choices=CALLS | TUNED,
        metavar="PART",
        help=f"of {', '.join(CALLS | TUNED)}; default: all but what tune times",
    )
    parser.add_argument("--processes", type=at_least_one, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    ask = "import torch; raise SystemExit(not torch.cuda.is_available())"  # elsewhere: it may initialise CUDA
    if subprocess.run([sys.executable, "-c", ask], check=False).returncode != 0:
        parser.error("kernels are compiled for the GPU at hand, and there is none; `make gpu-kit` compiles for another")
    began = time.perf_counter()
    torch.set_num_threads(1)  # threads do not survive a fork
    launches, failures = recorded(options.parts or list(CALLS))
    recorded_s = time.perf_counter() - began
    failures += compile_all(launches, options.processes)
    print("\n".join(failures))
    seconds = time.perf_counter() - began
    print(
        f"{len(launches)} kernels, {len(failures)} failed; recorded in {recorded_s:.0f} s, ready after {seconds:.0f} s"
    )
    return int(bool(failures))
