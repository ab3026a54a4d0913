"""Backend selection for every op: the table of implementations and the only dispatcher.

Every op has `reference` (plain PyTorch, any device). `auto` is `cpp` on a CPU, if it is built; on a GPU it is what was
measured to be faster than plain PyTorch (`_measured`). A backend requested by name either runs or raises an error that
says how to get it.
`resolve` selects the backend of every op of a frozen pair at once.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from vaebm_fast.ops._measured import PAIR, fastest
from vaebm_fast.runtime import extension
from vaebm_fast.runtime.errors import UserError


class BackendError(UserError, RuntimeError):
    """A backend requested by name cannot run here; the message says why and how to get it."""


Backend = Literal["auto", "reference", "cpp", "triton", "cuda"]
BACKENDS: tuple[str, ...] = ("reference", "cpp", "triton", "cuda")

_WITHOUT_GRADIENT: Mapping[str, tuple[str, ...]] = {
    "philox_words": ("reference", "cpp", "triton", "cuda"),
    "philox_normal": ("reference", "cpp", "triton", "cuda"),
    "langevin_update": ("reference", "cpp", "triton", "cuda"),
    "power_iteration": ("reference", "cpp", "cuda"),
    "gather_images": ("reference", "cpp", "triton"),
}
_WITH_GRADIENT: Mapping[str, tuple[str, ...]] = {  # each is two ops: `name` and `name`_backward
    "depthwise_swish": ("reference", "cpp", "triton", "cuda"),
    "pointwise": ("reference", "cpp", "triton", "cuda"),
    "bilinear_upsample": ("reference", "triton"),
    "inverted_residual": ("reference", "cuda"),
    "residual_tail": ("reference", "triton"),
    "energy_epilogue": ("reference", "cpp", "triton"),
    "energy_head": ("reference", "cpp", "triton"),
    "se_gate_residual": ("reference", "cpp", "triton"),
    "gaussian_latent": ("reference", "cpp", "triton"),
    "pixel_head": ("reference", "cpp", "triton"),
}
OP_BACKENDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **_WITHOUT_GRADIENT,
        **{f"{op}{way}": backends for op, backends in _WITH_GRADIENT.items() for way in ("", "_backward")},
    }
)

# Storage dtypes of each backend; all compute in float32. The reference takes every floating dtype.
DTYPES: Mapping[str, tuple[torch.dtype, ...]] = MappingProxyType(
    {
        "cpp": (torch.float32,),
        "triton": (torch.float32, torch.bfloat16, torch.float16),
        "cuda": (torch.float32, torch.bfloat16),
    }
)

# The only dtype of ops that take no floating one, on every backend; they check it themselves.
_FIXED_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({"gather_images": torch.uint8})

GPU_BACKENDS: tuple[Backend, ...] = ("cuda", "triton")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def is_interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on tensors of any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """Storage dtypes of a compiled backend here. Triton's interpreter has no bfloat16: it multiplies it as integers."""
    return tuple(
        dtype
        for dtype in DTYPES[backend]
        if not (backend == "triton" and is_interpreting() and dtype == torch.bfloat16)
    )


def require_dtype(op: str, backend: str, dtype: torch.dtype) -> None:
    """Raise UserError if `backend` does not take tensors of this dtype."""
    if backend != "reference" and dtype not in dtypes(backend):
        names = " or ".join(str(taken).removeprefix("torch.") for taken in dtypes(backend))
        raise UserError(f"{op} with backend={backend!r} takes {names}, not {dtype}; ask for backend='reference'.")


def why_absent(backend: str) -> str | None:
    """What this machine lacks for a backend and how to get it, as a clause; None when it has everything."""
    if backend == "cpp":
        return extension.why_missing()
    if backend == "triton" and not _is_installed("triton"):
        return "Triton is not installed; `pip install triton` installs it"
    if backend == "cuda" and not extension.is_available():
        return extension.why_missing()
    if backend == "cuda" and not extension.has_cuda():
        return (
            "the compiled part holds no CUDA kernels; with a CUDA build of torch and nvcc on the PATH, "
            "`VAEBM_CUDA=1 pip install --no-build-isolation -e .` builds them"
        )
    return None


def why_not(op: str, device: torch.device, backend: str) -> str | None:
    """Why `op` cannot run with `backend` on tensors of `device`, as a clause; None when it can."""
    if backend not in OP_BACKENDS[op]:
        return f"{op} has no such implementation; it has {', '.join(OP_BACKENDS[op])}"
    if device.type == "meta":  # only the op's fake runs, to count work: no kernel is needed
        return extension.why_missing() if backend in ("cpp", "cuda") else None
    absent = why_absent(backend)
    if absent or backend == "reference":
        return absent
    if backend == "triton" and is_interpreting():
        return None
    needed = "cpu" if backend == "cpp" else "cuda"
    if device.type != needed:
        return f"it runs on {needed} tensors and these are on {device}; move them with .to({needed!r})"
    return None


