"""How long does one chain step take in the plain modules, and how much memory?

One step: decoder forward, energy forward, the gradient of the official potential with respect to all noise, the update
of all noise. Random weights, float32, eager, weights in channels_last order. This is the baseline of everything faster.

    python -m benchmarks.chain_step [--preset NAME ...] [--batch N ...] [--repeats R]

Each case runs in a process of its own, so that its peak memory is its own; results go to results/ as JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import torch

from benchmarks.environment import RESULTS, environment
from vaebm_fast import PRESETS, VAEBM
from vaebm_fast.langevin import langevin_step
from vaebm_fast.models.layers import channels_last
from vaebm_fast.noise import NoiseLayout, Stream, normal, seed_tensor

DEFAULT_PRESETS = ("cifar10", "celeba_64", "celeba_256")


def measure(preset: str, batch: int, repeats: int) -> dict[str, Any]:
    """Times [s] of `repeats` steps after one to warm up, and the peak memory [MiB] with and without the weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = channels_last(VAEBM.from_preset(preset).to(device)).requires_grad_(False)
    layout, sampling = NoiseLayout(model.latent_shapes, model.image_shape), PRESETS[preset].sampling
    seeds = seed_tensor(range(batch), device)
    eps = normal(seeds, 0, Stream.CHAIN, layout.dim)
    before_mib = _peak_mib(device)
    times_s = []
    for k in range(1, repeats + 2):
        began = time.perf_counter()
        eps_z, eps_x = layout.split(eps)
        _, gradients = model.energy_and_grad(eps_z, eps_x, potential="official")
        gradient = layout.join(gradients[:-1], gradients[-1])
        eps = langevin_step(eps, gradient, normal(seeds, k, Stream.CHAIN, layout.dim), sampling.step_size)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - began)
    assert bool(torch.isfinite(eps).all())
    times_s = sorted(times_s[1:])
    return {
        "preset": preset,
        "batch": batch,
        "dtype": "float32",
        "backend": "plain modules",
        "repeats": repeats,
        "median_s": statistics.median(times_s),
        "p20_s": times_s[round(0.2 * (len(times_s) - 1))],
        "p80_s": times_s[round(0.8 * (len(times_s) - 1))],
        "peak_memory_mib": _peak_mib(device),
        "weights_and_runtime_mib": before_mib,
    }


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def table(results: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| preset | N | s/step (median) | p20 - p80 | s/image/step | peak memory (MiB) | of it weights and runtime |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        lines.append(
            f"| {r['preset']} | {r['batch']} | {r['median_s']:.3f} | {r['p20_s']:.3f} - {r['p80_s']:.3f} "
            f"| {r['median_s'] / r['batch']:.3f} | {r['peak_memory_mib']:.0f} | {r['weights_and_runtime_mib']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure every case in a process of its own; write results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=DEFAULT_PRESETS)
    parser.add_argument("--batch", nargs="+", type=int, default=(1, 4))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.preset[0], options.batch[0], options.repeats)))
        return
    report: dict[str, Any] = {"question": "plain chain step", "environment": environment(), "results": []}
    name = f"chain_step_{report['environment']['device_type']}"
    for preset in options.preset:
        for batch in options.batch:
            command = [sys.executable, "-m", "benchmarks.chain_step", "--one", "--preset", preset]
            command += ["--batch", str(batch), "--repeats", str(options.repeats)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            report["results"].append(json.loads(output.splitlines()[-1]))
            (RESULTS / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
            print(f"{preset}, N = {batch}: {report['results'][-1]['median_s']:.3f} s", file=sys.stderr)
    facts = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    (RESULTS / f"{name}.md").write_text(f"{table(report['results'])}\n\n{facts}\n")
    print(table(report["results"]))


if __name__ == "__main__":
    main()
