"""The launches of Triton kernels by ops and frozen pairs, recorded on the meta device instead of made: needs no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.ops import cases
from vaebm_fast import VAEBM
from vaebm_fast.config import find_preset
from vaebm_fast.models import NVAE, EnergyNetwork
from vaebm_fast.ops._backend import Backend

META = torch.device("meta")


class Launch(NamedTuple):
    """A recorded launch."""

    kernel: JITFunction[Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def specialisation(self) -> tuple[object, ...]:
        """Equal for launches that Triton compiles once: the kernel, and what it specialises its arguments for."""
        given = {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **self.kwargs}
        varying = {parameter.name for parameter in self.kernel.params if not parameter.is_constexpr}
        return self.kernel, *(
            (name, _specialised(value) if name in varying else repr(value)) for name, value in sorted(given.items())
        )


def _specialised(value: Any) -> object:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % 16 == 0, value.bit_length() < 32
    return "float" if isinstance(value, float) else repr(value)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Context that records kernel launches instead of making them."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(Launch(self, args, kwargs))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


class _TritonOnMeta(TorchDispatchMode):
    """Runs the launchers of torch.ops.vaebm_triton on meta tensors, in place of the ops' fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "vaebm_triton":
            return func(*args, **(kwargs or {}))
        assert not kwargs, "the ops are called by position"
        name = func.overloadpacket.__name__
        module = "philox_normal" if name == "philox_words" else name.removesuffix("_backward")
        return getattr(importlib.import_module(f"vaebm_fast.triton_kernels.{module}"), name)(*args)


def launches_of(call: Callable[[], object]) -> list[Launch]:
    """The launches of `call`, whose tensors are on the meta device, without those that Triton compiles once."""
    with recorded_launches() as launches, _TritonOnMeta():
        call()
    return list({launch.specialisation: launch for launch in launches}.values())


def op_calls(of: tuple[cases.Case, ...]) -> Iterator[Callable[[], object]]:
    """The Triton kernel of each case that has one."""
    for case in of:
        if "triton" in cases.backends_of(case.op, META):
            yield partial(case.make(META), backend="triton")


def pair_call(preset: str, batch: int, backend: Backend, dtype: torch.dtype) -> Callable[[], object]:
    """A step's potential and gradient by a frozen pair of the preset."""
    found = find_preset(preset)
    with META:
        model = VAEBM(NVAE(found.nvae), EnergyNetwork(found.energy)).eval().requires_grad_(False)
    pair = model.freeze(dtype, backend)
    noise = torch.empty(batch, pair.noise_layout.dim, device=META)
    return lambda: pair.potential_and_grad(*pair.noise_layout.split(noise), "official")
