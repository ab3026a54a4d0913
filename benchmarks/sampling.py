"""How many images per second do whole chains give, and what of the bare chain's rate does the sampling job keep?

The job: seeds to a folder of PNG files on a temporary disk, from its first block to its last file; its loading, which
a job of thousands of images does not feel, is told beside. The bare chain: the same sampler over the same blocks,
images as uint8. Plain modules, as they are and in NHWC, and torch.compile, where asked for: the same chain with their
energy and gradient. All take turns in one run. Random weights, float32, the preset's steps unless told otherwise.

    python -m benchmarks.sampling [--preset NAME] [--steps T] [--batch N] [--blocks B] [--rounds R]
                                  [--plain] [--compile] [--results FOLDER]

Results go to results/ as JSON and a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.environment import RESULTS, environment
from benchmarks.measure import default_device, synchronize
from benchmarks.pair import COMPILED, NHWC, PLAIN, plain_model
from benchmarks.refresh import summary
from benchmarks.torch_compile import compiled
from vaebm_fast import PRESETS, VAEBM, save_energy, save_nvae
from vaebm_fast.config import Potential, Sampling
from vaebm_fast.frozen import freeze
from vaebm_fast.langevin import LangevinSampler, to_uint8
from vaebm_fast.sampling import SampleOptions, run_job

BARE, JOB = "bare chain, frozen", "sampling job"


@dataclass(frozen=True)
class OtherPair:
    """A chain model whose energy and gradient another computes; official potential, temperature 1."""

    model: VAEBM
    call: Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Sequence[Tensor]]]

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """Of the model."""
        return self.model.latent_shapes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the model."""
        return self.model.image_shape

    def energy_and_grad(
        self, eps_z: Sequence[Tensor], eps_x: Tensor, potential: Potential, temperature: float
    ) -> tuple[Tensor, list[Tensor]]:
        """By `call`."""
        u, gradients = self.call(eps_z, eps_x)
        return u, list(gradients)

    def mean_image(self, eps_z: Sequence[Tensor], temperature: float) -> Tensor:
        """By the plain modules."""
        return self.model.mean_image(eps_z, temperature)


