"""Registers the ops with torch: schemas of the Triton kernels, and the fakes and gradients of all compiled backends.

torch.ops.vaebm_fast holds the C++ and CUDA kernels; csrc/ops.cpp defines its schemas. torch.ops.vaebm_triton holds the
same ops in Triton. It is a separate namespace because under TRITON_INTERPRET=1 its kernels also run on CPU tensors,
which torch.ops.vaebm_fast dispatches to C++. The first call imports Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch

from vaebm_fast.ops._backend import OP_BACKENDS, is_interpreting
from vaebm_fast.runtime import extension

_library = torch.library.Library("vaebm_triton", "DEF")


def ops_of(backend: str) -> Any:
    """The namespace whose ops run a compiled backend."""
    return torch.ops.vaebm_triton if backend == "triton" else torch.ops.vaebm_fast


def define(op: str, arguments: str, backward: str | None = None, *, module: str | None = None) -> None:
    """Define the Triton ops `op` and, given `backward`, `op`_backward, with the schemas of csrc/ops.cpp.

    Functions of the same names in `vaebm_fast.triton_kernels.<module>` (default: <op>) implement them.
    """
    for name, schema in ((op, arguments), (f"{op}_backward", backward)):
        if schema is None:
            continue
        _library.define(name + schema)
        for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
            _library.impl(name, _run(module or op, name), key)


def register_fake(op: str, fake: Callable[..., Any]) -> None:
    """Register the fake (meta) implementation of `op` in every namespace that has it."""
    for namespace in _namespaces(op):
        torch.library.register_fake(f"{namespace}::{op}", fake)


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Register fakes and gradient of `op` in each namespace; `backward(ops, ctx, *gradients)` gets the namespace."""

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{op} is differentiable once; backend='reference' has further derivatives.")

    for namespace in _namespaces(op):
        name, ops = f"{namespace}::{op}", getattr(torch.ops, namespace)
        torch.library.register_fake(name, fake)
        torch.library.register_fake(f"{name}_backward", fake_backward)
        torch.library.register_autograd(name, partial(backward, ops), setup_context=save)
        torch.library.register_autograd(f"{name}_backward", refuse, setup_context=save_nothing)


def _namespaces(op: str) -> list[str]:
    """The namespaces that define `op` here, from its row in OP_BACKENDS."""
    backends = OP_BACKENDS[op]
    in_csrc = extension.is_available() and not {"cpp", "cuda"}.isdisjoint(backends)
    return ["vaebm_fast"] * in_csrc + ["vaebm_triton"] * ("triton" in backends)


def _run(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"vaebm_fast.triton_kernels.{module}")
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
            return getattr(kernels, name)(*args)  # Triton launches on the current device

    return run
