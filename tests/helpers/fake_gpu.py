"""A GPU without one: what is put on "cuda" stays on the CPU, graphs are tapes, and torch.cuda counts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from benchmarks.step import pair
from tests.helpers.capturing import emulate
from vaebm_fast.chain import graphs

CUDA = torch.device("cuda")
Recorder = Callable[[graphs.Function, Sequence[Tensor], Any], graphs.Recording]


class CudaIsCpu(TorchFunctionMode):
    """Functions of torch that are asked for a CUDA tensor make one on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def moved(leaf: Any) -> Any:
            return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == "cuda" else leaf

        args, kwargs = tree_map(moved, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.fixture(name="gpu")
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[graphs.Recording]]:
    """Makes `CUDA` a device of this process; gives the recordings that were made."""
    made = emulate(monkeypatch)
    monkeypatch.setattr(pair, "op_why_not", lambda op, device, backend: "its tensors are on the CPU")
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    with CudaIsCpu():
        yield made
