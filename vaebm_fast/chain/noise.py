"""Counter-based noise for chains and training: seeds, streams, draws.

An image depends only on its seed and the configuration, not on the batch, rank, device or backend. One float32 vector
eps [D] holds all noise of an image; a model's `noise_layout` splits it into tensors. `ops` generates the numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from enum import IntEnum

import torch
from torch import Tensor

from vaebm_fast.ops._backend import Backend
from vaebm_fast.ops.philox_normal import philox_normal, philox_uniform
from vaebm_fast.runtime.errors import UserError


class Stream(IntEnum):
    """Uses of noise. Streams are independent, so each use numbers its own draws."""

    CHAIN = 0  # a sampling chain: draw 0 is its start, draw k its step k
    TRAIN_POSTERIOR = 1  # eps_q while the NVAE trains
    TRAIN_CHAIN = 2  # a chain that makes negatives: draw 0 is its start, draw k its step k
    REPLAY = 3  # which chains start from the replay buffer, and from which entry
    READJUST = 4  # latents for readjusting batch-norm statistics


def seed_tensor(seeds: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    """Seeds 0..2^64-1 as int64 [N] on `device`; seeds from 2^63 on wrap to the negative number with the same bits.

    Raises ValueError for a seed out of range, TypeError for one that is not an integer.
    """
    numbers = [operator.index(seed) for seed in seeds]
    for number in numbers:
        if not 0 <= number < 2**64:
            raise UserError(f"Seed {number} is out of range; seeds are whole numbers from 0 to 2^64-1.")
    signed = [number - 2**64 if number >= 2**63 else number for number in numbers]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def draw_tensor(draw: int, device: torch.device | str = "cpu") -> Tensor:
    """Draw number k in 0..2^32-1 as int64 [] on `device`; a captured graph adds to it in place. Raises ValueError."""
    if not 0 <= draw < 2**32:
        raise ValueError(f"Draw {draw} is out of range; draws are numbered from 0 to 2^32-1.")
    return torch.tensor(draw, dtype=torch.int64, device=device)


def normal(seeds: Tensor, draw: int | Tensor, stream: Stream, dim: int, *, backend: Backend = "auto") -> Tensor:
    """Standard normals, float32 [N, dim], one row per seed of `seed_tensor`; `draw` numbers the draws of a stream."""
    return philox_normal(seeds, _as_draw(draw, seeds), stream=int(stream), numel=dim, backend=backend)


def uniform(seeds: Tensor, draw: int | Tensor, stream: Stream, dim: int, *, backend: Backend = "auto") -> Tensor:
    """Uniforms strictly within (0, 1), float32 [N, dim]; arguments as in `normal`."""
    return philox_uniform(seeds, _as_draw(draw, seeds), stream=int(stream), numel=dim, backend=backend)


def _as_draw(draw: int | Tensor, seeds: Tensor) -> Tensor:
    return draw if isinstance(draw, Tensor) else draw_tensor(draw, seeds.device)


def step_seeds(seed: int, step: int, batch: int, device: torch.device) -> Tensor:
    """One noise seed per image of a training step, [N]: image j of step t gets seed 2^40 `seed` + t N + j mod 2^64.

    Runs whose seeds differ by less than 2^24 share no noise seed within 2^40 images.
    """
    seed, step, batch = map(operator.index, (seed, step, batch))  # NumPy's integers would overflow
    first = (seed << 40) + step * batch
    return seed_tensor(((first + j) % 2**64 for j in range(batch)), device)
