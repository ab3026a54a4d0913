"""Runs a sampling job: each process loads, then computes its share of the blocks; rank 0 assembles the files.

Blocks are aligned ranges of the seeds and are never split between processes, so a block is the same batch for any
number of processes. A chain that is not finite twice has no image, and a rerun does not retry it: it would fail again.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.checkpoint import content_sha256, describe, load_energy, load_nvae
from vaebm_fast.config import PRESETS, find_energy_arch
from vaebm_fast.frozen import FrozenNVAE, freeze
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.ops._backend import Backend
from vaebm_fast.runtime.command import FAILED, INTERRUPTED
from vaebm_fast.runtime.devices import choose_device
from vaebm_fast.runtime.errors import AGAIN, UserError, sentence
from vaebm_fast.runtime.ranks import ProcessLostError, Ranks, joined, of_torchrun, start
from vaebm_fast.runtime.signals import interruptible
from vaebm_fast.sampling import journal
from vaebm_fast.sampling.assembly import assemble
from vaebm_fast.sampling.blocks import TOO_SMALL, BlockSampler, is_out_of_memory
from vaebm_fast.sampling.folder import Folder, SamplingError
from vaebm_fast.sampling.journal import Journal, Watcher
from vaebm_fast.sampling.options import SampleOptions, Seeds
from vaebm_fast.sampling.outputs import Output
from vaebm_fast.sampling.plan import Plan, make_plan
from vaebm_fast.sampling.summary import Report, conclude
from vaebm_fast.sampling.telemetry import gpu_meter
from vaebm_fast.sampling.writer import Writer

MOST_WRITERS = 4


def run_job(options: SampleOptions) -> int:
    """Run or complete the job; returns the exit code: 0, or 130 after an interruption.

    Raises ValueErrors (including SamplingErrors) whose message is one sentence for the user. If chains failed, raises
    at the end, after everything else has been written.
    """
    options.chain()
    Seeds.parse(options.seeds)
    ranks = of_torchrun()
    if ranks is not None:
        if options.processes is not None:
            raise UserError("torchrun has already started the processes; omit --processes.")
        return run_rank(options, ranks)
    on_gpus = choose_device(options.device).type == "cuda"
    gpus = torch.cuda.device_count() if on_gpus else 1
    processes = options.processes or gpus
    if on_gpus and processes > gpus:
        raise UserError(f"--processes {processes} needs {processes} GPUs, but torch finds {gpus}; reduce --processes.")
    if processes == 1:
        return run_rank(options, Ranks())
    with interruptible():
        return start(partial(run_rank, options), processes)


def run_rank(options: SampleOptions, ranks: Ranks, store: Path | None = None) -> int:
    """One process's part; rendezvous through the file `store`, or through torchrun's environment."""
    with interruptible():
        try:
            with joined(ranks, store), _reproducible():
                return _work(options, ranks)
        except KeyboardInterrupt:
            if ranks.speaks:
                print(f"Stopped; {AGAIN}.")
            return INTERRUPTED
        except ProcessLostError:
            if ranks.speaks:
                raise
            return FAILED


def _work(options: SampleOptions, ranks: Ranks) -> int:
    began = time.perf_counter()
    folder, seeds = Folder(options.out), Seeds.parse(options.seeds)
    try:
        ready = _ready_together(options, ranks, folder, seeds)
        if ready is None:
            return 0
        sampler, plan = ready
        output = Output(options.format, seeds.largest, sampler.noise_layout.image_shape)
        with _progress(options, ranks, folder, len(seeds), plan.images_done) as look:
            report = _share(ranks, folder, seeds, sampler, plan, output, look)
            ranks.wait(look)
        reports = ranks.exchange(report)
        if ranks.rank == 0:
            records = journal.read_all(folder, seeds.total_blocks(plan.batch_size))
            assemble(folder, output, seeds, plan.batch_size, plan.intact, records)
            print(conclude(folder, seeds, plan, records.values(), reports, time.perf_counter() - began))
    finally:
        folder.release()
    return 0


def _ready_together(
    options: SampleOptions, ranks: Ranks, folder: Folder, seeds: Seeds
) -> tuple[LangevinSampler, Plan] | None:
    """(this process's sampler, the plan); rank 0 takes the lock first and makes the plan.

    If one process fails, all stop: processes with `ranks.speaks` raise the error, the others return None.
    """
    plan: Plan | None = None
    failure: Exception | None = None
    try:
        if ranks.rank == 0:
            folder.prepare()
        vae, energy = _load(options, ranks)
        sampler = _sampler(options, vae, energy)
        if ranks.rank == 0:
            _warn_unless_readjusted(options.nvae, sampler.temperature)
            hashes = {"nvae": content_sha256(vae)} | ({"energy": content_sha256(energy)} if energy else {})
            threads = max(1, torch.get_num_threads() // ranks.local_world)
            plan = make_plan(options, folder, seeds, sampler, hashes, threads)
            folder.share()
    except (ValueError, OSError, RuntimeError) as error:
        failure = SamplingError(TOO_SMALL) if is_out_of_memory(error) else error
    outcomes = ranks.exchange((plan, sentence(failure) if failure else None))
    sentences = [text for _, text in outcomes if text]
    if sentences:
        if ranks.speaks:
            raise failure or SamplingError(sentences[0])
        return None
    plan = outcomes[0][0]
    assert plan is not None
    if ranks.rank != 0:
        folder.share()
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    return sampler, plan


def _load(options: SampleOptions, ranks: Ranks) -> tuple[NVAE, EnergyNetwork | None]:
    """The networks on this process's device; no energy network if steps is 0. Raises ValueErrors for unusable files."""
    device = torch.device("cpu")
    if choose_device(options.device).type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Local rank {ranks.local_rank} has no GPU: torch finds {torch.cuda.device_count()}; "
                "start one process per GPU."
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    vae = load_nvae(options.nvae, device=device)
    if options.preset and vae.image_shape != PRESETS[options.preset].nvae.image_shape:
        raise UserError(
            f"{options.nvae} makes images of shape {vae.image_shape} (C, H, W), but preset {options.preset} is for "
            f"{PRESETS[options.preset].nvae.image_shape}; name another preset, or give --steps and --step-size."
        )
    if options.energy is None or options.chain().steps == 0:
        return vae.requires_grad_(False), None
    has_blocks = options.energy_arch is not None and find_energy_arch(options.energy_arch) is None
    side = vae.image_shape[1] if has_blocks else None  # blocks do not determine the image size
    energy = load_energy(options.energy, arch=options.energy_arch, image_size=side, device=device)
    return vae.requires_grad_(False), energy.requires_grad_(False)


def _warn_unless_readjusted(nvae: Path, temperature: float) -> None:
    """Below temperature 1 the decoder's feature statistics differ from batch normalisation's running statistics."""
    if 0 < temperature < 1 and describe(nvae)["info"].get("temperature") != temperature:
        warnings.warn(
            f"The batch normalisation of {nvae} is not readjusted to temperature {temperature:g}; "
            f"`vaebm-fast readjust {nvae} --temperature {temperature:g}` writes a readjusted NVAE.",
            stacklevel=2,
        )


def _sampler(options: SampleOptions, vae: NVAE, energy: EnergyNetwork | None) -> LangevinSampler:
    """The sampler of the frozen networks."""
    form: tuple[torch.dtype, Backend] = getattr(torch, options.dtype), options.backend
    model = freeze(VAEBM(vae, energy), *form) if energy else FrozenNVAE(vae, *form)
    return LangevinSampler(model, **asdict(options.chain()))


def _share(
    ranks: Ranks,
    folder: Folder,
    seeds: Seeds,
    sampler: LangevinSampler,
    plan: Plan,
    output: Output,
    look: Callable[[], None],
) -> Report:
    """Compute and write this process's share of the missing blocks."""
    on_gpu = sampler.device.type == "cuda"
    writers = min(MOST_WRITERS, max(1, (os.cpu_count() or 1) // ranks.local_world)) if on_gpu else 1
    blocks, meter = BlockSampler(sampler, plan.batch_size), gpu_meter(sampler.device)
    images, began = 0, time.perf_counter()
    with meter or nullcontext(), Writer(folder, output, Journal(folder, ranks.rank), writers) as writer:
        for index in plan.todo[ranks.rank :: ranks.world]:
            block = blocks.run(index, seeds.block(index, plan.batch_size))
            writer.submit(block)
            images += len(block.seeds)
            look()
    seconds = time.perf_counter() - began
    return Report(
        ranks.rank,
        torch.cuda.get_device_name(sampler.device) if on_gpu else "cpu",
        images,
        seconds,
        images / seconds,
        blocks.at_once,
        torch.cuda.max_memory_allocated(sampler.device) / 2**30 if on_gpu else None,
        meter.figures(images) if meter else None,
    )


@contextmanager
def _progress(
    options: SampleOptions, ranks: Ranks, folder: Folder, total: int, done: int
) -> Iterator[Callable[[], None]]:
    """Yield a function that updates rank 0's progress bar with all processes' images; a no-op on other ranks."""
    if ranks.rank != 0:
        yield lambda: None
        return
    watcher = Watcher(folder)
    with tqdm(total=total, initial=done, unit="image", disable=None if options.progress else True) as bar:

        def look() -> None:
            bar.update(watcher.new_images())

        yield look
        look()


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic cuDNN algorithms, no benchmarking; restores these settings and the thread count on exit."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
