"""torch.ops.vaebm_triton: the ops again, under the schemas of torch.ops.vaebm_fast, for the kernels written in Triton.

A namespace of its own, because under TRITON_INTERPRET=1 they run on CPU tensors too, where torch.ops.vaebm_fast has
the C++ kernels. Triton itself is imported by the first call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from vaebm_fast import _extension
from vaebm_fast.ops._backend import is_interpreting

_library = torch.library.Library("vaebm_triton", "DEF")


def define(module: str, *schemas: str) -> None:
    """Define ops whose implementations are the functions of the same names in `vaebm_fast.triton_kernels.<module>`."""
    for schema in schemas:
        name = schema.partition("(")[0]
        _library.define(schema)
        for key in ("CUDA", "CPU") if is_interpreting() else ("CUDA",):
            _library.impl(name, _run(module, name), key)


def namespaces() -> tuple[str, ...]:
    """The namespaces that hold the ops, for which fakes and gradients are registered."""
    return ("vaebm_triton", "vaebm_fast") if _extension.is_available() else ("vaebm_triton",)


def ops_of(backend: str) -> Any:
    """The namespace whose ops run a compiled backend."""
    return torch.ops.vaebm_triton if backend == "triton" else torch.ops.vaebm_fast


def _run(module: str, name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        kernels = importlib.import_module(f"vaebm_fast.triton_kernels.{module}")
        device = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device_of(device):  # Triton launches on the current one
            return getattr(kernels, name)(*args)

    return run
