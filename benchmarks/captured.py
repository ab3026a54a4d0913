"""Steps launched as one CUDA graph, as the sampler launches its chains, and how a call is launched."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from vaebm_fast.chain.graphs import Graphs

EAGER, GRAPH = "eager", "CUDA graph"

Call = Callable[[], object]


def captured(step: Call, device: torch.device) -> Call:
    """`step` as a graph by `Graphs`: the first call runs it and warms up, the second captures it, others replay it.

    What `step` reads and writes stays where it is; a replay copies one number each way besides, and allocates no more.
    """
    graphs, token = Graphs(), torch.zeros(1, device=device)

    def function(token: Tensor) -> tuple[Tensor]:
        step()
        return (token.clone(),)

    return lambda: graphs(function, (token,), "step")


def launched_by(capturing: Call, device: torch.device) -> str:
    """How the work of `capturing` is launched: GRAPH, or EAGER with the reason if a GPU cannot capture it.

    `capturing` is called once: the second call of a function that `Graphs` is given.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        capturing()
    reasons = [str(warning.message) for warning in caught if "CUDA graph" in str(warning.message)]
    if reasons:
        return f"{EAGER}: {reasons[0]}"
    return GRAPH if device.type == "cuda" else EAGER
