"""Counter-based noise: Philox4x32-10 words, and normals and uniforms made from them.

Element e of draw k for seed s depends only on (s, k, stream, e) and has the same bits on every backend; csrc/philox.h
defines it. `chain.noise` assigns the streams.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend, choose

MAX_NUMEL = 2**34


def philox_words(seeds: Tensor, draw: Tensor, *, stream: int, numel: int, backend: Backend = "auto") -> Tensor:
    """The words w[n, e] = Philox4x32-10(key = seeds[n], counter = (e // 4, draw, stream, 0))[e % 4], int32 [N, numel].

    seeds: int64 [N], the bits of numbers in 0..2^64-1, one per image.
    draw: int64 [] or [1] on the seeds' device; only its low 32 bits count. It is a tensor so that graph replays can
    draw fresh noise. stream: 0..2^32-1; streams are independent. numel: elements per image, at most 2^34.
    Each int32 holds the bits of a uint32. Not differentiable.
    Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    check_noise(seeds, draw, stream, numel)
    chosen = choose("philox_words", seeds.device, backend)
    if chosen == "reference":
        return reference.philox_words(seeds, draw, stream=stream, numel=numel)
    words: Tensor = _register.ops_of(chosen).philox_words(seeds, draw, stream, numel)
    return words


def philox_normal(seeds: Tensor, draw: Tensor, *, stream: int, numel: int, backend: Backend = "auto") -> Tensor:
    """Standard normals z[n, e] by Box-Muller from the words of `philox_words`, float32 [N, numel]; same arguments.

    (z0, z1) = sqrt(-2 log u) (cos, sin)(2 pi w1 / 2^32) with u = w0 / 2^32 + 2^-33; |z| < 6.77.
    """
    check_noise(seeds, draw, stream, numel)
    chosen = choose("philox_normal", seeds.device, backend)
    if chosen == "reference":
        return reference.philox_normal(seeds, draw, stream=stream, numel=numel)
    normals: Tensor = _register.ops_of(chosen).philox_normal(seeds, draw, stream, numel)
    return normals


def philox_uniform(seeds: Tensor, draw: Tensor, *, stream: int, numel: int, backend: Backend = "auto") -> Tensor:
    """Uniforms (2 j + 1) / 2^24 in (0, 1), float32 [N, numel], with j the upper 23 bits of a word of `philox_words`."""
    words = philox_words(seeds, draw, stream=stream, numel=numel, backend=backend)
    return ((words >> 9) & 0x7FFFFF).mul_(2).add_(1).to(torch.float32).mul_(2.0**-24)


def check_noise(seeds: Tensor, draw: Tensor, stream: int, numel: int) -> None:
    """Raise ValueError unless these are arguments of `philox_words`."""
    if seeds.dim() != 1 or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 [N], one per image; they are {seeds.dtype} {list(seeds.shape)}.")
    if draw.numel() != 1 or draw.dtype != torch.int64:
        raise ValueError(f"draw must be one int64 number; it is {draw.dtype} {list(draw.shape)}.")
    if draw.device != seeds.device:
        raise ValueError(f"draw is on {draw.device} but seeds are on {seeds.device}; move it there.")
    if not 0 <= stream < 2**32:
        raise ValueError(f"stream is {stream}; it must be within 0..2^32-1.")
    if not 0 <= numel <= MAX_NUMEL:
        raise ValueError(f"numel is {numel}; it must be within 0..2^34.")


def _fake(dtype: torch.dtype, seeds: Tensor, *others: Any) -> Tensor:
    *_, numel = others
    return seeds.new_empty((seeds.shape[0], numel), dtype=dtype)


for _op, _dtype in (("philox_words", torch.int32), ("philox_normal", torch.float32)):
    _schema = f"{_op}(Tensor seeds, Tensor draw, int stream, int numel) -> Tensor"
    _register.define(_schema, partial(_fake, _dtype), module="philox_normal")
