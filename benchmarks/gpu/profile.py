"""Which kernels take the time of a chain step of the frozen pair on a GPU?

One eager step under torch.profiler gives each kernel's total time. The time of the captured step minus their sum gives
the gaps between launches.

    python -m benchmarks profile PRESET N BACKEND [--dtype bfloat16] [--results FOLDER]
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.captured import captured, launched_by
from benchmarks.environment import RESULTS, environment
from benchmarks.step.pair import plain_model
from vaebm_fast.chain.noise import Stream, draw_tensor, normal, seed_tensor
from vaebm_fast.config import PRESETS
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.runtime.files import expanded, write

REPLAYS = 20
LISTED = 30  # kernels in the table
NAME_WIDTH = 90

Row = dict[str, Any]


def kernel_rows(step: Callable[[], object]) -> list[Row]:
    """{kernel, calls, time_ms} of one call of `step`, longest first."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return rows_of(profiler.events() or ())


def rows_of(events: Iterable[Any]) -> list[Row]:
    """The rows of `kernel_rows` from a profiler's events."""
    times_ms: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.device_type == DeviceType.CUDA:
            times_ms[event.name].append(event.device_time_total / 1e3)
    rows = [{"kernel": name, "calls": len(each), "time_ms": sum(each)} for name, each in times_ms.items()]
    return sorted(rows, key=lambda row: -float(row["time_ms"]))


def median_ms(step: Callable[[], object]) -> float:
    """The median time of `step` on the device."""
    times_ms = []
    for _ in range(REPLAYS):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        step()
        ended.record()
        ended.synchronize()
        times_ms.append(began.elapsed_time(ended))
    return statistics.median(times_ms)


def profile_step(preset: str, batch: int, backend: Any, dtype: torch.dtype) -> dict[str, Any]:
    """The kernels of one eager step, their sum, and the time of the same step captured into a CUDA graph."""
    device = torch.device("cuda")
    pair = plain_model(preset, device, nhwc=True).freeze(dtype, backend)
    layout = pair.noise_layout
    seeds, draw = seed_tensor(range(batch), device), draw_tensor(1, device)
    start = normal(seeds, 0, Stream.CHAIN, layout.dim)
    eps, nonfinite_at = start.clone(), torch.full_like(seeds, -1)
    step_size, stream = PRESETS[preset].sampling.step_sizes[0], int(Stream.CHAIN)
    update = partial(langevin_update, stream=stream, step_size=step_size, backend=pair.backend)

    def step() -> None:
        _, gradients = pair.potential_and_grad(*layout.split(start), "official")
        gradient = layout.join(gradients[:-1], gradients[-1])
        update(eps, gradient, seeds, draw, nonfinite_at)

    step()  # compiles Triton kernels
    rows, eager_ms = kernel_rows(step), median_ms(step)
    replay = captured(step, device)
    replay()
    launched = launched_by(replay, device)
    name = str(dtype).removeprefix("torch.")
    return summary(preset, batch, pair.backend, name, launched, eager_ms, median_ms(replay), rows)


def summary(
    preset: str, batch: int, backend: str, dtype: str, launched: str, eager_ms: float, replay_ms: float, rows: list[Row]
) -> dict[str, Any]:
    """The kernels, their sum, and the part of a replay in which none runs."""
    summed_ms = sum(float(row["time_ms"]) for row in rows)
    return {
        "preset": preset,
        "batch": batch,
        "backend": backend,
        "dtype": dtype,
        "launched": launched,
        "eager_ms": eager_ms,
        "replay_ms": replay_ms,
        "summed_ms": summed_ms,
        "gap_fraction": 1 - summed_ms / replay_ms,
        "launches": sum(int(row["calls"]) for row in rows),
        "kernels": rows,
    }


def table(found: dict[str, Any]) -> str:
    """A line of totals, then the longest kernels with their share of the sum."""
    lines = [
        f"{found['preset']}, N = {found['batch']}, {found['backend']}, {found['dtype']}, {found['launched']}: "
        f"replay {found['replay_ms']:.2f} ms, eager {found['eager_ms']:.2f} ms, kernels {found['summed_ms']:.2f} ms in "
        f"{found['launches']} launches, gaps {100 * found['gap_fraction']:.0f}% of the replay; "
        f"{found['replay_ms'] / found['batch']:.3f} ms per image"
    ]
    for row in found["kernels"][:LISTED]:
        share = 100 * row["time_ms"] / found["summed_ms"]
        lines.append(f"{row['time_ms']:9.3f} ms {share:5.1f}% {row['calls']:5d}  {row['kernel'][:NAME_WIDTH]}")
    return "\n".join(lines)


def document(found: dict[str, Any], ran: dict[str, Any]) -> str:
    """The table and the environment as Markdown."""
    facts = ", ".join(f"{name} {value}" for name, value in ran.items())
    return f"```\n{table(found)}\n```\n\n{facts}.\n"


def main(arguments: Sequence[str]) -> None:
    """Profile one pair; print and write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("batch", type=int)
    parser.add_argument("backend")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--results", type=expanded, default=RESULTS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU; a profile needs one.")
    found = profile_step(options.preset, options.batch, options.backend, getattr(torch, options.dtype))
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"profile_{options.preset}_{options.batch}_{options.backend}_{options.dtype}.md"
    write(path, document(found, environment()))
    print(table(found), flush=True)
