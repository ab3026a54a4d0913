"""Captures a step into a CUDA graph, as the sampler does with its chains, and reports how a step was launched."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vaebm_fast.chain.graphs import Graphs

EAGER, GRAPH = "eager", "CUDA graph"

Call = Callable[[], object]


def captured(step: Call, device: torch.device) -> Call:
    """`step` under `Graphs`: the first call runs it eagerly as warm-up, the second captures it, later calls replay it.

    `step` must use tensors at fixed addresses. A replay also copies one number each way; it allocates nothing.
    """
    graphs, token = Graphs(), torch.zeros(1, device=device)

    def function(token: Tensor) -> tuple[Tensor]:
        step()
        return (token.clone(),)

    return lambda: graphs(function, (token,), "step")


def launched_by(capturing: Call, device: torch.device) -> str:
    """How `capturing` launches its work: GRAPH, or EAGER with the reason why it cannot be captured.

    Calls `capturing` once; it must be the second call of a function given to `Graphs`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capturing()
    reasons = [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]
    if reasons:
        return f"{EAGER}: {reasons[0]}"
    return GRAPH if device.type == "cuda" else EAGER