def official(model: VAEBM, eps_z: Sequence[Tensor], eps_x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """U and its gradient by the plain modules."""
    return model.energy_and_grad(eps_z, eps_x, "official")


def time_of_chain(sampler: LangevinSampler, batch: int, blocks: int) -> float:
    """Seconds of `blocks` blocks, their images as uint8 on the host."""
    began = time.perf_counter()
    for block in range(blocks):
        to_uint8(sampler.run(range(block * batch, (block + 1) * batch)).images).cpu()
    synchronize(sampler.device)
    return time.perf_counter() - began


def time_of_job(options: SampleOptions) -> tuple[float, float]:
    """Seconds of the blocks of a job in a fresh folder until all is written, and of the whole job."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "samples")
        began = time.perf_counter()
        code = run_job(replace(options, out=out))
        whole_s = time.perf_counter() - began
        if code != 0:
            raise KeyboardInterrupt
        run = json.loads((out / "summary.json").read_text())["this_run"]
    return float(run["seconds"]), whole_s


def other_chains(preset: str, chain: Sampling, batch: int, *, plain: bool, compile: bool) -> dict[str, LangevinSampler]:
    """The chains that are asked for besides the frozen one; torch.compile brings CUDA graphs of its own."""
    device = default_device()
    samplers, eager = {}, {**asdict(chain), "device": device, "capture": False}
    for name in (PLAIN, NHWC) if plain else ():
        modules = plain_model(preset, device, nhwc=name == NHWC)
        samplers[name] = LangevinSampler(OtherPair(modules, partial(official, modules)), **eager)
    if compile:
        model = plain_model(preset, device, nhwc=True)
        probe = LangevinSampler(model, steps=0, step_size=1.0, device=device)
        call, _ = compiled(model, *probe.layout.split(probe.start(range(batch))), is_bf16=False)
        samplers[COMPILED] = LangevinSampler(OtherPair(model, call), **eager)
    return samplers


def measure(
    preset: str, chain: Sampling, batch: int, blocks: int, rounds: int, *, plain: bool, compile: bool
) -> list[dict[str, Any]]:
    """A row per candidate: seconds, images per second, and that over the bare chain's."""
    if (plain or compile) and (chain.potential != "official" or chain.temperature != 1):
        raise ValueError(f"{preset} has another potential or temperature than the other pairs compute.")
    device, images = default_device(), batch * blocks
    model = VAEBM.from_preset(preset).to(device).requires_grad_(False)
    frozen = freeze(model)
    bare = LangevinSampler(frozen, **asdict(chain), device=device)
    samplers = {BARE: bare, **other_chains(preset, chain, batch, plain=plain, compile=compile)}
    whole_job_s: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        nvae, energy = Path(folder, "nvae.safetensors"), Path(folder, "energy.safetensors")
        save_nvae(model.vae, nvae)
        save_energy(model.energy, energy)
        options = SampleOptions(
            nvae=nvae, energy=energy, out=Path(folder), seeds=f"0-{images - 1}", **asdict(chain),
            batch_size=batch, processes=1, progress=False,
        )  # fmt: skip

        def job() -> float:
            seconds, whole_s = time_of_job(options)
            whole_job_s.append(whole_s)
            return seconds

        calls: dict[str, Callable[[], float]] = {JOB: job}
        for name, sampler in samplers.items():
            calls[name] = partial(time_of_chain, sampler, batch, blocks)
        times_s = take_turns(calls, rounds)
    rate = {name: images / summary(times)["median_s"] for name, times in times_s.items()}
    facts = {"preset": preset, "steps": chain.steps, "batch": batch, "blocks": blocks, "backend": frozen.backend}
    return [
        {
            **facts,
            "candidate": name,
            **summary(times),
            "times_s": times,
            "images_per_second": rate[name],
            "over_bare_chain": rate[name] / rate[BARE],
            "whole_job_s": summary(whole_job_s)["median_s"] if name == JOB else None,
        }
        for name, times in times_s.items()
    ]


def take_turns(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every candidate: each once per round, another first each time, after a round that does not count."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds + 1):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            seconds = calls[name]()
            print(f"round {index}, {name}: {seconds:.3g} s", file=sys.stderr, flush=True)
            if index > 0:
                times[name].append(seconds)
    return times


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: medians, p20 - p80 in brackets."""
    names = ("preset", "N x blocks", "steps", "candidate", "s", "images/s", "of the bare chain")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append(
            f"| {row['preset']} | {row['batch']} x {row['blocks']} | {row['steps']} | {row['candidate']} "
            f"| {row['median_s']:.2f} ({row['p20_s']:.2f} - {row['p80_s']:.2f}) | {row['images_per_second']:.3g} "
            f"| {100 * row['over_bare_chain']:.1f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="celeba_64")
    parser.add_argument("--steps", type=int, help="by default the preset's")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plain", action="store_true", help="the plain modules' chain too")
    parser.add_argument(
        "--compile", action="store_true", help="the chain by torch.compile too; it compiles for minutes"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    published = PRESETS[options.preset].sampling
    steps = published.steps if options.steps is None else options.steps
    chain = Sampling(steps, published.step_size, published.potential, published.temperature)
    ran = environment()
    sizes = (options.batch, options.blocks, options.rounds)
    rows = measure(options.preset, chain, *sizes, plain=options.plain, compile=options.compile)
    report = {"question": "images per second of whole chains and of the job", "environment": ran, "results": rows}
    facts = ", ".join(f"{key} {value}" for key, value in ran.items())
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"chain_{options.preset}_{options.batch}_{ran['device_type']}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    stem.with_suffix(".md").write_text(f"{table(rows)}\n\n{facts}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
