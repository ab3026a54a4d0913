"""The ops at the shapes that the presets' models give them, with random tensors.

An op gets its rows in the tables by an entry in CASES. What it moves and computes is counted in `benchmarks.work`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import work
from benchmarks.work import BothWays, Work
from vaebm_fast.chain.noise import Stream, draw_tensor, seed_tensor
from vaebm_fast.ops import _backend
from vaebm_fast.ops.bilinear_upsample import bilinear_upsample, bilinear_upsample_backward
from vaebm_fast.ops.depthwise_swish import depthwise_swish, depthwise_swish_backward
from vaebm_fast.ops.energy_epilogue import energy_epilogue, energy_epilogue_backward
from vaebm_fast.ops.energy_head import energy_head, energy_head_backward
from vaebm_fast.ops.gather_images import gather_images
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
    """Runs the op on allocated tensors."""

    def __call__(self, *, backend: Any) -> object: ...


Make = Callable[[torch.device], Run]


@dataclass(frozen=True)
class Case:
    """An op at one shape. `make` allocates its tensors on a device."""

    op: str
    shape: str
    work: Work
    make: Make
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    @property
    def tests(self) -> str:
        """The file of tests that the op must pass before it is measured."""
        module = self.op.removesuffix("_backward")
        return "tests/chain/test_noise.py" if module == "philox_normal" else f"tests/ops/test_{module}.py"


def both(op: str, shape: str, counted: BothWays, forward: Make, backward: Make, dtype: str = "float32") -> list[Case]:
    """The cases of an op and of its backward."""
    return [
        Case(op, shape, counted.forward, forward, dtype),
        Case(f"{op}_backward", shape, counted.backward, backward, dtype),
    ]


def depthwise_cases(N: int, C: int, H: int, K: int = 5, *, upsample: bool = False) -> list[Case]:
    """Depthwise convolution of an H x H image; upsampled, the result has twice the side."""
    scale = 2 if upsample else 1

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
    counted = work.depthwise_swish(N, C, H * H, K, upsample=upsample)
    return both("depthwise_swish", shape, counted, forward, backward)


def philox_normal_cases(N: int, D: int) -> list[Case]:
    """Noise of N images."""

    def make(device: torch.device) -> Run:
        seeds, draw = seed_tensor(range(N), device), draw_tensor(1, device)
        return lambda *, backend: philox_normal(seeds, draw, stream=int(Stream.CHAIN), numel=D, backend=backend)

    return [Case("philox_normal", f"{N}x{D}", work.philox_normal(N, D), make)]


def langevin_update_cases(N: int, D: int) -> list[Case]:
    """A step of N chains including its noise; each call continues from the previous state."""

    def make(device: torch.device) -> Run:
        eps, gradient = _normal(device, N, D), _normal(device, N, D)
        seeds, draw = seed_tensor(range(N), device), draw_tensor(1, device)
        flags = torch.full_like(seeds, -1)
        stream, step_size = int(Stream.CHAIN), 3e-6
        return lambda *, backend: langevin_update(
            eps, gradient, seeds, draw, flags, stream=stream, step_size=step_size, backend=backend
        )

    return [Case("langevin_update", f"{N}x{D}", work.langevin_update(N, D), make)]


def _normal(device: torch.device, *size: int) -> Tensor:
    tensor = torch.randn(size, device=device)
    return tensor.to(memory_format=torch.channels_last) if len(size) == 4 else tensor


def pointwise_cases(N: int, Cin: int, Cout: int, H: int, *, activation: Activation = "none") -> list[Case]:
    """A 1x1 convolution; the forward has a bias."""

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
    return both("pointwise", shape, work.pointwise(N, Cin, Cout, H * H, activation), forward, backward)


def bilinear_upsample_cases(N: int, C: int, H: int) -> list[Case]:
    """Upsampling of H x H pixels by 2."""

    def forward(device: torch.device) -> Run:
        x = _normal(device, N, C, H, H)
        return lambda *, backend: bilinear_upsample(x, backend=backend)

    def backward(device: torch.device) -> Run:
        dy = _normal(device, N, C, 2 * H, 2 * H)
        return lambda *, backend: bilinear_upsample_backward(dy, backend=backend)

    return both("bilinear_upsample", f"{N}x{C}x{H}x{H}", work.bilinear_upsample(N, C, H * H), forward, backward)


def inverted_residual_cases(N: int, C: int, hidden: int, H: int, K: int = 5) -> list[Case]:
    """A whole block in bfloat16; the forward returns h2 for the backward."""

    def weights(device: torch.device) -> BlockWeights:
        """Weights that keep every stage of the order of one."""
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

    counted, shape = work.inverted_residual(N, C, hidden, H * H, K), f"{N}x{C}x{H}x{H}, hidden {hidden}"
    return both("inverted_residual", shape, counted, forward, backward, "bfloat16")


def energy_epilogue_cases(N: int, C: int, H: int) -> list[Case]:
    """With a skip and a shift."""

    def forward(device: torch.device) -> Run:
        (y, skip), shift = (_normal(device, N, C, H, H) for _ in range(2)), _normal(device, C)
        return lambda *, backend: energy_epilogue(y, skip, 0.9, shift, backend=backend)

    def backward(device: torch.device) -> Run:
        (du, y, skip), shift = (_normal(device, N, C, H, H) for _ in range(3)), _normal(device, C)
        return lambda *, backend: energy_epilogue_backward(du, y, skip, 0.9, shift, backend=backend)

    return both("energy_epilogue", f"{N}x{C}x{H}x{H}", work.energy_epilogue(N * C * H * H), forward, backward)


def energy_head_cases(N: int, C: int, H: int) -> list[Case]:
    """With a skip and a shift."""

    def forward(device: torch.device) -> Run:
        y, skip = (_normal(device, N, C, H, H) for _ in range(2))
        shift, weight, bias = _normal(device, C), _normal(device, C), _normal(device, 1)
        return lambda *, backend: energy_head(y, skip, 0.9, shift, weight, bias, backend=backend)

    def backward(device: torch.device) -> Run:
        y, skip = (_normal(device, N, C, H, H) for _ in range(2))
        denergy, shift, weight = _normal(device, N), _normal(device, C), _normal(device, C)
        return lambda *, backend: energy_head_backward(denergy, y, skip, 0.9, shift, weight, backend=backend)

    return both("energy_head", f"{N}x{C}x{H}x{H}", work.energy_head(N * C * H * H), forward, backward)


def se_gate_residual_cases(N: int, C: int, H: int) -> list[Case]:
    """Gates with C / 16 hidden channels, at least 4."""
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

    return both("se_gate_residual", f"{N}x{C}x{H}x{H}", work.se_gate_residual(N * C * H * H), forward, backward)


def residual_tail_cases(N: int, hidden: int, C: int, H: int, K: int = 5, *, upsample: bool = False) -> list[Case]:
    """From `hidden` channels of H x H pixels to C channels, with twice the side if upsampled."""
    side, squeezed = 2 * H if upsample else H, max(C // 16, 4)
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
    counted = work.residual_tail(N, hidden, C, H * H, K, upsample=upsample)
    return both("residual_tail", shape, counted, forward, backward)


def heads_cases(N: int, L: int, H: int, *, pixels: bool = False) -> list[Case]:
    """Latent heads, or pixel heads, with log p."""

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

    op, counted = ("pixel_head", work.pixel_head) if pixels else ("gaussian_latent", work.gaussian_latent)
    return both(op, f"{N}x{L}x{H}x{H}", counted(N * L * H * H), forward, backward)


def power_iteration_cases(B: int, M: int, K: int, iterations: int = 4) -> list[Case]:
    """A training step's power iterations on B convolutions of one shape."""

    def make(device: torch.device) -> Run:
        weight, u, v = _normal(device, B, M, K), _normal(device, B, M), _normal(device, B, K)
        return lambda *, backend: power_iteration(weight, u, v, iterations=iterations, eps=1e-3, backend=backend)

    counted = work.power_iteration(B, M, K, iterations)
    return [Case("power_iteration", f"{B}x{M}x{K}, {iterations} times", counted, make)]