def choose(op: str, device: torch.device, backend: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that runs `op` on tensors of this device and dtype: by the rule for "auto", otherwise the one named.

    Raises ValueError for a name that does not exist, BackendError when the named backend cannot run here.
    """
    if backend == "auto":
        if device.type == "cuda":
            ways = (op, f"{op}_backward") if op in _WITH_GRADIENT else (op,)  # autograd keeps to the forward's backend
            return fastest(device, dtype, ways, (name for name in _compiled() if why_not(op, device, name) is None))
        return "cpp" if device.type == "cpu" and why_not(op, device, "cpp") is None else "reference"
    if backend not in BACKENDS:
        raise UserError(f"Backend {backend!r} is not known; it must be one of auto, {', '.join(BACKENDS)}.")
    reason = why_not(op, device, backend)
    if reason is not None:
        raise BackendError(f"{op} cannot run with backend={backend!r}: {reason}.")
    return backend


# A frozen pair runs these ops on one backend only; on every other it runs their parts.
_FUSED: Mapping[str, Backend] = MappingProxyType({"inverted_residual": "cuda", "residual_tail": "triton"})
# Runs the other ops that a pair's backend does not implement. "cpp" lacks only the bilinear upsampling; PyTorch's is
# deterministic on a CPU.
_SUBSTITUTES: Mapping[str, Backend] = MappingProxyType({"cpp": "reference", "cuda": "triton"})


@dataclass(frozen=True)
class OpBackends:
    """The backend of each op in a frozen pair; `name` is the backend of the pair as a whole.

    `op in backends`: whether the pair runs the op; False for a fused op that it runs as its parts.
    """

    name: Backend
    by_op: Mapping[str, Backend]

    @classmethod
    def of(cls, name: Backend) -> OpBackends:
        """The ops of a pair frozen for `name`, not "auto"; does not check that they can run here, as `resolve` does.

        Autograd runs the backward of an op on the backend of its forward.
        """
        by_op = {
            op: name if name in backends else _SUBSTITUTES.get(name, name)
            for op, backends in _WITH_GRADIENT.items()
            if _FUSED.get(op, name) == name
        }
        return cls(name, by_op)

    def __getitem__(self, op: str) -> Backend:
        return self.by_op[op]

    def __contains__(self, op: str) -> bool:
        return op in self.by_op


def resolve(backend: Backend, device: torch.device, dtype: torch.dtype) -> OpBackends:
    """The backend of each op in a pair frozen with `backend`; "auto" follows the rule of `choose` for whole pairs.

    Raises ValueError for an unknown name or a dtype that the backend does not take, RuntimeError for a missing backend.
    """
    if backend == "auto":
        backend = _auto_pair(device, dtype)
    backends = OpBackends.of(backend)
    for op in ("depthwise_swish", "energy_epilogue"):  # one op with a CUDA C++ kernel, one without
        require_dtype("A frozen pair", choose(op, device, backends[op]), dtype)
    return backends


def _auto_pair(device: torch.device, dtype: torch.dtype) -> Backend:
    if device.type != "cuda":
        is_compiled = dtype in dtypes("cpp") and why_not("pointwise", device, "cpp") is None
        return "cpp" if is_compiled else "reference"

    def runs(name: Backend) -> bool:
        return all(why_not(op, device, backend) is None for op, backend in OpBackends.of(name).by_op.items())

    measured = fastest(device, dtype, (PAIR,), (name for name in _compiled() if runs(name)))
    return next((name for name in GPU_BACKENDS if name == measured), "reference")


def _compiled() -> tuple[Backend, ...]:
    """The GPU's backends, without Triton where its kernels are interpreted: none of them was measured so."""
    return tuple(name for name in GPU_BACKENDS if not (name == "triton" and is_interpreting()))


@dataclass(frozen=True)
class OpReport:
    """The backend that `auto` picks for an op (in float32 where it takes several dtypes), and why others cannot run."""

    op: str
    backend: str
    unusable: Mapping[str, str]


def report(device: torch.device) -> list[OpReport]:
    """One OpReport per op for tensors of `device`; `vaebm-fast info` prints it."""
    reports = []
    for op, backends in OP_BACKENDS.items():
        reasons = {name: why_not(op, device, name) for name in backends}
        unusable = {name: reason for name, reason in reasons.items() if reason is not None}
        chosen = choose(op, device, "auto", _FIXED_DTYPES.get(op, torch.float32))
        reports.append(OpReport(op, chosen, unusable))
    return reports
