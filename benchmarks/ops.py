"""How fast is each op, beside its twin in plain PyTorch and beside what the machine can do at most?

An op gets its rows by an entry in CASES: the shapes that the presets' models give it, what it moves and computes, and
how its tensors are made. Bytes are those that its docstring promises: every tensor read or written once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.measure import summary, take_turns
from vaebm_fast.noise import Stream, draw_tensor, seed_tensor
from vaebm_fast.ops import _backend
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward
from vaebm_fast.ops.philox_normal import philox_normal


class Run(Protocol):
    """The op on tensors that are there already."""

    def __call__(self, *, backend: Any) -> Tensor: ...


@dataclass(frozen=True)
class Case:
    """An op at one shape. `make` allocates its tensors on a device; `tests` is the file that the op must pass."""

    op: str
    shape: str
    bytes_moved: int
    flops: int
    make: Callable[[torch.device], Run]
    tests: str
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


def _depthwise(N: int, C: int, H: int, K: int = 5, *, upsample: bool = False) -> list[Case]:
    """Forward and backward of the depthwise on an H x H image; upsampled, the result has twice the side."""
    scale, taps = (2, (K + 1) // 2) if upsample else (1, K)
    small, large = N * C * H * H, N * C * (scale * H) ** 2

    def tensors(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, dy = (torch.randn(N, C, side, side, device=device) for side in (H, scale * H))
        weight, bias = torch.randn(K, K, C, device=device), torch.randn(C, device=device)
        return h.to(memory_format=torch.channels_last), dy.to(memory_format=torch.channels_last), weight, bias

    def forward(device: torch.device) -> Run:
        h, _, weight, bias = tensors(device)
        return lambda *, backend: depthwise_swish(h, weight, bias, upsample=upsample, backend=backend)

    def backward(device: torch.device) -> Run:
        h, dy, weight, _ = tensors(device)
        return lambda *, backend: depthwise_swish_backward(dy, h, weight, upsample=upsample, backend=backend)

    shape = f"{N}x{C}x{H}x{H}, K = {K}{', up' if upsample else ''}"
    flops, tests = 2 * taps**2 * large, "tests/test_depthwise_swish.py"
    return [
        Case("depthwise_swish", shape, 4 * (small + large), flops, forward, tests),
        Case("depthwise_swish_backward", shape, 4 * (2 * small + large), flops, backward, tests),
    ]


def _philox_normal(N: int, D: int) -> list[Case]:
    """Noise of N images; its integer work is not counted as FLOPs."""

    def make(device: torch.device) -> Run:
        seeds, draw = seed_tensor(range(N), device), draw_tensor(1, device)
        return lambda *, backend: philox_normal(seeds, draw, stream=int(Stream.CHAIN), numel=D, backend=backend)

    return [Case("philox_normal", f"{N}x{D}", 4 * N * D, 0, make, "tests/test_noise.py")]


CASES: tuple[Case, ...] = (
    *_depthwise(1, 384, 128),  # celeba_256, highest resolution of its latents
    *_depthwise(1, 768, 64),
    *_depthwise(1, 3072, 16),
    *_depthwise(1, 192, 128, upsample=True),  # celeba_256, post-processing
    *_depthwise(1, 96, 256),
    *_depthwise(4, 1152, 16),  # celeba_64
    *_depthwise(4, 288, 32, upsample=True),
    *_depthwise(4, 1536, 16),  # cifar10
    *_philox_normal(1, 1_942_528),  # celeba_256
    *_philox_normal(16, 146_688),  # celeba_64
)


def backends_of(op: str, device: torch.device) -> list[str]:
    """Who can run the op on this device here, its twin among them."""
    return [name for name in _backend.OP_BACKENDS[op] if _backend.why_not(op, device, name) is None]


def measure_case(case: Case, device: torch.device, *, rounds: int | None = None) -> dict[str, dict[str, Any]]:
    """A row per backend that can run the case, measured in turns."""
    backends = backends_of(case.op, device)
    run = case.make(device)
    samples = take_turns({name: _bound(run, name) for name in backends}, device, rounds=rounds, seconds=0.5)
    facts = {
        "op": case.op,
        "shape": case.shape,
        "dtype": case.dtype,
        "bytes": case.bytes_moved,
        "flops": case.flops,
    }
    return {name: {**facts, "candidate": name, "backend": name, **summary(samples[name])} for name in backends}


def _bound(run: Run, backend: str) -> Callable[[], object]:
    return lambda: run(backend=backend)


def cases_of(ops: Sequence[str] | None) -> list[Case]:
    """The cases of these ops, by default all. Raises ValueError for an op that has none."""
    known = {case.op for case in CASES}
    unknown = sorted(set(ops or ()) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has no case; there are {', '.join(sorted(known))}.")
    return [case for case in CASES if ops is None or case.op in ops]
