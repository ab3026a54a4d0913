"""What each Triton launch does at the shapes of `triton_aot`, counted: rows for the tables that `kernel_report` prints.

Memory: every tensor argument of a launch once, which must cross the device's bus at least. A few fp32 operations per
element of what only passes by are not counted: memory takes longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import triton
from torch import Tensor

from benchmarks.kernel_work import Kernel, Work
from benchmarks.triton_aot import Launch, cases, recorded_launches

RARE = ("7x7", "11x11")  # windows that no published decoder has

Arguments = dict[str, Any]


class Row(NamedTuple):
    """A launch by its name, which is also the symbol of its kernel row."""

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
            yield Row(Kernel(label, label, threads, _shape(arguments), work(launch, arguments)), launch)


def work(launch: Launch, arguments: Arguments) -> Work:
    """The counted work of one launch. Raises KeyError for a kernel that has no count here."""
    moved = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    return Work(**{"memory_bytes": float(moved), **COUNTS[launch.kernel.__name__](arguments)})


def _shape(arguments: Arguments) -> str:
    largest = max((x for x in arguments.values() if isinstance(x, Tensor)), key=lambda x: x.numel())
    if largest.dim() == 4:
        N, C, H, W = largest.shape
        return f"{H} x {W} x {C}, N = {N}"
    return " x ".join(map(str, largest.shape))


def _depthwise(a: Arguments) -> dict[str, float]:
    """Taps of the sliding window of the form at hand; swish of each source pixel once per strip that reads it.

    And of each pixel of the target where swish(target) is stored too.
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
    """tf32 takes tensor cores twice as long as halves do, so its products count twice.

    And each element of an operand that a block reads is rounded by an addition and a mask of integers.
    """
    x, y = a["x"], a["y"]
    flop = 2.0 * y.numel() * a["INNER"]
    reads = x.numel() * triton.cdiv(y.shape[1], a["BLOCK_N"])  # each activates x again; a slope is taken once
    activations = y.numel() if a["slope_of"] is not None else reads
    special = {"none": 0.0, "swish": 2.0, "elu": 1.0}[a["ACTIVATION"]] * activations
    if x.element_size() == 4 and a["PRECISION"] == "ieee":
        return {"fp32_flop": flop, "special": special}
    if x.element_size() == 2:
        return {"tensor_flop": flop, "special": special}
    tiles = a["images"] * triton.cdiv(a["pixels"], a["BLOCK_M"])
    read = x.numel() * triton.cdiv(y.shape[1], a["BLOCK_N"]) + a["weight"].numel() * tiles
    return {"tensor_flop": 2 * flop, "special": special, "integer": 2.0 * read}


def _noise(of: str, *, integer: int, fp32_flop: int, special: int) -> Callable[[Arguments], dict[str, float]]:
    """So much for each Philox counter, four elements of a tensor; as `kernel_work` counts it for CUDA."""

    def count(a: Arguments) -> dict[str, float]:
        N, D = a[of].shape
        counters = float(N * triton.cdiv(D, 4))
        return {"integer": integer * counters, "fp32_flop": fp32_flop * counters, "special": special * counters}

    return count


def _update(a: Arguments) -> dict[str, float]:
    """eps is read and written."""
    count = _noise("eps", integer=150, fp32_flop=110, special=2)(a)
    return {"memory_bytes": 12.0 * a["eps"].numel(), **count}


def _per_element(of: str, special: int) -> Callable[[Arguments], dict[str, float]]:
    """So many special functions for each element of a tensor."""
    return lambda a: {"special": float(special * prod(a[of].shape))}


COUNTS: dict[str, Callable[[Arguments], dict[str, float]]] = {
    "philox_words_kernel": _noise("out", integer=120, fp32_flop=0, special=0),
    "philox_normal_kernel": _noise("out", integer=150, fp32_flop=90, special=2),
    "update_kernel": _update,
    "depthwise_kernel": _depthwise,
    "pointwise_kernel": _pointwise,
    "bilinear_upsample_kernel": lambda a: {},
    "bilinear_upsample_backward_kernel": lambda a: {},
    "epilogue_kernel": _per_element("y", 2),
    "head_kernel": _per_element("y", 2),
    "total_kernel": lambda a: {},
    "head_backward_kernel": _per_element("y", 2),
    "latent_kernel": _per_element("parameters", 3),  # exp and 1 / (1 + exp) per clamp, and half an exp for sigma
    "latent_backward_kernel": _per_element("parameters", 3),
    "pixel_kernel": _per_element("logits", 3),
    "pixel_backward_kernel": _per_element("logits", 3),
    "sum_kernel": lambda a: {},
    "gate_kernel": _per_element("gate", 2),
    "gate_backward_kernel": lambda a: {},
    "apply_kernel": lambda a: {},
}
