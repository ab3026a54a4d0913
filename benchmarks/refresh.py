"""What does refreshing the frozen pair cost, relative to the chain that follows?

Energy training folds the changed energy network anew before each iteration's chain: refresh after all weights of the
energy network changed, or, as after loading, all weights of the model. The baseline is the whole chain of the preset's
energy training with the frozen pair. Its time grows with the batch and that of the refresh does not, so the default,
a batch of one, is the least favourable. Random weights, float32.

    python -m benchmarks.refresh [--preset NAME ...] [--batch N ...] [--repeats R]

Results go to results/ as JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from benchmarks.environment import RESULTS, environment
from vaebm_fast import PRESETS, VAEBM
from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.models.layers import channels_last

DEFAULT_PRESETS = ("celeba_64", "cifar10", "celeba_256")


def measure(preset: str, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    """One result per batch size: times [s] of both kinds of refresh and of a chain, and their ratios."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = channels_last(VAEBM.from_preset(preset).to(device))
    frozen = freeze(model)
    refreshes = {
        "refresh_energy": times_of_refresh(frozen, model.energy, device, repeats),
        "refresh_all": times_of_refresh(frozen, model, device, repeats),
    }
    results = []
    for batch in batches:
        times = {**refreshes, "chain": times_of_chain(frozen, preset, batch, device, repeats)}
        result: dict[str, Any] = {"preset": preset, "batch": batch, "dtype": "float32", "backend": frozen.backend}
        result |= {"steps": PRESETS[preset].energy_training.chain.steps, "repeats": repeats}
        for name, times_s in times.items():
            result |= {f"{name}_{key}": value for key, value in summary(times_s).items()}
        for name in refreshes:
            result[f"{name}_share_percent"] = 100 * result[f"{name}_median_s"] / result["chain_median_s"]
        results.append(result)
    return results


def times_of_refresh(frozen: FrozenVAEBM, changed: nn.Module, device: torch.device, repeats: int) -> list[float]:
    """A refresh after every parameter of `changed` counts as written; its work does not depend on the values."""

    def change() -> None:
        torch.autograd.graph.increment_version(list(changed.parameters()))

    return times_of(frozen.refresh, device, repeats, before=change)


def times_of_chain(frozen: FrozenVAEBM, preset: str, batch: int, device: torch.device, repeats: int) -> list[float]:
    """A chain with the steps, step size and potential of the preset's energy training."""
    sampler = LangevinSampler(frozen, **asdict(PRESETS[preset].energy_training.chain))
    return times_of(lambda: sampler.run(range(batch)), device, repeats)


def times_of(
    run: Callable[[], object], device: torch.device, repeats: int, before: Callable[[], None] = lambda: None
) -> list[float]:
    """Times [s] of `run`, each after `before`; the first of all is left out."""
    times_s = []
    for _ in range(repeats + 1):
        before()
        _wait_for(device)
        began = time.perf_counter()
        run()
        _wait_for(device)
        times_s.append(time.perf_counter() - began)
    return times_s[1:]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def summary(times_s: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile [s]."""
    ordered = sorted(times_s)
    last = len(ordered) - 1
    return {
        "median_s": statistics.median(ordered),
        "p20_s": ordered[round(0.2 * last)],
        "p80_s": ordered[round(0.8 * last)],
    }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table: medians, p20 - p80 in brackets."""
    lines = [
        "| preset | N | steps | chain (s) | refresh, energy network changed (ms) | of the chain "
        "| refresh, all changed (ms) | of the chain |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def time_cell(result: dict[str, Any], name: str, unit: float, digits: int) -> str:
        median, p20, p80 = (unit * result[f"{name}_{key}_s"] for key in ("median", "p20", "p80"))
        return f"{median:.{digits}f} ({p20:.{digits}f} - {p80:.{digits}f})"

    for r in results:
        lines.append(
            f"| {r['preset']} | {r['batch']} | {r['steps']} | {time_cell(r, 'chain', 1, 2)} "
            f"| {time_cell(r, 'refresh_energy', 1e3, 1)} | {r['refresh_energy_share_percent']:.2f}% "
            f"| {time_cell(r, 'refresh_all', 1e3, 1)} | {r['refresh_all_share_percent']:.2f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every preset; write results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=DEFAULT_PRESETS)
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    report: dict[str, Any] = {"question": "cost of a refresh", "environment": environment(), "results": []}
    name = f"refresh_{report['environment']['device_type']}"
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    for preset in options.preset:
        report["results"] += measure(preset, options.batch, options.repeats)
        (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / f"{name}.md").write_text(f"{table(report['results'])}\n\n{facts}\n")
        print(f"{preset} done", file=sys.stderr)
    print(table(report["results"]))


if __name__ == "__main__":
    main()
