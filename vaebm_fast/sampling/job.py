"""Runs a sampling job: each rank loads, then computes its share of the blocks; rank 0 assembles the output.

Blocks are aligned pieces of the seeds and are never split between ranks, so a block is the same batch in every run,
whatever the number of processes. A chain that fails twice has no image; a rerun does not retry it: it would fail again.
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
from vaebm_fast.config import find_energy_arch
from vaebm_fast.frozen import FrozenNVAE, freeze
from vaebm_fast.models import NVAE, VAEBM, EnergyNetwork
from vaebm_fast.runtime.command import FAILED, INTERRUPTED
from vaebm_fast.runtime.errors import AGAIN, UserError, sentence
from vaebm_fast.runtime.ranks import ProcessLostError, Ranks, joined, of_torchrun, start
from vaebm_fast.runtime.signals import interruptible
from vaebm_fast.sampling import journal
from vaebm_fast.sampling.assembly import assemble
from vaebm_fast.sampling.blocks import TOO_SMALL, BlockSampler, is_out_of_memory
from vaebm_fast.sampling.folder import Folder, SamplingError
from vaebm_fast.sampling.journal import Journal, Watcher
from vaebm_fast.sampling.options import Job, SampleOptions
from vaebm_fast.sampling.outputs import Output
from vaebm_fast.sampling.plan import Plan, make_plan
from vaebm_fast.sampling.summary import Report, conclude
from vaebm_fast.sampling.telemetry import gpu_meter
from vaebm_fast.sampling.writer import Writer

MOST_WRITERS = 4


def run_job(options: SampleOptions) -> int:
    """Run or complete the job; returns the exit code: 0, or 130 after an interruption.

    Raises UserError with a one-sentence message, also after writing all images of a job in which some chains failed.
    """
    job, ranks = options.resolve(), of_torchrun()
    if ranks is not None:
        if options.processes is not None:
            raise UserError("torchrun starts the processes; leave out --processes.")
        return run_rank(job, ranks)
    on_gpus = job.device.type == "cuda"
    gpus = torch.cuda.device_count() if on_gpus else 1
    processes = options.processes or gpus
    if on_gpus and processes > gpus:
        raise UserError(f"{processes} processes need as many GPUs, but torch finds {gpus}; start at most {gpus}.")
    if processes == 1:
        return run_rank(job, Ranks())
    with interruptible():
        return start(partial(run_rank, job), processes)


def run_rank(job: Job, ranks: Ranks, store: Path | None = None) -> int:
    """Run one rank of the job; ranks connect through the file `store`, or through torchrun's environment."""
    with interruptible():
        try:
            with joined(ranks, store), _reproducible():
                return _work(job, ranks)
        except KeyboardInterrupt:
            if ranks.speaks:
                print(f"Stopped; {AGAIN}.")
            return INTERRUPTED
        except ProcessLostError:
            if ranks.speaks:
                raise
            return FAILED


def _work(job: Job, ranks: Ranks) -> int:
    began = time.perf_counter()
    folder, seeds = Folder(job.options.out), job.seeds
    try:
        ready = _prepare(job, ranks, folder)
        if ready is None:
            return 0
        sampler, plan = ready
        output = job.output(sampler.noise_layout.image_shape)
        with _progress(job, ranks, folder, plan.images_done) as look:
            report = _share(job, ranks, folder, sampler, plan, output, look)
            ranks.wait(look)
        reports = ranks.exchange(report)
        if ranks.rank == 0:
            records = journal.read_all(folder, seeds.total_blocks(plan.batch_size))
            assemble(folder, output, seeds, plan.batch_size, plan.intact, records)
            print(conclude(folder, seeds, plan, records.values(), reports, time.perf_counter() - began))
    finally:
        folder.release()
    return 0


