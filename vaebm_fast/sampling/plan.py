"""The plan of a run: the job's settings, checked against its folder, and the missing blocks."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vaebm_fast.chain.langevin import LangevinSampler
from vaebm_fast.runtime.errors import AGAIN
from vaebm_fast.sampling import journal, manifest
from vaebm_fast.sampling.assembly import intact_products, needs_part
from vaebm_fast.sampling.blocks import automatic_batch_size
from vaebm_fast.sampling.folder import Folder, SamplingError
from vaebm_fast.sampling.options import Job
from vaebm_fast.sampling.outputs import Output


@dataclass(frozen=True)
class Plan:
    """Decisions of rank 0 for all ranks.

    threads: torch threads per process on a CPU, which decide the order of sums. intact: products that are complete.
    """

    batch_size: int
    threads: int | None
    todo: list[int]
    images_done: int
    intact: set[str]


def make_plan(job: Job, folder: Folder, sampler: LangevinSampler, hashes: Mapping[str, str], threads: int) -> Plan:
    """Check the settings against the folder, keep verified blocks, drop damaged ones. Raises SamplingError.

    hashes: of the networks. threads: torch threads per process on a CPU; a started folder keeps its number.
    """
    options, seeds, made_with = job.options, job.seeds, _made_with(sampler.device)
    settings = manifest.settle(
        folder,
        _asked(job, sampler, hashes),
        lambda: {
            "batch_size": options.batch_size or automatic_batch_size(sampler, len(seeds)),
            "threads": threads if sampler.device.type == "cpu" else None,
            "made_with": made_with,
        },
    )
    batch_size = settings["batch_size"]
    output = job.output(sampler.noise_layout.image_shape)
    products, whole = output.products(len(seeds)), intact_products(folder, output, len(seeds))
    records = journal.read(folder)
    done = journal.intact(folder, records)
    for record in records:
        if not needs_part(record.block, batch_size, products, whole):
            done.setdefault(record.block, record)
    journal.merge(folder, done.values())
    todo = [block for block in range(seeds.total_blocks(batch_size)) if block not in done]
    if todo:
        missing = sum(len(seeds.block(block, batch_size)) for block in todo)
        _require_space(folder, output, missing + (len(seeds) if products else 0))
        _warn_of_another_machine(folder, settings.get("made_with", made_with), made_with)
    return Plan(batch_size, settings["threads"], todo, sum(record.images for record in done.values()), whole)


def _asked(job: Job, sampler: LangevinSampler, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The settings of this job that determine its images."""
    options, chain = job.options, asdict(job.chain)
    if chain["steps"] == 0:
        del chain["step_size"], chain["potential"]
    asked = {
        **hashes,
        "seeds": str(job.seeds),
        **chain,
        "dtype": options.dtype,
        "device": sampler.device.type,
        "backend": getattr(sampler.model, "backend", options.backend),
        "format": options.format,
        "flat": options.flat,
    }
    return {**asked, "batch_size": options.batch_size} if options.batch_size else asked


def _made_with(device: torch.device) -> str:
    """Software and hardware that may change the last bits of an image."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name(device)}"
    return f"torch {torch.__version__}, CPU with {torch.backends.cpu.get_cpu_capability()}"


def _warn_of_another_machine(folder: Folder, before: str, now: str) -> None:
    if before != now:
        warnings.warn(
            f"{folder.out} was started with {before} and continues with {now}; new images may differ by one grey level "
            "from those of the first setup.",
            stacklevel=2,
        )


def _require_space(folder: Folder, output: Output, images: int) -> None:
    """Raise if this many images certainly do not fit on the disk; warn if they may not."""
    needed, free = output.bytes_needed(images), folder.free_bytes()
    if needed <= free:
        return
    sizes = f"{needed / 2**30:.3g} GiB, but {folder.out} has {free / 2**30:.3g} GiB free"
    if output.is_exact:
        raise SamplingError(f"These images need {sizes}; free some space, or name a folder on another disk.")
    warnings.warn(f"These images need about {sizes}; if the disk fills up, free some space and {AGAIN}.", stacklevel=2)
