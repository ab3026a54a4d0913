"""Computes blocks of seeds: halves the batch when out of memory, copies images to the host asynchronously."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vaebm_fast.chain.langevin import Chains, LangevinSampler, to_uint8
from vaebm_fast.runtime.errors import AGAIN
from vaebm_fast.sampling.folder import SamplingError

MOST_IMAGES, MOST_PIXELS = 512, {"cuda": 64 * 256 * 256, "cpu": 4 * 64 * 64}  # per automatic batch
LEAST_BLOCKS = 64  # per job, if blocks keep at least 16 images: gives every process work
TOO_SMALL = (
    "One image does not fit in memory: free memory that other programs use, or use --dtype bfloat16; then "
    + AGAIN
    + "."
)
USED_SHARE = 0.45  # of free memory: captured chains keep the largest graph's memory, and an eager chain needs its own


@dataclass(frozen=True)
class Block:
    """One computed block: `images` is uint8 [n, H, W, C] for `seeds`; other fields as in `Record`."""

    index: int
    seeds: list[int]
    images: Tensor
    copied: torch.cuda.Event | None
    redone: list[int]
    failed: list[int]
    computed_at_once: int

    def on_host(self) -> np.ndarray:
        """The images as NumPy; waits for the copy to the host."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.images.numpy()


class BlockSampler:
    """Runs a sampler on blocks, `at_once` images at a time: a whole block until memory runs out, then halves."""

    def __init__(self, sampler: LangevinSampler, batch_size: int) -> None:
        self._sampler = sampler
        self.at_once = batch_size

    def run(self, index: int, seeds: Sequence[int]) -> Block:
        """Compute block `index`. Raises SamplingError if one image does not fit in memory."""
        done: list[int] = []
        images: list[Tensor] = []
        redone: list[int] = []
        failed: list[int] = []
        while len(done) + len(failed) < len(seeds):
            at = len(done) + len(failed)
            part = list(seeds[at : at + self.at_once])
            chains = self._chains(part)
            if chains is None:
                self._halve(len(part))
                continue
            bad = {int(position) for position in chains.failed}
            good = [position for position in range(len(part)) if position not in bad]
            images.append(to_uint8(chains.images[good] if bad else chains.images))
            done += [part[position] for position in good]
            redone += [part[position] for position in chains.redone if int(position) not in bad]
            failed += [part[position] for position in sorted(bad)]
        host, copied = _to_host(images[0] if len(images) == 1 else torch.cat(images))
        return Block(index, done, host, copied, redone, failed, min(self.at_once, len(seeds)))

    def _chains(self, seeds: list[int]) -> Chains | None:
        """The chains of these seeds, or None if out of memory; then no reference to their tensors remains."""
        try:
            return self._sampler.run(seeds, nonfinite="redo")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None

    def _halve(self, images: int) -> None:
        if images == 1:
            raise SamplingError(TOO_SMALL)
        self.at_once = math.ceil(images / 2)
        if self._sampler.device.type == "cuda":
            torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch ran out of memory: OutOfMemoryError on a GPU, a plain RuntimeError on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _to_host(images: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """(images in host memory, event that marks the end of the copy from a GPU or None), without a host sync."""
    if images.device.type != "cuda":
        return images, None
    host = torch.empty(images.shape, dtype=images.dtype, device="cpu", pin_memory=True)
    host.copy_(images, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def automatic_batch_size(sampler: LangevinSampler, total: int) -> int:
    """A power of two, limited by what saturates the device, by its free memory and by LEAST_BLOCKS.

    Independent of the number of processes, so that this number changes no image.
    """
    _, height, width = sampler.noise_layout.image_shape
    most = min(MOST_PIXELS[sampler.device.type] // (height * width), MOST_IMAGES, max(16, total // LEAST_BLOCKS))
    if sampler.device.type == "cuda" and most > 1:
        most = min(most, _that_fit(sampler))
    return int(2 ** math.floor(math.log2(max(1, most))))


def _that_fit(sampler: LangevinSampler) -> int:
    """How many images fit in free memory, from one step's peak memory at batch 1 and 4; 0 if these do not fit."""
    first, potential = sampler.step_sizes[:1], sampler.potential
    probe = LangevinSampler(sampler.model, steps=len(first), step_size=first, potential=potential, capture=False)
    peaks = []
    for images in (1, 4):
        torch.cuda.reset_peak_memory_stats(sampler.device)
        before = torch.cuda.memory_allocated(sampler.device)
        try:
            probe.run(range(images), nonfinite="redo")
        except torch.OutOfMemoryError:
            return 0
        peaks.append(torch.cuda.max_memory_allocated(sampler.device) - before)
    per_image = max(1, (peaks[1] - peaks[0]) // 3)
    fixed = max(0, peaks[0] - per_image)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(sampler.device)
    return int((USED_SHARE * free - fixed) // per_image)
