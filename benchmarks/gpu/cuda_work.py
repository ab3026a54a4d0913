"""What each CUDA kernel does on a named shape of a model: the rows that `gpu.kernels` prints.

A new kernel adds its rows here: the work of its op from `benchmarks.work`, with the arithmetic that its tiles execute,
including halos and ragged edges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks import work
from benchmarks.work import Work
from vaebm_fast.config import PRESETS, NoiseLayout


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. `symbol`: its C++ name as `gpu.kernels.short_name` shortens it."""

    label: str
    symbol: str
    threads: int  # of a block
    shape: str
    work: Work
    dynamic_shared: int = 0  # bytes


def kernels() -> list[Kernel]:
    """Every kernel of csrc/cuda, once each."""
    return [*_noise(), *_depthwise(), *_inverted_residual(), *_power_iteration()]


def _noise() -> Iterator[Kernel]:
    N, preset = 16, PRESETS["celeba_256"]
    D = NoiseLayout(preset.nvae.latent_shapes, (3, 256, 256)).dim
    for count in (work.philox_words, work.philox_normal, work.langevin_update):
        op = count.__name__
        yield Kernel(op, f"{op}_kernel", 256, f"noise of celeba_256, N = {N}", count(N, D))


@dataclass(frozen=True)
class DepthwiseWindow:
    """The constants of csrc/cuda/depthwise_window.h: Window and Strip."""

    form: int  # place in enum Form
    label: str
    forward: bool
    phases: int
    stride: int
    taps: int
    shift: int
    cells: int  # of a thread, side by side

    @property
    def in_flight(self) -> int:
        return self.taps // self.stride

    @property
    def width(self) -> int:
        return 4 // self.phases * self.cells

    def columns(self, cells: int) -> int:
        """Source columns that so many neighbouring cells read."""
        return self.stride * (cells - 1) + self.taps + self.shift


