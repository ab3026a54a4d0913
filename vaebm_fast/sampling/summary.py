"""Concludes a job: writes summary.json, and makes the final message or the error for failed chains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from vaebm_fast.sampling.folder import Folder, SamplingError
from vaebm_fast.sampling.journal import Record
from vaebm_fast.sampling.plan import Plan
from vaebm_fast.sampling.seeds import Seeds

NAME = "summary.json"


@dataclass(frozen=True)
class Report:
    """One rank's part of this run. computed_at_once: images per batch, reduced if memory ran out."""

    rank: int
    device: str
    images: int
    seconds: float
    images_per_second: float
    computed_at_once: int
    memory_gib: float | None  # peak of torch's allocations
    gpu: dict[str, float | None] | None


def conclude(
    folder: Folder, seeds: Seeds, plan: Plan, records: Iterable[Record], reports: Sequence[Report], total_s: float
) -> str:
    """Write the summary of a complete job, unless an earlier run wrote it; returns the message to print.

    Raises SamplingError naming the seeds of failed chains, which have no image.
    """
    records = list(records)
    failed = sorted(seed for record in records for seed in record.failed)
    images, seconds = sum(report.images for report in reports), max(report.seconds for report in reports)
    rate = images / seconds if seconds > 0 else 0.0
    if plan.todo or not (folder.out / NAME).exists():
        summary = {
            "images": len(seeds) - len(failed),
            "finished_seeds": seeds.without(failed),
            "redone_seeds": sorted(seed for record in records for seed in record.redone),
            "failed_seeds": failed,
            "batch_size": plan.batch_size,
            "blocks_computed_in_pieces": sorted(
                record.block
                for record in records
                if record.computed_at_once < len(seeds.block(record.block, plan.batch_size))
            ),
            "this_run": {
                "images": images,
                "seconds": seconds,
                "images_per_second": rate,
                "seconds_with_loading": total_s,
                "processes": [asdict(report) for report in reports],
            },
        }
        folder.write_json(NAME, summary)
    if failed:
        shown = ", ".join(map(str, failed[:8])) + (f" and {len(failed) - 8} more" if len(failed) > 8 else "")
        raise SamplingError(
            f"{len(failed)} of {len(seeds)} chains were not finite, even when rerun, and have no image in "
            f"{folder.out} (seeds {shown}); use a smaller step size and another folder."
        )
    if not plan.todo:
        return f"All {len(seeds)} images are in {folder.out} and verified."
    return f"Made {images} images, {rate:.3g} per second; all {len(seeds)} are in {folder.out}."
