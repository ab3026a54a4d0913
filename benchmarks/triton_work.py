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
    return Work(memory_bytes=float(moved), **COUNTS[launch.kernel.__name__](arguments))


def _shape(arguments: Arguments) -> str:
    largest = max((x for x in arguments.values() if isinstance(x, Tensor)), key=lambda x: x.numel())
    if largest.dim() == 4:
        N, C, H, W = largest.shape
        return f"{H} x {W} x {C}, N = {N}"
    return " x ".join(map(str, largest.shape))


def _depthwise(a: Arguments) -> dict[str, float]:
    """Taps of the sliding window of the form at hand; swish of each source pixel once per strip that reads it."""
    K, strip, backward = a["K"], a["STRIP"], a["BACKWARD"]
    stride = 2 if a["UPSAMPLE"] and backward else 1
    phases = 2 if a["UPSAMPLE"] and not backward else 1
    taps = (K + 1) // 2 if phases == 2 else K + a["UPSAMPLE"]
    target = float(a["target"].numel())
    columns_per_pixel = (stride * (strip - 1) + taps) / strip
    rows_per_pixel = (a["ROWS"] * stride + taps - stride) / a["ROWS"]
    activated = target if backward else target * columns_per_pixel * rows_per_pixel
    return {"fp32_flop": 2 * taps * taps * target, "special": 2 * activated}


def _pointwise(a: Arguments) -> dict[str, float]:
    """tf32 takes tensor cores twice as long as halves do, so its products count twice."""
    x, y = a["x"], a["y"]
    flop = 2.0 * y.numel() * a["INNER"]
    activations = x.numel() * triton.cdiv(y.shape[1], a["BLOCK_N"]) if a["ACTIVATE"] else 0
    special = 2.0 * (activations + (y.numel() if a["slope_of"] is not None else 0))
    if x.element_size() == 4 and a["PRECISION"] == "ieee":
        return {"fp32_flop": flop, "special": special}
    return {"tensor_flop": flop * (2 if x.element_size() == 4 else 1), "special": special}


def _per_element(of: str, special: int) -> Callable[[Arguments], dict[str, float]]:
    """So many special functions for each element of a tensor."""
    return lambda a: {"special": float(special * prod(a[of].shape))}


COUNTS: dict[str, Callable[[Arguments], dict[str, float]]] = {
    "depthwise_kernel": _depthwise,
    "pointwise_kernel": _pointwise,
    "epilogue_kernel": _per_element("y", 2),
    "latent_kernel": _per_element("parameters", 3),  # exp and 1 / (1 + exp) per clamp, and half an exp for sigma
    "latent_backward_kernel": _per_element("parameters", 3),
    "pixel_kernel": _per_element("logits", 3),
    "pixel_backward_kernel": _per_element("logits", 3),
    "sum_kernel": lambda a: {},
    "gate_kernel": _per_element("gate", 2),
    "gate_backward_kernel": lambda a: {},
    "apply_kernel": lambda a: {},
}
