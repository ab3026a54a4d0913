"""What every Triton kernel compiles to, without a GPU: registers, shared memory and spills for sm_80 and sm_90.

The launchers are called with tensors of the meta device at the shapes of celeba_256, and each launch is compiled
instead of run, with the very arguments, constants and alignments that it would have there. `python -m
benchmarks.triton_aot` prints the table; TRITON_CACHE_DIR says where compiled kernels are kept.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHITECTURES = (80, 90)
DTYPES = (torch.float32, torch.bfloat16)


class Compiled(NamedTuple):
    """One launch for one architecture; shared memory and spills in bytes, the latter per thread."""

    name: str
    architecture: int
    registers: int
    shared: int
    spills: int
    num_warps: int


class Launch(NamedTuple):
    """A launch that was asked for."""

    kernel: JITFunction[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Kernels launched inside are not run but noted."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_launch(name: str, launch: Launch, architecture: int) -> Compiled:
    """What Triton's own launcher would compile for these arguments on that architecture."""
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    kernel = launch.kernel
    kwargs = {**launch.kwargs, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(name, architecture, registers, compiled.metadata.shared, spills, compiled.metadata.num_warps)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread; a kernel that spills nothing has neither."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, a call of a launcher) for every kernel, form and dtype."""
    for dtype in DTYPES:
        yield from _depthwise(dtype)


def _depthwise(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    from vaebm_fast.triton_kernels import depthwise_swish as kernels

    def image(channels: int, side: int) -> Tensor:
        x = torch.empty(16, channels, side, side, dtype=dtype, device="meta")
        return x.to(memory_format=torch.channels_last)

    for K in (3, 5, 7, 11):
        for upsample in (False, True):
            h, dy = image(768, 32), image(768, 64 if upsample else 32)
            weight, bias = torch.empty(K, K, 768, dtype=dtype, device="meta"), torch.empty(768, dtype=dtype, device="meta")
            form = f"{K}x{K}{' up' if upsample else ''} {_short(dtype)}"
            yield f"depthwise_swish {form}", lambda a=(h, weight, bias, upsample): kernels.depthwise_swish(*a)
            yield (
                f"depthwise_swish_backward {form}",
                lambda a=(dy, h, weight, upsample): kernels.depthwise_swish_backward(*a),
            )


def _short(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def report(matching: str = "", architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[Compiled]:
    """Compile every case whose name contains `matching`; a name appears once per kernel that its call launches."""
    for name, call in cases():
        if matching in name:
            with recorded_launches() as launches:
                call()
            for launch in launches:
                for architecture in architectures:
                    yield compile_launch(name, launch, architecture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("matching", nargs="?", default="", help="part of a name")
    for row in report(parser.parse_args().matching):
        print(
            f"{row.name:<46} sm_{row.architecture} {row.num_warps:2} warps {row.registers:4} registers "
            f"{row.shared:7} B shared {row.spills:4} B spilled",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
