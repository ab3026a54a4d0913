"""What each Triton launch does at the shapes of `triton_aot`: the rows that `gpu.kernels` prints.

Memory is every tensor argument of the launch once. Arithmetic is that of `benchmarks.work`; products and windows count
what their tiles repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NamedTuple

import triton
from torch import Tensor

from benchmarks import work
from benchmarks.gpu.cuda_work import Kernel
from benchmarks.gpu.launches import Launch, recorded_launches
from benchmarks.gpu.triton_aot import cases
from benchmarks.work import SPECIALS, BothWays, Work

RARE = ("7x7", "11x11")  # windows of no published decoder

Arguments = dict[str, Any]
Count = Callable[[Arguments], dict[str, float]]


class Row(NamedTuple):
    """A launch and its kernel row, whose symbol is its name."""

    kernel: Kernel
    launch: Launch


def rows(without: tuple[str, ...] = ()) -> Iterator[Row]:
    """Every launch of `triton_aot.cases` whose name contains none of `without`."""
    for name, call in cases():
        if any(part in name for part in without):
            continue
        with recorded_launches() as launches:
            call()
        for launch in launches:
            label = f"{name} {launch.kernel.__name__ if len(launches) > 1 else ''}".strip()
            arguments = {**dict(zip(launch.kernel.arg_names, launch.args, strict=False)), **launch.kwargs}
            threads = 32 * arguments.get("num_warps", 4)  # Triton's own default
            yield Row(Kernel(label, label, threads, _shape(arguments), work_of(launch, arguments)), launch)


def work_of(launch: Launch, arguments: Arguments) -> Work:
    """The counted work of one launch. Raises KeyError for a kernel that has no count here."""
    moved = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    return Work(**{"memory_bytes": float(moved), **COUNTS[launch.kernel.__name__](arguments)})


def _shape(arguments: Arguments) -> str:
    if "flip" in arguments:
        N, H, W, C = arguments["out"].shape  # images of other kernels are [N, C, H, W]
        return f"{H} x {W} x {C}, N = {N}"
    largest = max((x for x in arguments.values() if isinstance(x, Tensor)), key=lambda x: x.numel())
    if largest.dim() == 4:
        N, C, H, W = largest.shape
        return f"{H} x {W} x {C}, N = {N}"
    return " x ".join(map(str, largest.shape))


def _depthwise(a: Arguments) -> dict[str, float]:
    """Taps of the sliding window; swish of each source pixel once per strip that reads it.

    Also of each target pixel if swish(target) is stored.
    """
    K, strip, backward = a["K"], a["STRIP"], a["BACKWARD"]
    stride = 2 if a["UPSAMPLE"] and backward else 1
    phases = 2 if a["UPSAMPLE"] and not backward else 1
    taps = (K + 1) // 2 if phases == 2 else K + a["UPSAMPLE"]
    target = float(a["target"].numel())
    columns_per_pixel = (stride * (strip - 1) + taps) / strip
    rows_per_pixel = (a["ROWS"] * stride + taps - stride) / a["ROWS"]
    activated = target if backward else target * columns_per_pixel * rows_per_pixel
    stored = target if a["activated"] is not None else 0
    return {"fp32_flop": 2 * taps * taps * target, "special": 2 * (activated + stored)}


def _pointwise(a: Arguments) -> dict[str, float]:
    """TF32 products count twice: tensor cores take twice as long as for half precision.

    In TF32 each operand element that a block reads is rounded by an integer addition and a mask.
    """
    x, y = a["x"], a["y"]
    flop = 2.0 * y.numel() * a["INNER"]
    reads = x.numel() * triton.cdiv(
        y.shape[1], a["BLOCK_N"]
    )  # each block activates x again; the slope is computed once
    activations = y.numel() if a["slope_of"] is not None else reads
    special = float(SPECIALS[a["ACTIVATION"]]) * activations
    if x.element_size() == 4 and a["PRECISION"] == "ieee":
        return {"fp32_flop": flop, "special": special}
    if x.element_size() == 2:
        return {"tensor_flop": flop, "special": special}
    tiles = a["images"] * triton.cdiv(a["pixels"], a["BLOCK_M"])
    read = x.numel() * triton.cdiv(y.shape[1], a["BLOCK_N"]) + a["weight"].numel() * tiles
    return {"tensor_flop": 2 * flop, "special": special, "integer": 2.0 * read}


def _noise(count: Callable[[int, int], Work], of: str) -> Count:
    """All work of `count` for noise [N, D], the shape of an argument."""
    return lambda a: asdict(count(*a[of].shape))


def _gathered(a: Arguments) -> dict[str, float]:
    """What is gathered, not the whole data set."""
    N, size, _, C = a["out"].shape
    return asdict(work.gather_images(N, size, C))


def _specials(count: Callable[[int], BothWays], of: str, per: int = 1) -> Count:
    """The special functions of `count` for the elements of an argument, divided by `per`."""
    return lambda a: {"special": count(a[of].numel() // per).forward.special}


COUNTS: dict[str, Count] = {
    "philox_words_kernel": _noise(work.philox_words, "out"),
    "philox_normal_kernel": _noise(work.philox_normal, "out"),
    "update_kernel": _noise(work.langevin_update, "eps"),
    "gather_kernel": _gathered,
    "depthwise_kernel": _depthwise,
    "pointwise_kernel": _pointwise,
    "bilinear_upsample_kernel": lambda a: {},
    "bilinear_upsample_backward_kernel": lambda a: {},
    "epilogue_kernel": _specials(work.energy_epilogue, "y"),
    "head_kernel": _specials(work.energy_head, "y"),
    "total_kernel": lambda a: {},
    "head_backward_kernel": _specials(work.energy_head, "y"),
    "latent_kernel": _specials(work.gaussian_latent, "parameters", per=2),
    "latent_backward_kernel": _specials(work.gaussian_latent, "parameters", per=2),
    "pixel_kernel": _specials(work.pixel_head, "logits", per=2),
    "pixel_backward_kernel": _specials(work.pixel_head, "logits", per=2),
    "sum_kernel": lambda a: {},
    "gate_kernel": lambda a: {"special": 2.0 * a["gate"].numel()},
    "gate_backward_kernel": lambda a: {},
    "apply_kernel": lambda a: {},
}