def depthwise_windows(K: int) -> tuple[DepthwiseWindow, ...]:
    """The four forms of a KxK window."""
    return (
        DepthwiseWindow(0, "", True, 1, 1, K, 0, 4),
        DepthwiseWindow(1, ", upsampled", True, 2, 1, K // 2 + 1, K // 2 % 2, 4),
        DepthwiseWindow(2, ", backward", False, 1, 1, K, 0, 4),
        DepthwiseWindow(3, ", upsampled backward", False, 1, 2, K + 1, 0, 2),
    )


def _depthwise() -> Iterator[Kernel]:
    """The middle of celeba_256's largest cell of each kind."""
    N, H, W, C = 16, 128, 128, 384
    for dtype, bytes_each in (("Bf16", 2), ("float", 4)):
        for K in (5, 3):
            for window in depthwise_windows(K):
                low = window.phases == 2 or window.stride == 2
                channels = C // 2 if low else C
                yield Kernel(
                    label=f"depthwise_swish {K}x{K} {dtype.lower()}{window.label}",
                    symbol=f"depthwise_swish_kernel<{dtype}, Window<{K}, (Form){window.form}>>",
                    threads=128,
                    shape=f"{H} x {W} x {channels}, N = {N}",
                    work=_depthwise_work(window, N, H, W, channels, bytes_each),
                )
        for forward in (True, False):
            numel, each = float(N * 32 * 32 * 96), work.depthwise_swish(N, 96, 32 * 32, 7, bytes_each=bytes_each)
            special = 2 * (49 * numel if forward else numel)  # forward every tap activates its pixel again
            yield Kernel(
                label=f"depthwise_swish any {dtype.lower()}{'' if forward else ', backward'}",
                symbol=f"depthwise_swish_any_window_kernel<{dtype}, {str(forward).lower()}>",
                threads=128,
                shape=f"32 x 32 x 96, K = 7, N = {N}",
                work=replace(each.forward if forward else each.backward, special=special),
            )


def _depthwise_work(w: DepthwiseWindow, N: int, H: int, W: int, C: int, bytes_each: int) -> Work:
    """H, W: cells of the window's form; channels fill whole words, as in every model."""
    per_word = 4 // bytes_each
    tiles = N * -(-C // (32 * per_word)) * -(-W // w.width)
    rows = 64  # rows of a band: the launcher's rule
    while rows > 8 and tiles * -(-H // rows) < 1024:
        rows //= 2
    steps = -(-H // rows) * (rows + w.in_flight - 1 + w.shift)
    threads = tiles * steps * 128.0 * per_word  # channels of all steps of all threads
    staged = tiles * steps * w.stride * w.columns(w.width) * 32.0 * per_word
    cells, upsample = N * H * W * C, w.phases == 2 or w.stride == 2
    least = work.depthwise_swish(N, C, H * W, 1, upsample=upsample, bytes_each=bytes_each)
    return replace(
        least.forward if w.forward else least.backward,
        fp32_flop=2 * threads * w.taps * w.phases * w.taps * w.cells,
        special=2 * (staged if w.forward else cells),
        shared_bytes=4 * (staged + threads * w.stride * w.columns(w.cells)),
    )


def _inverted_residual() -> Iterator[Kernel]:
    """The cells of celeba_256's last three resolutions."""
    for C, hidden, H in ((32, 96, 256), (64, 384, 128), (128, 768, 64)):
        for backward in (False, True):
            yield Kernel(
                label=f"inverted_residual C = {C}{', backward' if backward else ''}",
                symbol=f"inverted_residual{'_backward' if backward else ''}_kernel<{C}>",
                threads=256,
                shape=f"{H} x {H} x {C}, hidden {hidden}, N = 16",
                work=_inverted_residual_work(16, H, H, C, hidden, backward),
                dynamic_shared=inverted_residual_shared(C, backward),
            )


def inverted_residual_shared(C: int, backward: bool) -> int:
    """Bytes of a block: source tile, hidden chunk, the warps' left operands, backward x; rows are padded."""
    row = 2 * C + 16
    return 240 * row + 32 * 488 + 8 * 1616 + (128 * row if backward else 0)


def _inverted_residual_work(N: int, H: int, W: int, C: int, hidden: int, backward: bool) -> Work:
    """A block writes 8 x 16 pixels and computes 16 x 16; the window reads 12 x 20. The forward also writes h2."""
    blocks, products = float(N * -(-H // 8) * -(-W // 16)), 4 if backward else 3  # of [128 pixels, C] and [C, hidden]
    # What a chunk moves through shared memory and L1: operands, hidden values, the window, h2, weights.
    left = 2 * C * (256 + (128 if backward else 0))
    window = 64 * 256 + 8 * 256 * 16 + 2 * 64 * 128
    h2 = 64 * (256 if backward else 128)
    weights = 8 * ((products - 1) * 64 * C + 7 * 512 + 256)  # each warp reads all
    least = work.inverted_residual(N, C, hidden, H * W, 5)
    return replace(
        least.backward if backward else least.forward,
        tensor_flop=2 * blocks * products * 128 * C * hidden,
        fp32_flop=2 * 25 * blocks * 128 * hidden,
        special=blocks * 3 * 128 * hidden,
        shared_bytes=blocks * (hidden / 32) * (left + window + h2 + weights),
    )


def _power_iteration() -> Iterator[Kernel]:
    """Convolutions of celeba_256, one for each width of a pass, and the widest for the kernels between passes."""
    for B, M, K, warps, quads, rows in (
        (7, 6144, 25, 1, 2, 8),
        (7, 6144, 1024, 4, 2, 4),
        (17, 256, 2304, 8, 4, 2),
        (17, 1024, 9216, 8, 9, 1),
    ):
        yield Kernel(
            label=f"power_iteration, pass, K <= {128 * warps * quads}",
            symbol=f"power_pass_kernel<{warps}, {quads}, {rows}>",
            threads=32 * warps,
            shape=f"{B} of {M} x {K}",
            work=_power_pass_work(B, M, K),
        )
    sums = float(B * power_iteration_strips(M) * K)
    shape = f"{B} of {M} x {K}"
    gather, normalise = Work(4 * (sums + B * K), fp32_flop=sums), Work(8.0 * B * (M + K))
    yield Kernel("power_iteration, gather", "power_gather_kernel", 256, shape, gather)
    yield Kernel("power_iteration, normalise", "power_normalise_kernel", 256, shape, normalise)


def power_iteration_strips(M: int) -> int:
    """Strips of a matrix with M rows: the launcher's rule."""
    return -(-M // (32 if M > 1024 else 16 if M > 512 else 8))


def _power_pass_work(B: int, M: int, K: int) -> Work:
    """A pass between two others: reads W and v, writes t and the strips' sums."""
    weights, strips = float(B * M * K), B * power_iteration_strips(M)
    return Work(4 * (weights + (strips + B) * K + B * M), fp32_flop=4 * weights)
