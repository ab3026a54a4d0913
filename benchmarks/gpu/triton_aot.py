"""Compiles every Triton kernel ahead of time, without a GPU: registers, shared memory and spills for sm_80 and sm_90.

Calls the launchers with meta tensors at the shapes of celeba_256 and compiles each launch instead of running it, with
the same arguments, constants and alignments as on a GPU. `python -m benchmarks kernels --launches PART` prints the
results; TRITON_CACHE_DIR is the folder of compiled kernels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.gpu.launches import Launch, recorded_launches
from vaebm_fast.triton_kernels import (
    bilinear_upsample,
    depthwise_swish,
    energy_epilogue,
    energy_head,
    gather_images,
    gaussian_latent,
    langevin_update,
    philox_normal,
    pixel_head,
    pointwise,
    residual_tail,
    se_gate_residual,
)

ARCHITECTURES = (80, 90)
DTYPES = (torch.float32, torch.bfloat16)


class Compiled(NamedTuple):
    """A launch compiled for an architecture: resources (shared memory in bytes, spills in bytes per thread), PTX."""

    name: str
    architecture: int
    registers: int
    shared: int
    spills: int
    num_warps: int
    ptx: str


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel specialised to the arguments' types, constants and alignments, as by Triton's launcher."""
    kernel, backend = launch.kernel, make_backend(target)
    kwargs = {**launch.kwargs, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, given = bind(*launch.args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, given)
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def compile_launch(name: str, launch: Launch, architecture: int) -> Compiled:
    """Compile a launch for an architecture, as Triton's launcher would."""
    target = GPUTarget("cuda", architecture, 32)
    source, options = specialised(launch, target)
    compiled = triton.compile(source, target=target, options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    metadata, ptx = compiled.metadata, compiled.asm["ptx"]
    return Compiled(name, architecture, registers, metadata.shared, spills, metadata.num_warps, ptx)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) per thread; the bytes are 0 unless it spills."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", done.stdout)}
    return used["REG"], used["STACK"] + used["LOCAL"]


Case = tuple[str, Callable[[], object]]


def cases() -> Iterator[Case]:
    """(name, a call of a launcher) for every kernel, form and dtype, at shapes of celeba_256 with 16 images."""
    yield from _noise()
    yield from _images()
    for dtype in DTYPES:
        label = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        for family in (_depthwise, _pointwise, _residual_tail, _element_wise):
            for name, call in family(dtype):
                yield f"{name} {label}", call