def _prepare(job: Job, ranks: Ranks, folder: Folder) -> tuple[LangevinSampler, Plan] | None:
    """This rank's sampler and the plan of rank 0, which first locks the folder.

    If one rank fails, none continues: those that print messages raise its error, the others get None.
    """
    plan: Plan | None = None
    failure: Exception | None = None
    try:
        if ranks.rank == 0:
            folder.prepare()
        vae, energy = _load(job, ranks)
        sampler = _sampler(job, vae, energy)
        if ranks.rank == 0:
            _warn_unless_readjusted(job.options.nvae, job.chain.temperature)
            hashes = {"nvae": content_sha256(vae)} | ({"energy": content_sha256(energy)} if energy else {})
            threads = max(1, torch.get_num_threads() // ranks.local_world)
            plan = make_plan(job, folder, sampler, hashes, threads)
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


def _load(job: Job, ranks: Ranks) -> tuple[NVAE, EnergyNetwork | None]:
    """The networks on this rank's device; no energy network for 0 steps. Raises UserError for unsuitable files."""
    options, device = job.options, job.device
    if device.type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Local rank {ranks.local_rank} has no GPU: torch finds {torch.cuda.device_count()}; "
                "start one process per GPU."
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    vae = load_nvae(options.nvae, device=device)
    if job.image_shape not in (None, vae.image_shape):
        raise UserError(
            f"{options.nvae} makes images of shape {vae.image_shape} (C, H, W), but preset {options.preset} is for "
            f"{job.image_shape}; use another preset, or give the chain by its own options."
        )
    if job.energy is None:
        return vae.requires_grad_(False), None
    has_blocks = options.energy_arch is not None and find_energy_arch(options.energy_arch) is None
    side = vae.image_shape[1] if has_blocks else None  # blocks do not determine the image size
    energy = load_energy(job.energy, arch=options.energy_arch, image_size=side, device=device)
    return vae.requires_grad_(False), energy.requires_grad_(False)


def _warn_unless_readjusted(nvae: Path, temperature: float) -> None:
    """Below temperature 1, feature statistics differ from those that batch normalisation has from training."""
    if 0 < temperature < 1 and describe(nvae)["info"].get("temperature") != temperature:
        warnings.warn(
            f"The batch normalisation of {nvae} is not readjusted to temperature {temperature:g}; "
            f"`vaebm-fast readjust {nvae} --temperature {temperature:g}` writes a readjusted NVAE.",
            stacklevel=2,
        )


def _sampler(job: Job, vae: NVAE, energy: EnergyNetwork | None) -> LangevinSampler:
    """The sampler of the frozen networks."""
    form = job.dtype, job.options.backend
    model = freeze(VAEBM(vae, energy), *form) if energy else FrozenNVAE(vae, *form)
    return LangevinSampler(model, **asdict(job.chain))


def _share(
    job: Job,
    ranks: Ranks,
    folder: Folder,
    sampler: LangevinSampler,
    plan: Plan,
    output: Output,
    look: Callable[[], None],
) -> Report:
    """Compute and write this rank's share of the missing blocks."""
    on_gpu = sampler.device.type == "cuda"
    writers = min(MOST_WRITERS, max(1, (os.cpu_count() or 1) // ranks.local_world)) if on_gpu else 1
    blocks, meter = BlockSampler(sampler, plan.batch_size), gpu_meter(sampler.device)
    images, began = 0, time.perf_counter()
    with meter or nullcontext(), Writer(folder, output, Journal(folder, ranks.rank), writers) as writer:
        for index in plan.todo[ranks.rank :: ranks.world]:
            block = blocks.run(index, job.seeds.block(index, plan.batch_size))
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
def _progress(job: Job, ranks: Ranks, folder: Folder, done: int) -> Iterator[Callable[[], None]]:
    """Yields a function that updates the progress bar, which rank 0 shows for the images of all ranks."""
    if ranks.rank != 0:
        yield lambda: None
        return
    watcher = Watcher(folder)
    disable = None if job.options.progress else True  # None: unless stderr is a terminal
    with tqdm(total=len(job.seeds), initial=done, unit="image", disable=disable) as bar:

        def look() -> None:
            bar.update(watcher.new_images())

        yield look
        look()


@contextmanager
def _reproducible() -> Iterator[None]:
    """Deterministic cuDNN algorithms, not chosen by timing; restores cuDNN flags and torch threads afterwards."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
