"""torch.ops.vaebm_triton: the ops again, under the schemas of torch.ops.vaebm_fast, for the kernels written in Triton.

A namespace of its own, because under TRITON_INTERPRET=1 they run on CPU tensors too, where torch.ops.vaebm_fast has the
C++ kernels. Both share their fakes and gradients: `register`. Triton itself is imported by the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch

from vaebm_fast.ops._backend import is_interpreting
from vaebm_fast.runtime import extension

_library = torch.library.Library("vaebm_triton", "DEF")


def ops_of(backend: str) -> Any:
    """The namespace whose ops run a compiled backend."""
    return torch.ops.vaebm_triton if backend == "triton" else torch.ops.vaebm_fast


def define(op: str, arguments: str, backward: str | None = None, *, module: str | None = None) -> None:
    """Define `op`, and `op`_backward where it has one, by what follows their names in csrc/ops.cpp.

    Functions of the same names in `vaebm_fast.triton_kernels.<module>`, by default <op>, implement them.
    """
    for name, schema in ((op, arguments), (f"{op}_backward", backward)):
        if schema is None:
            continue
        _library.define(name + schema)
        for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
            _library.impl(name, _run(module or op, name), key)


def register_fake(op: str, fake: Callable[..., Any]) -> None:
    """Register what `op` returns on tensors without values, in both namespaces."""
    for namespace in _namespaces():
        torch.library.register_fake(f"{namespace}::{op}", fake)


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    fake_backward: Callable[..., Any],
    save: Callable[..., None],
    backward: Callable[..., Any],
    is_compiled: bool = True,
) -> None:
    """Register fakes and gradient of `op` in both namespaces; `backward(ops, ctx, *gradients)` gets its own one.

    An op that is in Triton alone is not `is_compiled`.
    """

    def save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    def refuse(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(f"{op} is differentiable once; backend='reference' has further derivatives.")

    for namespace in _namespaces() if is_compiled else ("vaebm_triton",):
        name, ops = f"{namespace}::{op}", getattr(torch.ops, namespace)
        torch.library.register_fake(name, fake)
        torch.library.register_fake(f"{name}_backward", fake_backward)
        torch.library.register_autograd(name, partial(backward, ops), setup_context=save)
        torch.library.register_autograd(f"{name}_backward", refuse, setup_context=save_nothing)


def _namespaces() -> tuple[str, ...]:
    return ("vaebm_fast", "vaebm_triton") if extension.is_available() else ("vaebm_triton",)


def _run(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"vaebm_fast.triton_kernels.{module}")
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, torch.Tensor))):
            return getattr(kernels, name)(*args)  # Triton launches on the current device

    return run
