"""Modules in a state that a test can learn from, and the published layout and formulas that they must match."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def generic(module: nn.Module) -> Any:
    """The module in eval mode and float64, with statistics and weights of its batch normalisations that matter."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, -1.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval().double()


def wn(name: str, *, bias: bool = True) -> set[str]:
    return {f"{name}.weight", f"{name}.log_weight_norm"} | ({f"{name}.bias"} if bias else set())


def written_out_wn(state: dict[str, Tensor], name: str, x: Tensor, **options: Any) -> Tensor:
    weight = state[f"{name}.weight"]
    norm = weight.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()
    effective = state[f"{name}.log_weight_norm"].exp() * weight / (norm + 1e-5)
    return F.conv2d(x, effective, state.get(f"{name}.bias"), **options)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)
