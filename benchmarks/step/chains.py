"""How many images per second do whole chains make, and how much of that does a sampling job keep?

The job writes PNG files for all seeds into a temporary folder; it is timed from its first block to its last file, and
its loading time is reported separately. The bare chain is the same sampler over the same blocks, with images as uint8.
--plain adds the same chain with U and gradient of the plain modules (on a CPU also in NHWC), --compile with those of
torch.compile, in bfloat16 if the chain is; the frozen pair decodes its final images, which favours it. Weights are
random. Nothing is timed unless the frozen pair's gradient is that of the plain modules.

On a CPU all candidates take turns. On a GPU, whose memory does not hold all of them, they run one after another. There
the bare chain is captured before it is timed. A job includes its capture, so a bare chain that includes it is measured
as well. Eager and torch.compile chains, whose blocks all take the same time, run one block.

    python -m benchmarks chains [--preset NAME] [--steps T] [--batch N] [--blocks B] [--rounds R] [--dtype DTYPE]
                                [--backend NAME] [--plain] [--compile] [--no-job] [--into NAME] [--results FOLDER]

Results go to results/ as JSON and a table, rewritten after each candidate.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks import report
from benchmarks.environment import RESULTS
from benchmarks.measure import default_device, quantiles
from benchmarks.options import at_least_one
from benchmarks.report import NHWC, PLAIN
from benchmarks.results_file import Keep, ResultsFile, Row
from benchmarks.step.chain_candidates import BARE, COLD, JOB, Bench, Timed
from benchmarks.step.pair import (
    COMPILED,
    COMPILED_BF16,
    TO_COMPILE,
    TORCHS_OWN,
    agreement,
    plain_model,
    refusal,
    release,
    true_gradient,
)
from vaebm_fast import PRESETS, VAEBM, save_energy, save_nvae
from vaebm_fast.chain.noise import Stream, normal, seed_tensor
from vaebm_fast.config import ChainConfig
from vaebm_fast.frozen import FrozenVAEBM, freeze
from vaebm_fast.ops._backend import BACKENDS, Backend
from vaebm_fast.runtime.files import expanded
from vaebm_fast.sampling import SampleOptions

Dtype = Literal["float32", "bfloat16"]


def measure(
    preset: str,
    chain: ChainConfig,
    batch: int,
    blocks: int,
    rounds: int,
    *,
    plain: bool,
    compile: bool,
    job: bool = True,
    dtype: Dtype = "float32",
    backend: Backend = "auto",
    keep: Keep = lambda name, row: None,
) -> list[Row]:
    """A row per candidate, passed to `keep` as soon as it is measured: seconds, images per second, and the rate
    relative to the bare chain's if that was measured; {"refused": why} if there is no figure.
    """
    if (plain or compile) and (chain.potential != "official" or chain.temperature != 1):
        raise ValueError(f"{preset} has another potential or temperature than the other pairs compute.")
    with _bench(preset, chain, batch, blocks, dtype, backend) as bench:
        makers = _makers(bench, job=job, plain=plain, compile=compile)
        rows: dict[str, Row] = {}
        for group in [[name] for name in makers] if bench.on_gpu else [list(makers)]:
            found = _measure_group({name: makers[name] for name in group}, bench, rounds)
            release(bench.device, compiled=not set(group).isdisjoint(TO_COMPILE))
            for name, row in found.items():
                bare = {**rows, **found}.get(BARE, {}).get("images_per_second")
                rate = row.get("images_per_second")
                rows[name] = {
                    "preset": preset,
                    "steps": chain.steps,
                    "batch": batch,
                    "candidate": name,
                    **row,
                    "over_bare_chain": rate / bare if rate and bare else None,
                }
                keep(name, rows[name])
    return list(rows.values())


def _makers(bench: Bench, *, job: bool, plain: bool, compile: bool) -> dict[str, Callable[[], Timed]]:
    """The requested candidates in order of measurement, the most important first."""
    makers: dict[str, Callable[[], Timed]] = {JOB: bench.job} if job and not bench.on_gpu else {}
    makers[BARE] = bench.bare
    if plain:
        makers[PLAIN] = partial(bench.plain, nhwc=False)
    if plain and not bench.on_gpu:
        makers[NHWC] = partial(bench.plain, nhwc=True)
    if job and bench.on_gpu:
        makers |= {JOB: bench.job, COLD: bench.cold}
    if compile:
        makers[COMPILED_BF16 if bench.dtype == "bfloat16" else COMPILED] = bench.compiled
    return makers


@contextmanager
def _bench(preset: str, chain: ChainConfig, batch: int, blocks: int, dtype: Dtype, backend: Backend) -> Iterator[Bench]:
    """Yields the networks, frozen and saved in temporary files."""
    device = default_device()
    model = plain_model(preset, device, nhwc=False)
    with tempfile.TemporaryDirectory() as folder:
        nvae, energy = Path(folder, "nvae.safetensors"), Path(folder, "energy.safetensors")
        save_nvae(model.vae, nvae)
        save_energy(model.energy, energy)
        options = SampleOptions(
            nvae=nvae, energy=energy, out=Path(folder), seeds=f"0-{batch * blocks - 1}", **asdict(chain),
            batch_size=batch, processes=1, progress=False, dtype=dtype, backend=backend,
        )  # fmt: skip
        frozen = freeze(model, getattr(torch, dtype), backend)
        _require_agreement(preset, model, frozen)
        yield Bench(device, model, frozen, chain, batch, blocks, options)


def _require_agreement(preset: str, model: VAEBM, frozen: FrozenVAEBM) -> None:
    """Raise ValueError unless the frozen pair's gradient for two images is that of the plain modules."""
    truth = true_gradient(preset, 2, frozen.device, model)
    layout = frozen.noise_layout
    start = normal(seed_tensor(range(2), frozen.device), 0, Stream.CHAIN, layout.dim)
    _, gradients = frozen.potential_and_grad(*layout.split(start), "official")
    on_gpu, is_half = frozen.device.type == "cuda", frozen.dtype == torch.bfloat16
    products = "bf16" if is_half else TORCHS_OWN if on_gpu else "float32"
    agreement("the frozen pair", layout.join(gradients[:-1], gradients[-1]), truth, products)


