"""Work of every op, and of a chain step: the one place that counts it.

Memory is each argument and result once, and what passes between the kernels of an op of several; weights and per-image
values are left out where features dwarf them. Arithmetic is what the op's formula takes; of ops that only pass over
their elements just the special functions are counted, because nothing else could limit them.

The tables of measured ops, of compiled kernels (`gpu.cuda_work` and `gpu.triton_work` add what their tiles repeat), of
the whole pair and of the targets use these counts. `tests/benchmarks/test_work.py` counts memory again from the tensors
that the ops touch, and checks what the ops' docstrings say.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from vaebm_fast.reference import Activation

FLOAT32 = 4
SPECIALS: dict[Activation, int] = {"none": 0, "swish": 2, "elu": 1}  # exponentials and reciprocals of an element


@dataclass(frozen=True)
class Work:
    """Totals of one call. A multiply-add is 2 FLOP; `special` are exponentials, logarithms, reciprocals and tanh.

    tensor_flop: of matrix products, fp32_flop: all others. shared_bytes: through shared memory, of a kernel.
    """

    memory_bytes: float
    fp32_flop: float = 0
    tensor_flop: float = 0
    special: float = 0
    integer: float = 0
    shared_bytes: float = 0

    @property
    def flop(self) -> float:
        """All floating-point work but special functions."""
        return self.fp32_flop + self.tensor_flop


class BothWays(NamedTuple):
    """Of an op and of its backward."""

    forward: Work
    backward: Work


# Sizes: N images of C channels at `pixels` pixels (of the source where an op upsamples); bytes_each: of an element.
def philox_words(N: int, D: int) -> Work:
    """Four words a counter, in ten rounds."""
    return Work(4.0 * N * D, integer=120.0 * _counters(N, D))


def philox_normal(N: int, D: int) -> Work:
    """The words of `philox_words` to normals by Box and Muller."""
    counters = _counters(N, D)
    return Work(4.0 * N * D, integer=150.0 * counters, fp32_flop=90.0 * counters, special=2.0 * counters)


def langevin_update(N: int, D: int) -> Work:
    """eps and gradient are read, eps is written; the noise never reaches memory."""
    noise, counters = philox_normal(N, D), _counters(N, D)
    return replace(noise, memory_bytes=12.0 * N * D, fp32_flop=noise.fp32_flop + 20 * counters)


def gather_images(N: int, size: int, C: int) -> Work:
    """Bytes are read and written; indices are not counted."""
    return Work(2.0 * N * size**2 * C)


def _counters(N: int, D: int) -> int:
    return N * -(-D // 4)


def depthwise_swish(
    N: int, C: int, pixels: int, K: int, *, upsample: bool = False, bytes_each: int = FLOAT32
) -> BothWays:
    """With `upsample` the taps that read one source pixel are summed beforehand."""
    scale, taps = (4, (K + 1) // 2) if upsample else (1, K)
    small, large = float(N * C * pixels), float(scale * N * C * pixels)
    flop, special = 2 * taps**2 * large, 2 * small
    return BothWays(
        Work(bytes_each * (small + large), fp32_flop=flop, special=special),
        Work(bytes_each * (2 * small + large), fp32_flop=flop, special=special),
    )


def pointwise(
    N: int, Cin: int, Cout: int, pixels: int, activation: Activation = "none", bytes_each: int = FLOAT32
) -> BothWays:
    """An input that is activated is read once more backward, for its slope."""
    x, y, weight = (float(numel) for numel in (N * Cin * pixels, N * Cout * pixels, Cin * Cout))
    flop, special = 2.0 * N * pixels * Cin * Cout, SPECIALS[activation] * x
    slope = 0 if activation == "none" else x
    return BothWays(
        Work(bytes_each * (x + y + weight), tensor_flop=flop, special=special),
        Work(bytes_each * (x + y + weight + slope), tensor_flop=flop, special=special),
    )


def bilinear_upsample(N: int, C: int, pixels: int, bytes_each: int = FLOAT32) -> BothWays:
    """From `pixels` to four times as many, and back."""
    each = Work(bytes_each * 5.0 * N * C * pixels)
    return BothWays(each, each)


def inverted_residual(N: int, C: int, hidden: int, pixels: int, K: int, bytes_each: int = 2) -> BothWays:
    """Writes h2 for the backward, which computes h1 again."""
    features, inside = float(N * pixels * C), float(N * pixels * hidden)
    product, window = 2.0 * N * pixels * C * hidden, 2.0 * K**2 * inside
    return BothWays(
        Work(bytes_each * (2 * features + inside), tensor_flop=2 * product, fp32_flop=window, special=4 * inside),
        Work(bytes_each * (3 * features + inside), tensor_flop=3 * product, fp32_flop=window, special=4 * inside),
    )


def energy_epilogue(numel: int, *, skip: bool = True, bytes_each: int = FLOAT32) -> BothWays:
    """numel: elements of y."""
    return BothWays(
        Work(bytes_each * (2.0 + skip) * numel, special=2.0 * numel),
        Work(bytes_each * (3.0 + skip) * numel, special=2.0 * numel),
    )


def energy_head(numel: int, *, skip: bool = True, bytes_each: int = FLOAT32) -> BothWays:
    """numel: elements of y; energies are not counted."""
    return BothWays(
        Work(bytes_each * (1.0 + skip) * numel, special=2.0 * numel),
        Work(bytes_each * (2.0 + skip) * numel, special=2.0 * numel),
    )


def se_gate_residual(numel: int, bytes_each: int = FLOAT32) -> BothWays:
    """numel: elements of s, which its mean reads from memory and its gate, at best, from a cache."""
    each = Work(bytes_each * 3.0 * numel)
    return BothWays(each, each)


def residual_tail(
    N: int, hidden: int, C: int, pixels: int, K: int, *, upsample: bool = False, bytes_each: int = FLOAT32
) -> BothWays:
    """h [N, hidden, H, W] to y [N, C, ...]. Between its kernels pass h2 and s, backward dy and the gradient for h2."""
    middle = depthwise_swish(N, hidden, pixels, K, upsample=upsample, bytes_each=bytes_each)
    large = pixels * (4 if upsample else 1)
    product = pointwise(N, hidden, C, large, "swish", bytes_each)
    small, wide, y = N * hidden * pixels, N * hidden * large, N * C * large
    moved = small + 2 * wide + 4 * y, 2 * small + 3 * wide + 3 * y
    parts = zip(middle, product, moved, strict=True)
    return BothWays(
        *(
            Work(float(bytes_each * each), window.fp32_flop, matrix.tensor_flop, window.special + matrix.special)
            for window, matrix, each in parts
        )
    )


def gaussian_latent(numel: int, bytes_each: int = FLOAT32) -> BothWays:
    """numel: elements of eps, with log p. Two clamps take an exponential and 1 / (1 + exp) each, sigma takes one more.

    Counted as three for each of the two parameters of an element.
    """
    return BothWays(
        Work(bytes_each * 4.0 * numel, special=6.0 * numel),
        Work(bytes_each * 7.0 * numel, special=6.0 * numel),
    )


pixel_head = gaussian_latent  # the same parameters and results for each element of the image


def power_iteration(B: int, M: int, K: int, iterations: int) -> Work:
    """W is read from memory once at best; u and v are not counted."""
    return Work(4.0 * B * M * K, fp32_flop=4.0 * B * M * K * iterations)


class StepWork(NamedTuple):
    """Of a chain step, per image: FLOP of the plain modules and of the frozen pair; bytes of `cost.least_traffic`."""

    plain_flop: int
    frozen_flop: int
    bytes_per_image: int
    bytes_per_step: int

    def least_bytes(self, batch: int, bytes_each: int) -> float:
        """What a step of `batch` chains must move where every block is one kernel; the counts are in bfloat16."""
        return (batch * self.bytes_per_image + self.bytes_per_step) * bytes_each / 2


# Counted by `vaebm_fast.evaluation.cost` beforehand, which takes seconds per preset; a test counts them again.
STEPS: dict[str, StepWork] = {
    "cifar10": StepWork(56_583_078_912, 54_917_940_224, 223_871_764, 230_373_116),
    "celeba_64": StepWork(22_497_390_080, 19_462_811_136, 164_820_396, 115_677_652),
    "lsun_church_64": StepWork(23_101_369_856, 20_066_790_912, 167_769_516, 121_578_964),
    "celeba_256": StepWork(251_517_204_480, 209_498_667_008, 2_027_157_028, 593_333_260),
    "stacked_mnist": StepWork(2_150_195_712, 1_808_359_936, 31_509_812, 14_212_108),
    "digits": StepWork(19_648_256, 13_913_856, 424_164, 1_490_876),
}
