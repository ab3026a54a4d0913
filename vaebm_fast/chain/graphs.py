"""CUDA graphs: captures the launches of a function of tensors once and replays them as one launch.

Independent of chains. A function can be captured if all state that changes between calls is in tensors (inputs and
counters), it never synchronises with the device, and everything else that it reads (weights) has a fixed address, where
the next replay sees changes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]

MOST_GRAPHS = 4  # training needs one, sampling one per batch size
_ABANDONED: list[torch.cuda.CUDAGraph] = []  # kept alive: torch's allocators may still call a graph that failed


@dataclass(frozen=True)
class Recording:
    """A captured function: inputs and outputs at fixed addresses, and the replay that computes the outputs.

    pool: torch's handle of the memory pool that holds everything the function allocated.
    """

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]
    pool: Any

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensors:
        """The function's results for these inputs, as copies that the caller owns."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


class Graphs:
    """Calls functions of CUDA tensors and captures a function when it is called again; on other devices it only calls.

    The first call of a key runs eagerly and warms up lazy setup (kernel compilation, library workspaces), so a batch
    size that occurs once is never captured. The second call captures; later calls replay and return copies. If a
    capture fails, a warning gives the reason and the key runs eagerly from then on.
    All graphs share one memory pool, sized by the largest: they run one at a time, and nothing in the pool is needed
    after the results are copied.
    """

    def __init__(self) -> None:
        self._warm: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._recordings: dict[Hashable, Recording] = {}
        self._pool: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(Graphs())  # a copy captures anew: a graph belongs to the memory that it was captured in

    def __call__(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> Tensors:
        """`function(*inputs)`, a tuple of tensors that are not its inputs.

        key: everything that the results depend on, except the inputs' values, shapes, dtypes and devices and torch's
        float32 precision settings (a captured kernel keeps its setting), which are added here.
        """
        cudnn = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        products = torch.backends.cuda.matmul.fp32_precision, cudnn
        key = (key, products, tuple((given.shape, given.dtype, given.device) for given in inputs))
        if key in self._failed or not all(_is_capturable(given) for given in inputs):
            return function(*inputs)
        if key not in self._warm:
            self._warm.add(key)
            return _warm_up(function, inputs)
        if key not in self._recordings:
            reason = self._capture(function, inputs, key)
            if reason is not None:  # the exception is gone by now: its traceback would keep the chain's memory
                warnings.warn(
                    f"A chain could not be captured into a CUDA graph and runs eagerly: {reason}", stacklevel=2
                )
                return function(*inputs)
        return self._recordings[key](inputs)

    def _capture(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> str | None:
        """Capture and store a recording, replacing the oldest at the limit; return the reason if that fails."""
        try:
            recording = _record(function, inputs, self._pool)
        except RuntimeError as error:
            self._failed.add(key)
            return _reason(error)
        if len(self._recordings) == MOST_GRAPHS:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key], self._pool = recording, recording.pool
        return None


def _reason(error: RuntimeError) -> str:
    """Why a capture failed: after an error inside, ending the capture raises a second one that hides the first."""
    first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return str(first).strip().split("\n")[0]


def _is_capturable(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, because the allocator keeps separate memory per stream."""
    return torch.cuda.Stream(device)


def _warm_up(function: Function, inputs: Sequence[Tensor]) -> Tensors:
    """`function(*inputs)` on the stream that will capture it; the current stream waits for it."""
    device = inputs[0].device
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        outputs = function(*inputs)
    current.wait_stream(side)
    for output in outputs:
        output.record_stream(current)
    return outputs


@torch.inference_mode(False)  # a replay outside inference mode could not write inference tensors
def _record(function: Function, inputs: Sequence[Tensor], pool: Any) -> Recording:
    """Capture `function` on copies of `inputs` in the memory pool `pool` (None: a new one). Raises RuntimeError."""
    device, graph = inputs[0].device, torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # Restores the current stream: torch.cuda.graph stays on the capture stream if ending the capture raises.
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        kept = tuple(given.detach().clone() for given in inputs)
        try:
            # thread_local: other threads (data loaders, NCCL) may make calls that a capture forbids.
            with torch.cuda.graph(graph, pool, _side_stream(device), capture_error_mode="thread_local"):
                outputs = function(*kept)
        except RuntimeError:
            _abandon(graph, pool, device)
            raise
    return Recording(kept, outputs, graph.replay, pool)


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Clean up after ending a capture raised, which torch 2.11 does not do (later versions do part of it).

    The allocator still routes allocations to the graph's pool, so stop that. The random generator is still registered
    with the graph; a successful empty capture releases it.
    """
    _ABANDONED.append(graph)
    graph.reset()
    with suppress(RuntimeError):  # torch has already done it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_side_stream(device)):
        torch.zeros((), device=device)