def _measure_group(makers: dict[str, Callable[[], Timed]], bench: Bench, rounds: int) -> dict[str, Row]:
    """Rows of candidates that take turns."""
    rows: dict[str, Row] = {}
    built: dict[str, Timed] = {}
    for name, make in makers.items():
        try:
            built[name] = make()
        except Exception as error:  # other candidates may still run
            rows[name] = refusal(error)
    try:
        times_s = take_turns({name: timed.call for name, timed in built.items()}, rounds, warm_up=not bench.on_gpu)
    except Exception as error:
        return rows | {name: refusal(error) for name in built}
    for name, timed in built.items():
        taken = quantiles(times_s[name])
        rows[name] = {
            "blocks": timed.blocks,
            "backend": timed.backend,
            "dtype": timed.dtype,
            "launched": timed.launched,
            **taken,
            "images_per_second": bench.batch * timed.blocks / taken["median_s"],
            "whole_job_s": quantiles(bench.whole_job_s)["median_s"] if name == JOB else None,
        }
    return {name: rows[name] for name in makers}


def take_turns(calls: dict[str, Callable[[], float]], rounds: int, *, warm_up: bool) -> dict[str, list[float]]:
    """Seconds of every candidate, called once per round in rotating order; round 0 warms up and is not counted."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in range(0 if warm_up else 1, rounds + 1):
        first = index % len(names) if names else 0
        for name in names[first:] + names[:first]:
            seconds = calls[name]()
            print(f"round {index}, {name}: {seconds:.3g} s", file=sys.stderr, flush=True)
            if index > 0:
                times[name].append(seconds)
    return times


def main(arguments: Sequence[str]) -> int:
    """Measure, write and print; exit code 1 if a candidate failed."""
    options = _parser().parse_args(arguments)
    published = PRESETS[options.preset].sampling
    chain = published if options.steps is None else replace(published, steps=options.steps)
    half = "_bf16" if options.dtype == "bfloat16" else ""
    name = options.into or f"chain_{options.preset}_{options.batch}{half}"
    question = f"Images per second of whole chains and of the job, the frozen pair in {options.dtype}"
    file = ResultsFile(name, question, {}, options.results)

    def keep(name: str, row: Row) -> None:
        file.keep(f"{options.preset}, N = {options.batch}, {name}", row)
        report.write_table(file.path)

    rows = measure(
        options.preset, chain, options.batch, options.blocks, options.rounds, plain=options.plain,
        compile=options.compile, job=options.job, dtype=options.dtype, backend=options.backend, keep=keep,
    )  # fmt: skip
    print(report.write_table(file.path))
    return int(any(row.get("failed") for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="celeba_64")
    parser.add_argument("--steps", type=at_least_one, help="by default the preset's")
    parser.add_argument("--batch", type=at_least_one, default=4)
    parser.add_argument("--blocks", type=at_least_one, default=4)
    parser.add_argument("--rounds", type=at_least_one, default=3)
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help="of the frozen pair")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="of the frozen pair")
    parser.add_argument("--plain", action="store_true", help="the plain modules' chain too")
    parser.add_argument(
        "--compile", action="store_true", help="the chain by torch.compile too; it compiles for minutes"
    )
    parser.add_argument("--no-job", dest="job", action="store_false", help="chains alone")
    parser.add_argument("--into", metavar="NAME", help="the result file; chain_PRESET_N, with _bf16 behind it")
    parser.add_argument("--results", type=expanded, default=RESULTS)
    return parser
