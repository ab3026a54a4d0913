"""CUDA graphs: what a function of tensors launches is recorded once and then launched as one thing.

Knows nothing of chains. A function can be captured when nothing that changes from call to call lives in Python: its
inputs are tensors, and so is every counter; it never asks the device for a number; what it reads besides its inputs
(weights) stays at one place in memory, where changes are seen by the next replay.
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
_ABANDONED: list[torch.cuda.CUDAGraph] = []  # torch's allocators may go on asking a graph whose capture failed


@dataclass(frozen=True)
class Recording:
    """A captured function: its inputs and outputs at fixed addresses, and what fills the latter from the former.

    pool: torch's handle of the memory in which everything lies that the function made.
    """

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]
    pool: Any

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor]) -> Tensors:
        """The function's results for these inputs, in memory of the caller."""
        for kept, given in zip(self.inputs, inputs, strict=True):
            kept.copy_(given)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


class Graphs:
    """Calls functions of CUDA tensors, and captures those that are called again; elsewhere it just calls them.

    The first call of a key runs the function and warms up what is set up late (kernels that are compiled, libraries'
    work space): a batch of a size that comes once is never captured. The second captures, and from then on a call is a
    replay, which gives results of its own. A key that could not be captured, of which a warning says why, runs eagerly.
    All graphs take their memory from one pool, which is as large as the largest needs: they run one after the other,
    and each leaves in it nothing that is needed once its results have been copied.
    """

    def __init__(self) -> None:
        self._warm: set[Hashable] = set()
        self._failed: set[Hashable] = set()
        self._recordings: dict[Hashable, Recording] = {}
        self._pool: Any = None

    def __call__(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> Tensors:
        """`function(*inputs)`, a tuple of tensors that are not its inputs.

        key: everything that the results depend on but the inputs' values, their shape, precision and device, and how
        torch multiplies float32 (a captured kernel goes on as it was).
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
            if reason is not None:  # and the exception, whose traceback kept the chain's memory, is gone
                warnings.warn(
                    f"A chain could not be captured into a CUDA graph and runs eagerly: {reason}", stacklevel=2
                )
                return function(*inputs)
        return self._recordings[key](inputs)

    def _capture(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> str | None:
        """Keep a recording in place of the oldest one where there are too many; where that fails, say why."""
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
    """Why a capture failed. Ending one in which something was raised raises again, and says nothing of it."""
    first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
    return str(first).strip().split("\n")[0]


def _is_capturable(tensor: Tensor) -> bool:
    return tensor.is_cuda


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all, because the allocator keeps memory apart for each stream."""
    return torch.cuda.Stream(device)


def _warm_up(function: Function, inputs: Sequence[Tensor]) -> Tensors:
    """`function(*inputs)` on the stream on which it will be captured; the present stream waits for it."""
    device = inputs[0].device
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        outputs = function(*inputs)
    current.wait_stream(side)
    for output in outputs:
        output.record_stream(current)
    return outputs


@torch.inference_mode(False)  # whose tensors a replay outside of it could not write
def _record(function: Function, inputs: Sequence[Tensor], pool: Any) -> Recording:
    """Capture `function` on copies of `inputs`, in the memory `pool`, by default a new one. Raises RuntimeError."""
    device, graph = inputs[0].device, torch.cuda.CUDAGraph()
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # The present stream, because torch.cuda.graph stays on its own where ending a capture raises.
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        kept = tuple(given.detach().clone() for given in inputs)
        try:
            # thread_local: threads of data loaders and of NCCL may do meanwhile what a capture must not.
            with torch.cuda.graph(graph, pool, _side_stream(device), capture_error_mode="thread_local"):
                outputs = function(*kept)
        except RuntimeError:
            _abandon(graph, pool, device)
            raise
    return Recording(kept, outputs, graph.replay, pool)


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Undo what torch leaves undone where ending a capture raises (all of it in 2.11, less in later ones).

    The allocator goes on serving the pool to the graph, and the generator of random numbers to count for it: the one is
    told to stop, the other is freed by a capture that ends well.
    """
    _ABANDONED.append(graph)
    graph.reset()
    with suppress(RuntimeError):  # torch has done it
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_side_stream(device)):
        torch.zeros((), device=device)
