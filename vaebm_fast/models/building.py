"""Builds networks in any thread and under any of torch's defaults, without using its random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from vaebm_fast.config import EnergyConfig, NVAEConfig, whole_number
from vaebm_fast.models.energy import EnergyNetwork
from vaebm_fast.models.nvae import NVAE

RANDOM = {torch.rand, nn.init.uniform_, nn.init.kaiming_uniform_}  # all that networks of `models` draw with
OF_DEFAULT_DTYPE = {torch.rand, torch.empty, torch.zeros, torch.ones}


class _OwnDefaults(TorchFunctionMode):
    """Random numbers from a generator of its own, and float32 where no dtype is named; in this thread alone."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in RANDOM and given.get("generator") is None:
            given["generator"] = self._generator
        if func in OF_DEFAULT_DTYPE and given.get("dtype") is None:
            given["dtype"] = torch.float32
        return func(*args, **given)


@contextmanager
def building(seed: int = 0) -> Iterator[None]:
    """Inside, networks are built in float32 on the CPU, with weights that depend only on `seed`."""
    with torch.device("cpu"), _OwnDefaults(whole_number("seed", seed)):
        yield


@lru_cache(maxsize=16)
def skeleton(config: NVAEConfig | EnergyConfig) -> nn.Module:
    """The network on the meta device: modules, names and shapes without weights. Shared: do not change it."""
    with torch.device("meta"):
        return NVAE(config) if isinstance(config, NVAEConfig) else EnergyNetwork(config)
