"""Defines the ops in torch: the only schema of each, its fake, its gradient and its Triton kernels.

torch.ops.vaebm_fast holds the C++ and CUDA kernels, which csrc registers for these schemas. torch.ops.vaebm_triton
holds the same ops in Triton. It is a separate namespace because under TRITON_INTERPRET=1 its kernels also run on CPU
tensors, which torch.ops.vaebm_fast dispatches to C++. The first call imports Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library

from vaebm_fast.ops._backend import OP_BACKENDS, is_interpreting
from vaebm_fast.runtime import extension

OUTDATED = f"The compiled part is of other sources than these; {extension.BUILD} again."

# `_backend` has loaded the compiled extension. In the other order, a kernel that does not fit its schema would end the
# process while the extension loads; in this order `define` raises.
_TRITON = Library("vaebm_triton", "DEF")
try:
    _CSRC = Library("vaebm_fast", "DEF")
except RuntimeError as error:  # an extension that defines schemas itself
    raise ImportError(OUTDATED) from error


def ops_of(backend: str) -> Any:
    """The namespace whose ops run a compiled backend."""
    return torch.ops.vaebm_triton if backend == "triton" else torch.ops.vaebm_fast


def define(schema: str, fake: Callable[..., Any], *, module: str | None = None) -> None:
    """Define an op, such as "scale(Tensor x, float by) -> Tensor", in the namespaces of its backends in OP_BACKENDS.

    fake: the fake (meta) implementation; it gets all arguments by position. A function of the op's name in
    `vaebm_fast.triton_kernels.<module>` (default: the name without _backward) implements it in Triton.
    Raises ImportError if the C++ or CUDA kernel of this name has another signature.
    """
    op = schema.partition("(")[0]
    for library in _libraries(op):
        try:
            library.define(schema)
        except RuntimeError as error:
            raise ImportError(OUTDATED) from error
        torch.library.register_fake(f"{library.ns}::{op}", fake, lib=library)
        if library is _TRITON:
            for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
                library.impl(op, _run(module or op.removesuffix("_backward"), op), key)


def like(x: Tensor, *shape: int) -> Tensor:
    """An empty channels_last tensor with dtype and device of x, for fakes; of this shape, or that of x."""
    return torch.empty(shape or x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def register_gradient(op: str, *, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the gradient of `op` in its namespaces, and an error as that of `op`_backward.

    `save(ctx, inputs, output)` stores what `backward(ops, ctx, *gradients)` reads; `ops` is the namespace.
    """

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{op} is differentiable once; backend='reference' has further derivatives.")

    for library in _libraries(op):
        name, ops = f"{library.ns}::{op}", getattr(torch.ops, library.ns)
        torch.library.register_autograd(name, partial(backward, ops), setup_context=save, lib=library)
        torch.library.register_autograd(f"{name}_backward", refuse, setup_context=save_nothing, lib=library)


def _libraries(op: str) -> list[Library]:
    backends = OP_BACKENDS[op]
    return [_CSRC] * ("cpp" in backends or "cuda" in backends) + [_TRITON] * ("triton" in backends)


def _run(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"vaebm_fast.triton_kernels.{module}")
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            return getattr(kernels, name)(*args)  # Triton launches on the current device

    return run
