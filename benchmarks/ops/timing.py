"""Times the cases of `ops.cases` on one device, all backends of a case in turns.

On a GPU a call is shorter than its launch, and the next call would find its tensors in the cache. So a graph captures
many calls on rotated sets of tensors, several times the cache in total, and its replay is timed.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.captured import EAGER, captured, launched_by
from benchmarks.gpu.sources import sources_of
from benchmarks.measure import Sample, summary, synchronize, take_turns
from benchmarks.ops.cases import Case, Run, backends_of

ALLOWED = 0.02  # of the norm: more than any rounding, and less than a wrong part of the result
CACHES, MOST_BUFFERS = 4, 32  # rotated tensors: multiple of the GPU's cache, and the most sets
GRAPH_BYTES, MOST_CALLS = 10**9, 128  # a replay moves at least this, about 0.3 ms, in at most so many calls


@dataclass(frozen=True)
class Timed:
    """A callable that makes `calls` calls of an op, and how it is launched."""

    call: Callable[[], object]
    calls: int = 1
    launched: str = EAGER


def measure_case(
    case: Case, device: torch.device, *, rounds: int | None = None, without: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """A row per backend that can run the case, measured in turns; {"refused": why} for a backend that failed."""
    facts = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "bytes": case.work.memory_bytes,
        "flops": case.work.flop,
    }
    backends, on_gpu = backends_of(case.op, device, without), device.type == "cuda"
    rows: dict[str, dict[str, Any]] = {
        name: {**facts, "candidate": name, "backend": name, **sources_of(case.op, name)} for name in backends
    }
    runs = [case.make(device) for _ in range(buffers_of(case, cache_bytes(device)) if on_gpu else 1)]
    timed: dict[str, Timed] = {}
    for name in backends:
        try:
            synchronize(device)
        except RuntimeError as error:  # a kernel before this one
            rows[name] |= {"refused": f"the GPU had failed before: {error}"}
            continue
        try:
            ready = _graph(case, runs, name, device) if on_gpu else Timed(_bound(runs[0], name))
            synchronize(device)  # for a failing kernel to be this backend's, not the next one's
            if "reference" in timed:
                _require_agreement(runs[0], name)
            timed[name] = ready
        except Exception as error:  # other backends may still run
            rows[name] |= {"refused": f"{type(error).__name__}: {error}", "failed": True}
    if not timed:
        return rows
    steps = {name: entry.call for name, entry in timed.items()}
    try:
        samples = take_turns(steps, device, rounds=rounds, seconds=0.1 if on_gpu else 0.5)
    except Exception as error:  # which of them is not known
        why = {"refused": f"{type(error).__name__}: {error}", "failed": True}
        return rows | {name: rows[name] | why for name in timed}
    for name, entry in timed.items():
        each = [_shared(taken, entry.calls) for taken in samples[name]]
        rows[name] |= {"launched": entry.launched, "calls": entry.calls, "buffers": len(runs), **summary(each)}
    return rows


def _require_agreement(run: Run, backend: str) -> None:
    """Raise ArithmeticError if the results are not the reference's, but for rounding; tests have smaller shapes."""
    for result, expected in zip(_tensors(run(backend=backend)), _tensors(run(backend="reference")), strict=True):
        error = float((result.float() - expected.float()).norm() / expected.float().norm())
        if not error <= ALLOWED:
            raise ArithmeticError(f"its results are {error:.0%} from those of plain PyTorch")


def _tensors(results: object) -> list[Tensor]:
    return [x for x in (results if isinstance(results, tuple) else (results,)) if isinstance(x, Tensor)]


def cache_bytes(device: torch.device) -> int:
    """Size of the GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def buffers_of(case: Case, cache: int) -> int:
    """Number of tensor sets to rotate, so that none is still cached when it is reused."""
    return min(math.ceil(CACHES * cache / case.work.memory_bytes), MOST_BUFFERS)


def _graph(case: Case, runs: Sequence[Run], backend: str, device: torch.device) -> Timed:
    """A captured graph of enough calls that a replay takes longer than its launch, on rotated tensors."""
    calls = max(len(runs), min(math.ceil(GRAPH_BYTES / case.work.memory_bytes), MOST_CALLS))

    def together() -> None:
        results: deque[object] = deque(maxlen=len(runs))  # held, for the next call's to be other memory
        for index in range(calls):
            results.append(runs[index % len(runs)](backend=backend))

    call = captured(together, device)
    call()
    return Timed(call, calls, launched_by(call, device))


def _shared(taken: Sample, calls: int) -> Sample:
    """The sample of one of `calls` calls."""
    return Sample(taken.wall_s / calls, taken.user_s / calls, taken.system_s / calls, taken.page_faults // calls)


def _bound(run: Run, backend: str) -> Callable[[], object]:
    return lambda: run(backend=backend)