def _empty(dtype: torch.dtype, *size: int) -> Tensor:
    x = torch.empty(size, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def _depthwise(dtype: torch.dtype) -> Iterator[Case]:
    new = partial(_empty, dtype)
    for K in (3, 5, 7, 11):
        for upsample in (False, True):
            form = f"{K}x{K} up" if upsample else f"{K}x{K}"
            h, dy, side = new(16, 768, 32, 32), new(16, 768, 64, 64) if upsample else new(16, 768, 32, 32), new(768)
            weight = new(K, K, 768)
            yield f"depthwise_swish {form}", partial(depthwise_swish.depthwise_swish, h, weight, side, upsample)
            backward = depthwise_swish.depthwise_swish_backward
            yield f"depthwise_swish_backward {form}", partial(backward, dy, h, weight, upsample)


def _pointwise(dtype: torch.dtype) -> Iterator[Case]:
    """Each configuration once forward, as a projection, and once backward; also the ELU before a prior's head."""
    new = partial(_empty, dtype)
    x, y, weight = new(16, 64, 128, 128), new(16, 40, 128, 128), new(40, 64)
    yield "pointwise 64->40 elu", partial(pointwise.pointwise, x, weight, weight.T, new(40), None, "elu")
    yield "pointwise_backward 40->64 elu", partial(pointwise.pointwise_backward, y, weight.T, 64, x, "elu")
    for Cin, Cout, side in ((1536, 20, 32), (384, 64, 128), (768, 128, 64)):
        x, y, weight = new(16, Cin, side, side), new(16, Cout, side, side), new(Cout, Cin)
        for precision in ("highest", "high") if dtype == torch.float32 else ("highest",):
            tf32 = " tf32" if precision == "high" else ""
            forward = partial(pointwise.pointwise, x, weight, weight.T, new(Cout), y, "swish")
            yield f"pointwise {Cin}->{Cout}{tf32}", partial(_with_precision, precision, forward)
            backward = partial(pointwise.pointwise_backward, y, weight.T, Cin, x, "swish")
            yield f"pointwise_backward {Cout}->{Cin}{tf32}", partial(_with_precision, precision, backward)


def _residual_tail(dtype: torch.dtype) -> Iterator[Case]:
    """Most cells both ways; forward also with swish(h2) stored, and with narrow blocks."""
    new, precisions = partial(_empty, dtype), ("highest", "high") if dtype == torch.float32 else ("highest",)
    for hidden, C, side, precision in (
        (6144, 1024, 8, "highest"),
        (192, 32, 256, "highest"),
        (1536, 256, 32, "highest"),
        (1536, 256, 32, "high"),
    ):
        if precision not in precisions:
            continue
        (h, y), form = (new(16, c, side, side) for c in (hidden, C)), f"{hidden}->{C}"
        depthwise, project, first = new(5, 5, hidden), new(C, hidden), new(16, C)
        weights = depthwise, new(hidden), project, new(C), first, new(16), first.T, new(C)
        forward = partial(residual_tail.residual_tail, h, y, *weights, False)
        tf32 = " tf32" if precision == "high" else ""
        yield f"residual_tail {form}{tf32}", partial(_with_precision, precision, forward)
        if C == 256:
            given = y, h, h, y, new(16, 16), new(16, C), depthwise, project, first, first.T
            backward = partial(residual_tail.residual_tail_backward, *given, False)
            yield f"residual_tail_backward {form}{tf32}", partial(_with_precision, precision, backward)


def _with_precision(precision: str, call: Callable[[], object]) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        call()
    finally:
        torch.set_float32_matmul_precision(before)


def _element_wise(dtype: torch.dtype) -> Iterator[Case]:
    """Element-wise ops. Noise and latents are float32 even if the networks are bfloat16."""
    new, noise = partial(_empty, dtype), partial(_empty, torch.float32)
    y = new(16, 256, 64, 64)
    yield "energy_epilogue", partial(energy_epilogue.energy_epilogue, y, y, 1.0, new(256))
    yield "energy_epilogue_backward", partial(energy_epilogue.energy_epilogue_backward, y, y, y, 1.0, new(256))
    low = new(16, 64, 64, 64)
    yield "bilinear_upsample", partial(bilinear_upsample.bilinear_upsample, low)
    yield "bilinear_upsample_backward", partial(bilinear_upsample.bilinear_upsample_backward, new(16, 64, 128, 128))
    last, linear = new(16, 512, 4, 4), noise(512)
    terms = last, last, 0.9, new(512)
    yield "energy_head", partial(energy_head.energy_head, *terms, linear, noise(1))
    yield "energy_head_backward", partial(energy_head.energy_head_backward, noise(16), *terms, linear)
    for C, side in ((1024, 8), (256, 64), (32, 256)):  # the widest gate, one of most cells, the most chunks
        s, w, hidden = new(16, C, side, side), new(max(C // 16, 4), C), new(16, max(C // 16, 4))
        forward = partial(se_gate_residual.se_gate_residual, s, s, w, hidden[0], w.T, w[0])
        yield f"se_gate_residual {C}", forward
        backward = partial(se_gate_residual.se_gate_residual_backward, s, s, hidden, new(16, C), w, w.T)
        yield f"se_gate_residual_backward {C}", backward
    eps, parameters, log_p = noise(16, 20, 32, 32), new(16, 40, 32, 32), noise(16)
    yield "gaussian_latent", partial(gaussian_latent.gaussian_latent, parameters, eps, 1.0, True)
    gradients = partial(gaussian_latent.gaussian_latent_backward, eps, log_p, parameters, eps, 1.0)
    yield "gaussian_latent_backward", gradients
    eps_x, logits = noise(16, 3, 256, 256), new(16, 6, 256, 256)
    yield "pixel_head", partial(pixel_head.pixel_head, logits, eps_x, True)
    yield "pixel_head_backward", partial(pixel_head.pixel_head_backward, eps_x, log_p, logits, eps_x)


def _noise() -> Iterator[Case]:
    """Noise ops, always float32."""
    N, D, stream = 16, 1_942_528, 0
    seeds, draw = _empty(torch.int64, N), _empty(torch.int64)
    yield "philox_words", partial(philox_normal.philox_words, seeds, draw, stream, D)
    yield "philox_normal", partial(philox_normal.philox_normal, seeds, draw, stream, D)
    eps, gradient, flags = _empty(torch.float32, N, D), _empty(torch.float32, N, D), _empty(torch.int64, N)
    for prior in (False, True):
        step = partial(langevin_update.langevin_update, eps, gradient, seeds, draw, flags, stream, 3e-6, prior)
        yield f"langevin_update{', prior' if prior else ''}", step


def _images() -> Iterator[Case]:
    """Training batches of 256 out of 27,000 images in uint8: in colour, cropped to an odd side, and grey."""
    index, flip = _empty(torch.int64, 256), _empty(torch.bool, 256)
    for size, side, C in ((256, 256, 3), (64, 64, 3), (63, 64, 3), (32, 32, 1)):
        images = torch.empty((27_000, side, side, C), dtype=torch.uint8, device="meta")
        call = partial(gather_images.gather_images, images, index, flip, index, index, size)
        yield f"gather_images {size}x{size}x{C}", call


def report(
    matching: str = "", without: tuple[str, ...] = (), architectures: tuple[int, ...] = ARCHITECTURES
) -> Iterator[Compiled]:
    """Compile every case whose name contains `matching` and none of `without`, a row per kernel that it launches."""
    for name, call in cases():
        if matching not in name or any(part in name for part in without):
            continue
        with recorded_launches() as launches:
            call()
        for launch in launches:
            kernel = launch.kernel.__name__ if len(launches) > 1 else ""
            for architecture in architectures:
                yield compile_launch(f"{name} {kernel}".strip(), launch, architecture)
