"""Which configuration of a Triton kernel is fastest on this GPU? Writes the tables that the kernels' sources hold.

Every candidate runs at the shapes of celeba_256 that its entry of the table stands for, 16 images; the one with the
smallest sum of median times wins. The baseline is the configuration in the source. `python -m benchmarks.tune_triton`
prints each entry as it is to stand there, with both times in milliseconds; nothing is changed by itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from itertools import product
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from vaebm_fast.triton_kernels import depthwise_swish, pointwise

Calls = list[Callable[[], object]]

# (C, H) of the hidden tensors of celeba_256's cells; of those that upsample, before they do
HIDDEN = ((6144, 8), (3072, 16), (1536, 32), (768, 64), (384, 128))
# (Cin, Cout, H) by shape class
PRODUCTS = {
    "narrow": ((512, 20, 16), (128, 20, 64), (32, 6, 256)),
    "small": ((6144, 1024, 8), (3072, 512, 16), (384, 64, 128), (20, 512, 16)),
    "large": ((1024, 6144, 8), (512, 3072, 16), (256, 1536, 32), (1536, 256, 32), (128, 768, 64), (768, 128, 64)),
}


def time_ms(calls: Calls) -> float:
    """Sum of the median times; infinite where a block asks for more than the GPU has."""
    try:
        return sum(triton.testing.do_bench(call, warmup=10, rep=40, return_mode="median") for call in calls)
    except OutOfResources:
        return float("inf")


def tune(table: MutableMapping[Any, Any], key: Any, candidates: Iterable[Any], calls: Calls) -> None:
    """Print the best configuration for `key` of `table`, which stays as it was."""
    in_source = table[key]
    times = {}
    try:
        for candidate in (in_source, *candidates):
            table[key] = candidate
            times[candidate] = time_ms(calls)
    finally:
        table[key] = in_source
    best = min(times, key=lambda candidate: times[candidate])
    print(f"    {key!r}: {type(best).__name__}{tuple(best)!r},  # {times[best]:.3f} ms, {times[in_source]:.3f} before")


def depthwise_calls(K: int, upsample: bool, backward: bool, dtype: torch.dtype) -> Calls:
    calls: Calls = []
    for C, side in HIDDEN:
        h = _random(dtype, 16, C, side, side)
        weight, bias = _random(dtype, K, K, C), _random(dtype, C)
        if backward:
            dy = _random(dtype, 16, C, 2 * side, 2 * side) if upsample else _random(dtype, 16, C, side, side)
            calls.append(partial(depthwise_swish.depthwise_swish_backward, dy, h, weight, upsample))
        else:
            calls.append(partial(depthwise_swish.depthwise_swish, h, weight, bias, upsample))
    return calls


def pointwise_calls(shape_class: str, dtype: torch.dtype) -> Calls:
    calls: Calls = []
    for Cin, Cout, side in PRODUCTS[shape_class]:
        assert pointwise.shape_class(16 * side * side, Cin, Cout) == shape_class, (Cin, Cout, side)
        x, weight, bias = _random(dtype, 16, Cin, side, side), _random(dtype, Cout, Cin), _random(dtype, Cout)
        calls.append(partial(pointwise.pointwise, x, weight, weight.T, bias, None, True))
        # the gradient of a layer from Cout to Cin channels is a product of these sizes too
        weight_t, activated = _random(dtype, Cin, Cout).T, _random(dtype, 16, Cout, side, side)
        calls.append(partial(pointwise.pointwise_backward, x, weight_t, Cout, activated))
    return calls


def _random(dtype: torch.dtype, *size: int) -> Tensor:
    x = torch.randn(size, dtype=dtype, device="cuda")
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def tune_depthwise_swish() -> None:
    """The 5x5 entries: wider windows are in no published decoder."""
    sizes = list(product((1, 2, 4, 8), (1, 2, 4, 8), (32, 64, 128), (True,), (2, 4, 8)))
    for key in depthwise_swish.CONFIGS:
        K, upsample, backward, itemsize = key
        if K == 5:
            dtype = torch.float32 if itemsize == 4 else torch.bfloat16
            calls = depthwise_calls(K, upsample, backward, dtype)
            tune(depthwise_swish.CONFIGS, key, map(depthwise_swish.Config._make, sizes), calls)


def tune_pointwise() -> None:
    sizes = list(product((64, 128), (32, 64, 128, 256), (16, 32, 64), (4, 8), (2, 3, 4)))
    for key in pointwise.CONFIGS:
        shape_class, precision = key
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        calls = pointwise_calls(shape_class, torch.bfloat16 if precision == "half" else torch.float32)
        tune(pointwise.CONFIGS, key, map(pointwise.Config._make, sizes), calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernel", choices=("depthwise_swish", "pointwise"))
    kernel = parser.parse_args().kernel
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    {"depthwise_swish": tune_depthwise_swish, "pointwise": tune_pointwise}[kernel]()


if __name__ == "__main__":
    main()
