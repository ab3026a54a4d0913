"""Blocks of seeds computed into images: out of memory they are computed in halves, and copied to the host beside."""

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

MOST_IMAGES, MOST_PIXELS = 512, {"cuda": 64 * 256 * 256, "cpu": 4 * 64 * 64}  # of an automatic batch
LEAST_BLOCKS = 64  # of a job, where that leaves blocks of 16: so that no process is left without
TOO_SMALL = (
    "The memory does not take even one image: free what else uses it, or use --dtype bfloat16; then " + AGAIN + "."
)
USED_SHARE = (
    0.45  # of the free memory: captured chains keep what the largest took, and one that runs eagerly takes its own
)


@dataclass(frozen=True)
class Block:
    """Computed seeds: `images` uint8 [n, H, W, C] of `seeds`; the rest is as in `Record`."""

    index: int
    seeds: list[int]
    images: Tensor
    copied: torch.cuda.Event | None
    redone: list[int]
    failed: list[int]
    computed_at_once: int

    def on_host(self) -> np.ndarray:
        """The images, once they have arrived."""
        if self.copied is not None:
            self.copied.synchronize()
        return self.images.numpy()


class BlockSampler:
    """Runs a sampler on blocks, `at_once` images at a time: all of a block until the memory does not take them."""

    def __init__(self, sampler: LangevinSampler, batch_size: int) -> None:
        self._sampler = sampler
        self.at_once = batch_size

    def run(self, index: int, seeds: Sequence[int]) -> Block:
        """Block `index`. Raises SamplingError where the memory does not take one image."""
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
        """The chains of these seeds; None where memory ran out, and then nothing holds what they had taken."""
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
    """Whether torch had no memory for a tensor: a GPU's has an error of its own, the host's a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _to_host(images: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The images in host memory, and from a GPU the event after which they are there; the device is not waited for."""
    if images.device.type != "cuda":
        return images, None
    host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
    host.copy_(images, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied


def automatic_batch_size(sampler: LangevinSampler, total: int) -> int:
    """A power of two: as many images as keep the device busy, as its free memory takes, and as leave enough blocks.

    The number of processes is not asked, so that it changes no image.
    """
    _, height, width = sampler.noise_layout.image_shape
    most = min(MOST_PIXELS[sampler.device.type] // (height * width), MOST_IMAGES, max(16, total // LEAST_BLOCKS))
    if sampler.device.type == "cuda" and most > 1:
        most = min(most, _that_fit(sampler))
    return int(2 ** math.floor(math.log2(max(1, most))))


def _that_fit(sampler: LangevinSampler) -> int:
    """How many images the free memory takes, from what one step needs for one and for four; 0 where it does not."""
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
