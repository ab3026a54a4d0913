"""How fast is each op, compared with its plain PyTorch reference and the machine's ceilings?

An op gets its rows by an entry in CASES: the shapes that the presets' models give it, what it moves and computes, and
how its tensors are made. Bytes are those that its docstring promises: every tensor read or written once.

On a GPU a call is shorter than its launch, and its tensors stay in the cache for the next. So many calls, on tensors of
their own that are several times the cache in all, are captured there into a graph, and its replay is timed; batches are
larger.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.captured import EAGER, captured, launched_by
from benchmarks.measure import Sample, summary, take_turns
from vaebm_fast.chain.noise import Stream, draw_tensor, seed_tensor
from vaebm_fast.ops import _backend
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample, bilinear_upsample_backward
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward
from vaebm_fast.ops.energy_epilogue import energy_epilogue, energy_epilogue_backward
from vaebm_fast.ops.energy_head import energy_head, energy_head_backward
from vaebm_fast.ops.gaussian_latent import gaussian_latent, gaussian_latent_backward
from vaebm_fast.ops.inverted_residual import (
    BlockWeights,
    inverted_residual,
    inverted_residual_backward,
    pack_inverted_residual,
)
from vaebm_fast.ops.langevin_update import langevin_update
from vaebm_fast.ops.philox_normal import philox_normal
from vaebm_fast.ops.pixel_head import pixel_head, pixel_head_backward
from vaebm_fast.ops.pointwise import pack_pointwise, pointwise, pointwise_backward
from vaebm_fast.ops.power_iteration import power_iteration
from vaebm_fast.ops.residual_tail import residual_tail, residual_tail_backward
from vaebm_fast.ops.se_gate_residual import se_gate_residual, se_gate_residual_backward
from vaebm_fast.reference import Activation


class Run(Protocol):
    """The op on tensors that are there already."""

    def __call__(self, *, backend: Any) -> object: ...


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


def depthwise_cases(N: int, C: int, H: int, K: int = 5, *, upsample: bool = False) -> list[Case]:
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
    flops, tests = 2 * taps**2 * large, "tests/ops/test_depthwise_swish.py"
    return [
        Case("depthwise_swish", shape, 4 * (small + large), flops, forward, tests),
        Case("depthwise_swish_backward", shape, 4 * (2 * small + large), flops, backward, tests),
    ]


def philox_normal_cases(N: int, D: int) -> list[Case]:
    """Noise of N images; its integer work is not counted as FLOPs."""

    def make(device: torch.device) -> Run:
        seeds, draw = seed_tensor(range(N), device), draw_tensor(1, device)
        return lambda *, backend: philox_normal(seeds, draw, stream=int(Stream.CHAIN), numel=D, backend=backend)

    return [Case("philox_normal", f"{N}x{D}", 4 * N * D, 0, make, "tests/chain/test_noise.py")]


def langevin_update_cases(N: int, D: int) -> list[Case]:
    """A step of N chains, noise included, over the state that the last call left."""

    def make(device: torch.device) -> Run:
        eps, gradient = _normal(device, N, D), _normal(device, N, D)
        seeds, draw = seed_tensor(range(N), device), draw_tensor(1, device)
        flags = torch.full_like(seeds, -1)
        stream, step_size = int(Stream.CHAIN), 3e-6
        return lambda *, backend: langevin_update(
            eps, gradient, seeds, draw, flags, stream=stream, step_size=step_size, backend=backend
        )

    return [Case("langevin_update", f"{N}x{D}", 12 * N * D, 0, make, "tests/ops/test_langevin_update.py")]


def _normal(device: torch.device, *size: int) -> Tensor:
    tensor = torch.randn(size, device=device)
    return tensor.to(memory_format=torch.channels_last) if len(size) == 4 else tensor


def pointwise_cases(N: int, Cin: int, Cout: int, H: int, *, activation: Activation = "none") -> list[Case]:
    """Forward with bias and backward; an input that is activated is read once more backward."""
    x, y, weight = 4 * N * Cin * H * H, 4 * N * Cout * H * H, 4 * Cin * Cout

    def tensors(device: torch.device) -> tuple[Tensor, dict[str, Any], Tensor]:
        w = _normal(device, Cout, Cin) / Cin**0.5
        packed = {name: pack_pointwise(w, name) for name in backends_of("pointwise", device)}  # type: ignore[arg-type]
        return _normal(device, N, Cin, H, H), packed, _normal(device, N, Cout, H, H)

    def forward(device: torch.device) -> Run:
        given, packed, _ = tensors(device)
        bias = _normal(device, Cout)
        return lambda *, backend: pointwise(given, packed[backend], bias, activation=activation, backend=backend)

    def backward(device: torch.device) -> Run:
        given, packed, dy = tensors(device)
        x = None if activation == "none" else given
        return lambda *, backend: pointwise_backward(dy, packed[backend], x, activation=activation, backend=backend)

    shape = f"{N}x{Cin}x{H}x{H} to {Cout}{'' if activation == 'none' else f', {activation}'}"
    flops, tests = 2 * N * H * H * Cin * Cout, "tests/ops/test_pointwise.py"
    return [
        Case("pointwise", shape, x + y + weight, flops, forward, tests),
        Case("pointwise_backward", shape, (1 if activation == "none" else 2) * x + y + weight, flops, backward, tests),
    ]


def bilinear_upsample_cases(N: int, C: int, H: int) -> list[Case]:
    """From H x H pixels to twice the side, and back."""

    def forward(device: torch.device) -> Run:
        x = _normal(device, N, C, H, H)
        return lambda *, backend: bilinear_upsample(x, backend=backend)

    def backward(device: torch.device) -> Run:
        dy = _normal(device, N, C, 2 * H, 2 * H)
        return lambda *, backend: bilinear_upsample_backward(dy, backend=backend)

    shape, size, tests = f"{N}x{C}x{H}x{H}", 5 * 4 * N * C * H * H, "tests/ops/test_bilinear_upsample.py"
    return [
        Case("bilinear_upsample", shape, size, 0, forward, tests),
        Case("bilinear_upsample_backward", shape, size, 0, backward, tests),
    ]


def inverted_residual_cases(N: int, C: int, hidden: int, H: int, K: int = 5) -> list[Case]:
    """A whole block forward, with h2 for the backward, and backward; bfloat16."""

    def weights(device: torch.device) -> BlockWeights:
        """Such that every stage is of the order of one."""
        scaled = (
            2 * _normal(device, hidden, C) / C**0.5,
            _normal(device, hidden),
            _normal(device, K, K, hidden) / 3,
            _normal(device, hidden),
            _normal(device, C, hidden) / hidden**0.5,
            _normal(device, C),
        )
        return BlockWeights(*(weight.bfloat16() for weight in scaled))

    def forward(device: torch.device) -> Run:
        x, plain = _normal(device, N, C, H, H).bfloat16(), weights(device)
        packed = pack_inverted_residual(plain)

        def run(*, backend: Any) -> tuple[Tensor, Tensor | None]:
            given = plain if backend == "reference" else packed
            return inverted_residual(x, given, with_h2=True, backend=backend)

        return run

    def backward(device: torch.device) -> Run:
        ds, x = (_normal(device, N, C, H, H).bfloat16() for _ in range(2))
        h2 = _normal(device, N, hidden, H, H).bfloat16()
        plain = weights(device)
        packed = pack_inverted_residual(plain)

        def run(*, backend: Any) -> Tensor:
            given = plain if backend == "reference" else packed
            return inverted_residual_backward(ds, x, h2, given, backend=backend)

        return run

    pixels, shape, tests = N * H * H, f"{N}x{C}x{H}x{H}, hidden {hidden}", "tests/ops/test_inverted_residual.py"
    flops, dtype = 2 * pixels * hidden * (2 * C + K * K), "bfloat16"
    more = 2 * pixels * hidden * C  # h1 again
    return [
        Case("inverted_residual", shape, 2 * pixels * (2 * C + hidden), flops, forward, tests, dtype),
        Case("inverted_residual_backward", shape, 2 * pixels * (3 * C + hidden), flops + more, backward, tests, dtype),
    ]


def energy_epilogue_cases(N: int, C: int, H: int) -> list[Case]:
    """With a skip and a shift, each way."""

    def forward(device: torch.device) -> Run:
        (y, skip), shift = (_normal(device, N, C, H, H) for _ in range(2)), _normal(device, C)
        return lambda *, backend: energy_epilogue(y, skip, 0.9, shift, backend=backend)

    def backward(device: torch.device) -> Run:
        (du, y, skip), shift = (_normal(device, N, C, H, H) for _ in range(3)), _normal(device, C)
        return lambda *, backend: energy_epilogue_backward(du, y, skip, 0.9, shift, backend=backend)

    shape, size, tests = f"{N}x{C}x{H}x{H}", 4 * N * C * H * H, "tests/ops/test_energy_epilogue.py"
    return [
        Case("energy_epilogue", shape, 3 * size, 0, forward, tests),
        Case("energy_epilogue_backward", shape, 4 * size, 0, backward, tests),
    ]


def energy_head_cases(N: int, C: int, H: int) -> list[Case]:
    """With a skip and a shift, each way."""

    def forward(device: torch.device) -> Run:
        y, skip = (_normal(device, N, C, H, H) for _ in range(2))
        shift, weight, bias = _normal(device, C), _normal(device, C), _normal(device, 1)
        return lambda *, backend: energy_head(y, skip, 0.9, shift, weight, bias, backend=backend)

    def backward(device: torch.device) -> Run:
        y, skip = (_normal(device, N, C, H, H) for _ in range(2))
        denergy, shift, weight = _normal(device, N), _normal(device, C), _normal(device, C)
        return lambda *, backend: energy_head_backward(denergy, y, skip, 0.9, shift, weight, backend=backend)

    shape, size, tests = f"{N}x{C}x{H}x{H}", 4 * N * C * H * H, "tests/ops/test_energy_head.py"
    return [
        Case("energy_head", shape, 2 * size, 0, forward, tests),
        Case("energy_head_backward", shape, 3 * size, 0, backward, tests),
    ]


def se_gate_residual_cases(N: int, C: int, H: int) -> list[Case]:
    """Forward s is read for its mean too; backward dy and s for the gate's gradient, then dy again."""
    hidden = max(C // 16, 4)

    def weights(device: torch.device) -> list[Tensor]:
        return [_normal(device, *size) for size in ((hidden, C), (hidden,), (C, hidden), (C,))]

    def forward(device: torch.device) -> Run:
        s, skip = (_normal(device, N, C, H, H) for _ in range(2))
        given = weights(device)
        return lambda *, backend: se_gate_residual(s, skip, *given, backend=backend)

    def backward(device: torch.device) -> Run:
        dy, s = (_normal(device, N, C, H, H) for _ in range(2))
        inner, gate = _normal(device, N, hidden).relu(), _normal(device, N, C).sigmoid()
        first, _, second, _ = weights(device)
        return lambda *, backend: se_gate_residual_backward(dy, s, inner, gate, first, second, backend=backend)

    shape, size, tests = f"{N}x{C}x{H}x{H}", 4 * N * C * H * H, "tests/ops/test_se_gate_residual.py"
    return [
        Case("se_gate_residual", shape, 4 * size, 0, forward, tests),
        Case("se_gate_residual_backward", shape, 4 * size, 0, backward, tests),
    ]


def residual_tail_cases(N: int, hidden: int, C: int, H: int, K: int = 5, *, upsample: bool = False) -> list[Case]:
    """Behind the expansion to `hidden` channels on H x H pixels; the result has C, on twice the side if upsampled."""
    scale, taps, squeezed = (2, (K + 1) // 2, max(C // 16, 4)) if upsample else (1, K, max(C // 16, 4))
    side = scale * H
    sizes = ((K, K, hidden), (hidden,), (C, hidden), (C,), (squeezed, C), (squeezed,), (C, squeezed), (C,))

    def weights(device: torch.device) -> list[Tensor]:
        return [_normal(device, *size) / size[-1] ** 0.5 for size in sizes]

    def forward(device: torch.device) -> Run:
        h, skip, given = _normal(device, N, hidden, H, H), _normal(device, N, C, side, side), weights(device)
        return lambda *, backend: residual_tail(h, skip, *given, upsample=upsample, backend=backend)

    def backward(device: torch.device) -> Run:
        h, (dy, s) = _normal(device, N, hidden, H, H), (_normal(device, N, C, side, side) for _ in range(2))
        h2, gate = _normal(device, N, hidden, side, side), _normal(device, N, C).sigmoid()
        inner, (depthwise, _, project, _, first, _, second, _) = _normal(device, N, squeezed).relu(), weights(device)
        given = (dy, h, h2, s, inner, gate, depthwise, project, first, second)
        return lambda *, backend: residual_tail_backward(*given, upsample=upsample, backend=backend)

    shape = f"{N}x{hidden}x{H}x{H} to {C}, K = {K}{', up' if upsample else ''}"
    small, large, y = 4 * N * hidden * H * H, 4 * N * hidden * side * side, 4 * N * C * side * side
    flops, tests = N * side * side * hidden * (2 * taps**2 + 2 * C), "tests/ops/test_residual_tail.py"
    return [
        Case("residual_tail", shape, small + 2 * large + 4 * y, flops, forward, tests),
        Case("residual_tail_backward", shape, 2 * small + 3 * large + 4 * y, flops, backward, tests),
    ]


def heads_cases(N: int, L: int, H: int, *, pixels: bool = False) -> list[Case]:
    """Latents, or pixels, with log p each way."""

    def forward(device: torch.device) -> Run:
        raw, eps = _normal(device, N, 2 * L, H, H), _normal(device, N, L, H, H)
        if pixels:
            return lambda *, backend: pixel_head(raw, eps, with_log_p=True, backend=backend)
        return lambda *, backend: gaussian_latent(raw, eps, 1.0, with_log_p=True, backend=backend)

    def backward(device: torch.device) -> Run:
        raw, eps, dz = (_normal(device, N, channels, H, H) for channels in (2 * L, L, L))
        dlog_p = _normal(device, N)
        if pixels:
            return lambda *, backend: pixel_head_backward(dz, dlog_p, raw, eps, backend=backend)
        return lambda *, backend: gaussian_latent_backward(dz, dlog_p, raw, eps, 1.0, backend=backend)

    op = "pixel_head" if pixels else "gaussian_latent"
    shape, size, tests = f"{N}x{L}x{H}x{H}", 4 * N * L * H * H, f"tests/ops/test_{op}.py"
    return [
        Case(op, shape, 4 * size, 0, forward, tests),
        Case(f"{op}_backward", shape, 7 * size, 0, backward, tests),
    ]


def power_iteration_cases(B: int, M: int, K: int, iterations: int = 4) -> list[Case]:
    """A training step's iterations on convolutions of one shape; each reads W from a cache at best."""

    def make(device: torch.device) -> Run:
        weight, u, v = _normal(device, B, M, K), _normal(device, B, M), _normal(device, B, K)
        return lambda *, backend: power_iteration(weight, u, v, iterations=iterations, eps=1e-3, backend=backend)

    flops, tests = 4 * B * M * K * iterations, "tests/ops/test_power_iteration.py"
    return [Case("power_iteration", f"{B}x{M}x{K}, {iterations} times", 4 * B * M * K, flops, make, tests)]


def _table(one: int, four: int) -> tuple[Case, ...]:
    """All cases, with so many images where a CPU takes one, and where it takes four."""
    return (
        *pointwise_cases(one, 64, 384, 128),  # celeba_256: expand and project of its highest latents, of its lowest
        *pointwise_cases(one, 384, 64, 128, activation="swish"),
        *pointwise_cases(one, 1024, 6144, 8),
        *pointwise_cases(one, 6144, 1024, 8, activation="swish"),
        *pointwise_cases(four, 192, 1152, 16),  # celeba_64
        *pointwise_cases(four, 1152, 192, 16, activation="swish"),
        *bilinear_upsample_cases(one, 64, 64),  # celeba_256
        *energy_epilogue_cases(one, 64, 256),
        *energy_head_cases(one, 512, 4),
        *energy_head_cases(16, 256, 4),  # celeba_64, cifar10
        *se_gate_residual_cases(one, 64, 128),
        *se_gate_residual_cases(one, 512, 16),
        *residual_tail_cases(one, 3072, 512, 16),
        *heads_cases(one, 20, 128),
        *heads_cases(one, 3, 256, pixels=True),
        *power_iteration_cases(48, 512, 512),
        *power_iteration_cases(4, 1024, 9216),  # celeba_256, four of its largest: more than a GPU's cache
        *depthwise_cases(one, 384, 128),  # celeba_256, highest resolution of its latents
        *depthwise_cases(one, 768, 64),
        *depthwise_cases(one, 3072, 16),
        *depthwise_cases(one, 192, 128, upsample=True),  # celeba_256, post-processing
        *depthwise_cases(one, 96, 256),
        *depthwise_cases(four, 1152, 16),  # celeba_64
        *depthwise_cases(four, 288, 32, upsample=True),
        *depthwise_cases(four, 1536, 16),  # cifar10
        *inverted_residual_cases(16, 32, 96, 256),  # celeba_256: what its pair fuses
        *inverted_residual_cases(16, 64, 384, 128),
        *inverted_residual_cases(16, 128, 768, 64),
        *philox_normal_cases(one, 1_942_528),  # celeba_256
        *philox_normal_cases(16, 146_688),  # celeba_64
        *langevin_update_cases(one, 1_942_528),  # celeba_256
        *langevin_update_cases(16, 146_688),  # celeba_64
    )


CASES, GPU_CASES = _table(1, 4), _table(16, 16)
CACHES, MOST_BUFFERS = 4, 32  # tensors of a GPU's case: so many times the cache in all, but no more sets of them
GRAPH_BYTES, MOST_CALLS = 10**9, 128  # what a replay moves at least, some 0.3 ms, and in how many calls at most


def backends_of(op: str, device: torch.device, without: Sequence[str] = ()) -> list[str]:
    """Who can run the op on this device here, its reference among them; none of `without`."""
    known = [name for name in _backend.OP_BACKENDS[op] if name not in without]
    return [name for name in known if _backend.why_not(op, device, name) is None]


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether there is something to hold beside the op's reference on such devices, present here or not."""
    kinds = {"cpp"} if device.type == "cpu" else {"triton", "cuda"}
    return not kinds.isdisjoint(_backend.OP_BACKENDS[op])


@dataclass(frozen=True)
class Timed:
    """Something to time that makes `calls` calls, and how it is launched."""

    call: Callable[[], object]
    calls: int = 1
    launched: str = EAGER


def measure_case(
    case: Case, device: torch.device, *, rounds: int | None = None, without: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """A row per backend that can run the case, measured in turns; {"refused": why} for one that failed on a GPU."""
    facts = {"op": case.op, "shape": case.shape, "dtype": case.dtype, "bytes": case.bytes_moved, "flops": case.flops}
    backends, on_gpu = backends_of(case.op, device, without), device.type == "cuda"
    rows: dict[str, dict[str, Any]] = {name: {**facts, "candidate": name, "backend": name} for name in backends}
    runs = [case.make(device) for _ in range(buffers_of(case, cache_bytes(device)) if on_gpu else 1)]
    timed: dict[str, Timed] = {}
    for name in backends:
        try:
            timed[name] = _graph(case, runs, name, device) if on_gpu else Timed(_bound(runs[0], name))
        except Exception as error:  # the others may do without it
            rows[name] |= {"refused": f"{type(error).__name__}: {error}", "failed": True}
    if not timed:
        return rows
    steps = {name: entry.call for name, entry in timed.items()}
    samples = take_turns(steps, device, rounds=rounds, seconds=0.1 if on_gpu else 0.5)
    for name, entry in timed.items():
        each = [_shared(taken, entry.calls) for taken in samples[name]]
        rows[name] |= {"launched": entry.launched, "calls": entry.calls, "buffers": len(runs), **summary(each)}
    return rows


def cache_bytes(device: torch.device) -> int:
    """The GPU's last cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def buffers_of(case: Case, cache: int) -> int:
    """Number of tensor sets rotated on a GPU, so that none is still cached when it is reused."""
    return min(math.ceil(CACHES * cache / case.bytes_moved), MOST_BUFFERS)


def _graph(case: Case, runs: Sequence[Run], backend: str, device: torch.device) -> Timed:
    """Enough calls for a replay to be longer than its launch, captured, on one set of tensors after another."""
    calls = max(len(runs), min(math.ceil(GRAPH_BYTES / case.bytes_moved), MOST_CALLS))

    def together() -> None:
        results: deque[object] = deque(maxlen=len(runs))  # held, for the next call's to be other memory
        for index in range(calls):
            results.append(runs[index % len(runs)](backend=backend))

    call = captured(together, device)
    call()
    return Timed(call, calls, launched_by(call, device))


def _shared(taken: Sample, calls: int) -> Sample:
    """Of one of the calls."""
    return Sample(taken.wall_s / calls, taken.user_s / calls, taken.system_s / calls, taken.page_faults // calls)


def _bound(run: Run, backend: str) -> Callable[[], object]:
    return lambda: run(backend=backend)


def cases_of(ops: Sequence[str] | None, device: torch.device | None = None) -> list[Case]:
    """A device's cases of these ops, by default a CPU's of all. Raises ValueError for an op that has none."""
    cases = GPU_CASES if device is not None and device.type == "cuda" else CASES
    known = {case.op for case in cases}
    unknown = sorted(set(ops or ()) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has no case; there are {', '.join(sorted(known))}.")
    return [case for case in cases if ops is None or case.op in ops]
