"""Which configuration of a Triton kernel is fastest on this GPU? Writes the answer into the kernels' sources.

    python -m benchmarks tune [pointwise ...] [--all]

Times every candidate at the shapes of celeba_256 that its table entry covers, with 16 images; the smallest sum of
median times wins. A candidate replaces the configuration in the source only if it is faster by more than MARGIN, and if
it gives the same results but for rounding. Tables are tuned in order, because later ones use the results of earlier
ones: the entries of half precision, in which chains run, and with --all those of float32 too. All candidates are
compiled beforehand, in parallel. After every entry the table is written between its marks, with the GPU's name, so an
interrupted run keeps its results. No other line changes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from benchmarks.gate import REPOSITORY
from benchmarks.gpu.sources import BEGIN, END
from vaebm_fast.runtime.files import write
from vaebm_fast.triton_kernels import depthwise_swish, pointwise, residual_tail

Calls = list[Callable[[], object]]
Clock = Callable[[Calls], float]  # total time in milliseconds

HALF = (2, "half")  # last element of a key: bytes per element, or precision of products
MARGIN = 0.02
ALLOWED = 0.02  # difference between configurations, of the largest result: sums are rounded in another order
BATCH = 16
# (hidden, C, H) of celeba_256's cells; H before upsampling
CELLS = ((6144, 1024, 8), (3072, 512, 16), (1536, 256, 32), (768, 128, 64), (384, 64, 128))
# (Cin, Cout, H) by shape class
PRODUCTS = {
    "narrow": ((512, 20, 16), (128, 20, 64), (32, 6, 256)),
    "small": ((6144, 1024, 8), (3072, 512, 16), (384, 64, 128), (20, 512, 16)),
    "large": ((1024, 6144, 8), (512, 3072, 16), (256, 1536, 32), (1536, 256, 32), (128, 768, 64), (768, 128, 64)),
}


class Tuner(NamedTuple):
    """A table in a kernel's source, {key: the launcher's configuration}, and how its entries are chosen.

    `calls(key, device)`: the calls that time an entry; none if the entry is not tuned.
    """

    module: ModuleType
    table: str
    candidates: tuple[Any, ...]
    calls: Callable[[Any, torch.device], Calls]


def keys_of(tuner: Tuner, *, all_precisions: bool) -> list[Any]:
    """The entries to tune, half precision first."""
    keys = sorted(getattr(tuner.module, tuner.table), key=lambda key: key[-1] not in HALF)
    return [key for key in keys if all_precisions or key[-1] in HALF]


def candidate_calls(
    tuner: Tuner, device: torch.device, *, all_precisions: bool = False
) -> Iterator[Callable[[], object]]:
    """Every call that `tune` times, with its candidate in the table until the next is asked for."""
    table = getattr(tuner.module, tuner.table)
    for key in keys_of(tuner, all_precisions=all_precisions):
        in_source = table[key]
        try:
            for candidate in dict.fromkeys((in_source, *tuner.candidates)):
                table[key] = candidate
                yield from tuner.calls(key, device)
        finally:
            table[key] = in_source


def time_ms(calls: Calls) -> float:
    """Sum of the median times; infinite if a block needs more resources than the GPU has."""
    try:
        return sum(triton.testing.do_bench(call, warmup=5, rep=20, return_mode="median") for call in calls)
    except (OutOfResources, PTXASError):
        return float("inf")


def with_equal_results(clock: Clock) -> Clock:
    """`clock`, but infinite for calls whose results are not those of the first time: of another configuration.

    If they had none then, the GPU lacking resources, nothing can be compared, and all are infinite.
    """
    first: tuple[Calls, list[Tensor] | None] | None = None

    def timed(calls: Calls) -> float:
        nonlocal first
        try:
            found = [result for call in calls for result in _tensors(call())]
        except (OutOfResources, PTXASError):
            found = None
        if first is None or first[0] is not calls:
            first = calls, found
        expected = first[1]
        if found is None or expected is None:
            return float("inf")
        agree = all(_furthest(a - b) <= ALLOWED * _furthest(b) for a, b in zip(found, expected, strict=True))
        return clock(calls) if agree else float("inf")

    return timed


def _tensors(results: object) -> list[Tensor]:
    return [x for x in (results if isinstance(results, (tuple, list)) else (results,)) if isinstance(x, Tensor)]


def _furthest(x: Tensor) -> float:
    """The largest magnitude; NaN if there is one, which no bound allows."""
    return float(x.abs().max())


def tune(
    tuner: Tuner,
    clock: Clock,
    device: torch.device,
    keep: Callable[[list[Any]], None] = lambda timed: None,
    *,
    all_precisions: bool = False,
) -> None:
    """Put the winners into the module's table and print them with both times.

    After each entry calls `keep` with the keys timed so far.
    """
    timed: list[Any] = []
    table = getattr(tuner.module, tuner.table)
    for key in keys_of(tuner, all_precisions=all_precisions):
        in_source = table[key]
        calls = tuner.calls(key, device)
        if not calls:
            continue
        times = {}
        for candidate in dict.fromkeys((in_source, *tuner.candidates)):
            table[key] = candidate
            times[candidate] = clock(calls)
        best = min(times, key=lambda candidate: times[candidate])
        table[key] = best if times[best] < (1 - MARGIN) * times[in_source] else in_source
        timed.append(key)
        keep(timed)
        print(
            f"{_literal(key)}: {_literal(table[key])}  {times[table[key]]:.3f} ms, {times[in_source]:.3f} before",
            flush=True,
        )


def write_table(
    tuner: Tuner, measured_on: str, source: Path | None = None, timed: Collection[Any] | None = None
) -> None:
    """Write the module's table between its marks in `source`, by default the module's own file.

    timed: the keys that were timed; others are marked "not timed". Default: all. Raises ValueError unless each mark
    occurs once, in order.
    """
    source = source or Path(str(tuner.module.__file__))
    text = source.read_text(encoding="utf-8")
    begin, end = f"    {BEGIN} {tuner.table}\n", f"    {END} {tuner.table}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(end) < text.index(begin):
        raise ValueError(f"{source} must hold '{begin.strip()}' and behind it '{end.strip()}', once each.")
    entries = getattr(tuner.module, tuner.table).items()
    lines = [f"# {measured_on}"]
    for key, value in entries:
        mark = "" if timed is None or key in timed else "  # not timed"
        lines.append(f"{_literal(key)}: {_literal(value)},{mark}")
    start = text.index(begin) + len(begin)
    between = "".join(f"    {line}\n" for line in lines)
    write(source, text[:start] + between + text[text.index(end) :])


def _literal(value: Any) -> str:
    """The value as Python source."""
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"{type(value).__name__ if hasattr(value, '_fields') else ''}({', '.join(map(_literal, value))})"
    return repr(value)


def depthwise_calls(key: tuple[int, bool, bool, int], device: torch.device) -> Calls:
    """Calls for the 5x5 entries; no published decoder has other windows."""
    K, upsample, backward, itemsize = key
    if K != 5:
        return []
    new, scale = _randoms(torch.float32 if itemsize == 4 else torch.bfloat16, device), 2 if upsample else 1
    calls: Calls = []
    for hidden, _, side in CELLS:
        h, weight, bias = new(BATCH, hidden, side, side), new(K, K, hidden), new(hidden)
        if backward:
            dy = new(BATCH, hidden, scale * side, scale * side)
            calls.append(partial(depthwise_swish.depthwise_swish_backward, dy, h, weight, upsample))
        else:
            calls.append(partial(depthwise_swish.depthwise_swish, h, weight, bias, upsample))
    return calls


def pointwise_calls(key: tuple[str, str], device: torch.device) -> Calls:
    shape_class, precision = key
    new, calls = _randoms(torch.bfloat16 if precision == "half" else torch.float32, device), Calls()
    for Cin, Cout, side in PRODUCTS[shape_class]:
        assert pointwise.shape_class(BATCH * side * side, Cin, Cout) == shape_class, (Cin, Cout, side)
        x, weight, bias = new(BATCH, Cin, side, side), new(Cout, Cin), new(Cout)
        forward = partial(pointwise.pointwise, x, weight, weight.T, bias, None, "swish")
        # the gradient of a layer from Cout to Cin channels has the same sizes
        weight_t, activated = new(Cin, Cout).T, new(BATCH, Cout, side, side)
        backward = partial(pointwise.pointwise_backward, x, weight_t, Cout, activated, "swish")
        calls += [partial(_with_precision, precision, call) for call in (forward, backward)]
    return calls


def residual_tail_calls(key: tuple[int, str], device: torch.device) -> Calls:
    """Forward of the cell with this many channels; the backward does not use the table."""
    width, precision = key
    ((hidden, C, side),) = (cell for cell in CELLS if cell[1] == width)
    new = _randoms(torch.bfloat16 if precision == "half" else torch.float32, device)
    squeezed, K = C // 16, 5
    gate = new(squeezed, C), new(squeezed), new(C, squeezed), new(C)
    h, skip = new(BATCH, hidden, side, side), new(BATCH, C, side, side)
    weights = new(K, K, hidden), new(hidden), new(C, hidden), new(C), *gate
    return [partial(_with_precision, precision, partial(residual_tail.residual_tail, h, skip, *weights, False))]


def _with_precision(precision: str, call: Callable[[], object]) -> object:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        return call()
    finally:
        torch.set_float32_matmul_precision(before)


def _randoms(dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """A function that makes normal tensors, images in NHWC memory."""

    def new(*size: int) -> Tensor:
        x = torch.randn(size, dtype=dtype, device=device)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

    return new


# One or two elements per thread; the faster half of what was timed on an H200.
STRIPS = tuple(
    depthwise_swish.Config(strip, block_x, block_c, True, num_warps)
    for strip, block_x, block_c, num_warps in (
        (2, 2, 64, 2), (2, 4, 32, 4), (2, 4, 64, 4), (2, 8, 32, 4), (4, 1, 64, 2), (4, 2, 64, 2), (4, 4, 64, 4),
        (8, 2, 64, 4),
    )
)  # fmt: skip
# 32 to 128 sums per thread: fewer leave the tensor cores idle, more do not fit into its registers.
BLOCKS = tuple(
    pointwise.Config(*sizes)
    for sizes in (
        (64, 64, 64, 4, 3), (64, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 32, 64, 4, 3), (128, 64, 64, 4, 3),
        (128, 128, 32, 8, 3), (128, 128, 64, 8, 3), (128, 256, 64, 8, 3),
    )
)  # fmt: skip


TUNERS = {
    "depthwise_swish": Tuner(depthwise_swish, "CONFIGS", STRIPS, depthwise_calls),
    "pointwise": Tuner(pointwise, "CONFIGS", BLOCKS, pointwise_calls),
    "residual_tail": Tuner(residual_tail, "STORES_ACTIVATED", (False, True), residual_tail_calls),
}


def main(arguments: Sequence[str]) -> None:
    """Tune the named tables, or all; each is written into its module as it goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="table", help=", ".join(TUNERS))
    parser.add_argument("--all", action="store_true", help="entries of float32 too")
    options = parser.parse_args(arguments)
    names = options.tables or list(TUNERS)
    unknown = sorted(set(names) - set(TUNERS))
    if unknown:
        parser.error(f"{', '.join(unknown)} has no table; there are {', '.join(TUNERS)}")
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a CUDA device, and there is none")
    parts = [f"--for=tune {name}{', all' if options.all else ''}" for name in names]
    subprocess.run([sys.executable, "-m", "benchmarks", "precompile", *parts], cwd=REPOSITORY, check=False)
    measured_on = f"Timed on an {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}."
    for name in (name for name in TUNERS if name in names):
        keep = partial(write_table, TUNERS[name], measured_on, None)
        tune(TUNERS[name], with_equal_results(time_ms), torch.device("cuda"), keep, all_precisions=options.all)