def gather_images_cases(N: int, size: int, C: int = 3, *, M: int = 512, margin: int = 0) -> list[Case]:
    """A batch of N random crops out of M images whose sides are longer by `margin`; every second one is mirrored."""

    def make(device: torch.device) -> Run:
        side = size + margin
        images = torch.randint(256, (M, side, side, C), dtype=torch.uint8, device=device)
        index, flip = torch.randint(M, (N,), device=device), torch.arange(N, device=device) % 2 == 1
        top, left = (torch.randint(margin + 1, (N,), device=device) for _ in range(2))
        return lambda *, backend: gather_images(images, index, flip, top, left, size=size, backend=backend)

    counted = work.gather_images(N, size, C)
    return [Case("gather_images", f"{N}x{size}x{size}x{C} of {M}", counted, make, "uint8")]


def _table(one: int, four: int) -> tuple[Case, ...]:
    """All cases. one, four: batch sizes in place of 1 and 4, the CPU's."""
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
        *gather_images_cases(64, 256),  # training batches of celeba_256, of celeba_64, of cifar10
        *gather_images_cases(256, 64),
        *gather_images_cases(256, 32),
    )


CASES, GPU_CASES = _table(1, 4), _table(16, 16)
# Odd shapes, small enough for compute-sanitizer: for tests on a GPU.
SMALL_CASES = (
    *depthwise_cases(2, 35, 9),
    *depthwise_cases(1, 70, 5, K=3),
    *depthwise_cases(2, 33, 6, upsample=True),
    *pointwise_cases(2, 20, 33, 7),
    *pointwise_cases(1, 130, 70, 12, activation="swish"),
    *bilinear_upsample_cases(2, 35, 9),
    *energy_epilogue_cases(2, 17, 9),
    *energy_head_cases(2, 17, 9),
    *se_gate_residual_cases(2, 40, 9),
    *se_gate_residual_cases(1, 300, 20),  # several blocks of channels, several chunks of pixels
    *residual_tail_cases(2, 35, 17, 9),
    *residual_tail_cases(2, 70, 300, 6),  # wide enough to store swish(h2)
    *residual_tail_cases(2, 33, 20, 5, K=3, upsample=True),
    *heads_cases(2, 5, 7),
    *heads_cases(2, 3, 9, pixels=True),
    *power_iteration_cases(2, 37, 140),
    *power_iteration_cases(1, 19, 1029),
    *gather_images_cases(3, 19, M=5, margin=4),
    *gather_images_cases(2, 33, 1, M=5),
    *(case for C in (32, 64, 128) for case in inverted_residual_cases(1, C, 64, 18)),
)


def backends_of(op: str, device: torch.device, without: Sequence[str] = ()) -> list[str]:
    """Backends that can run the op on this device, including the reference, except `without`."""
    known = [name for name in _backend.OP_BACKENDS[op] if name not in without]
    return [name for name in known if _backend.why_not(op, device, name) is None]


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether the op has a kernel for this kind of device, installed or not."""
    kinds = {"cpp"} if device.type == "cpu" else {"triton", "cuda"}
    return not kinds.isdisjoint(_backend.OP_BACKENDS[op])


def cases_of(ops: Sequence[str] | None, device: torch.device | None = None) -> list[Case]:
    """Cases of these ops for a device; default: all ops, on a CPU. Raises ValueError for an op without cases."""
    cases = GPU_CASES if device is not None and device.type == "cuda" else CASES
    known = {case.op for case in cases}
    unknown = sorted(set(ops or ()) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)} has no case; there are {', '.join(sorted(known))}.")
    return [case for case in cases if ops is None or case.op in ops]
