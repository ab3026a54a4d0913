"""Measurement core: interleaved candidates in one process, and the machine's ceilings.

Plain functions of callables, usable without pytest-benchmark.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

LONG_CALL_S = 3.0
ROUNDS_OF_LONG_CALLS, FEWEST_ROUNDS, MOST_ROUNDS = 3, 5, 100
MATRIX_SIDES = (1024, 2048, 3072)
GPU_MATRIX_SIDES = (4096, 8192)
COPY_ELEMENTS = 2**26  # float32: 256 MiB, far more than the caches
GPU_COPY_ELEMENTS = 2**29  # 2 GiB: takes milliseconds, so the launch does not count


class Sample(NamedTuple):
    """One call: wall-clock seconds, CPU seconds of all threads in user and kernel code, minor page faults.

    Fresh memory is mapped page by page in the kernel, which takes much of the plain modules' time on large batches.
    """

    wall_s: float
    user_s: float
    system_s: float
    page_faults: int


def sample(call: Callable[[], object], device: torch.device) -> Sample:
    """Time one call, including synchronisation with the device."""
    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    call()
    synchronize(device)
    wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    return Sample(
        wall_s,
        after.ru_utime - before.ru_utime,
        after.ru_stime - before.ru_stime,
        after.ru_minflt - before.ru_minflt,
    )


def take_turns(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int | None = None,
    seconds: float = 2.0,
) -> dict[str, list[Sample]]:
    """Samples of every candidate. Each round calls every candidate once, in rotating order.

    Other load on the machine thus affects all alike. One call each warms up. By default there are as many rounds as the
    slowest candidate needs for `seconds`, between 5 and 100, or 3 if one call takes more than 3 s.
    """
    slowest_s = max(sample(call, device).wall_s for call in candidates.values())
    rounds = rounds or rounds_for(slowest_s, seconds)
    names = list(candidates)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            samples[name].append(sample(candidates[name], device))
    return samples


def rounds_for(call_s: float, seconds: float) -> int:
    """Number of rounds of `take_turns` if the slowest candidate takes `call_s`."""
    if call_s > LONG_CALL_S:
        return ROUNDS_OF_LONG_CALLS
    return min(max(round(seconds / max(call_s, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Quantiles of the wall-clock time and medians of the other figures, as JSON values."""
    return {
        **quantiles([taken.wall_s for taken in samples]),
        "user_s": statistics.median(taken.user_s for taken in samples),
        "system_s": statistics.median(taken.system_s for taken in samples),
        "page_faults": statistics.median(taken.page_faults for taken in samples),
    }


def quantiles(times_s: list[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile of the times, and the times."""
    ordered = sorted(times_s)
    return {
        "rounds": len(ordered),
        "median_s": statistics.median(ordered),
        "p20_s": ordered[round(0.2 * (len(ordered) - 1))],
        "p80_s": ordered[round(0.8 * (len(ordered) - 1))],
        "times_s": times_s,
    }


def ceilings(device: torch.device, *, sides: tuple[int, ...] | None = None) -> dict[str, float]:
    """The machine's best rates for matrix products and a large copy, with the current number of threads.

    Products are float32; on a GPU also TF32 and bfloat16, under separate keys.
    """
    on_gpu = device.type == "cuda"
    sides = sides or (GPU_MATRIX_SIDES if on_gpu else MATRIX_SIDES)
    rates = {"matrix_gflops": _matrix_gflops(device, sides)}
    if on_gpu:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        rates["matrix_gflops_tf32"] = _matrix_gflops(device, sides)
        torch.set_float32_matmul_precision(precision)
        rates["matrix_gflops_bf16"] = _matrix_gflops(device, sides, torch.bfloat16)
    source = torch.randn(GPU_COPY_ELEMENTS if on_gpu else COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    copied_gb = 2e-9 * source.numel() * source.element_size()  # read and written
    return rates | {"copy_gbps": copied_gb / _fastest_s(partial(target.copy_, source), device)}


def _matrix_gflops(device: torch.device, sides: tuple[int, ...], dtype: torch.dtype = torch.float32) -> float:
    """Best rate over several sizes. Random matrices: a GPU multiplies zeros faster, because they draw less power."""
    best = 0.0
    for side in sides:
        a, b, c = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
        best = max(best, 2e-9 * side**3 / _fastest_s(partial(torch.mm, a, b, out=c), device))
    return best


def _fastest_s(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    return min(sample(call, device).wall_s for _ in range(repeats + 1))


def synchronize(device: torch.device) -> None:
    """Synchronise with the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process: resident size on a CPU, torch's allocations on a GPU.

    Read from /proc (Linux), because getrusage's maximum includes that of the parent process.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 2**10  # given in KiB


def default_device() -> torch.device:
    """The GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
