"""CUDA graphs: what a function of tensors launches is recorded once and then launched as one thing.

Knows nothing of chains. A function can be captured when nothing that changes from call to call lives in Python: its
inputs are tensors, and so is every counter; it never asks the device for a number; what it reads besides its inputs
(weights) stays at one place in memory, where changes are seen by the next replay.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]

# Each graph keeps the memory of everything its function makes. Training needs one, sampling one per batch size.
MOST_GRAPHS = 4


@dataclass(frozen=True)
class Recording:
    """A captured function: its inputs and outputs at fixed addresses, and what fills the latter from the former."""

    inputs: Tensors
    outputs: Tensors
    replay: Callable[[], None]

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
    replay, which gives results of its own. Where capturing fails, one warning says why and all calls run eagerly.
    """

    def __init__(self) -> None:
        self._warm: set[Hashable] = set()
        self._recordings: dict[Hashable, Recording] = {}
        self._has_failed = False

    def __call__(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> Tensors:
        """`function(*inputs)`, a tuple of tensors that are not its inputs.

        key: everything that the results depend on but the inputs' values, their shape, precision and device, and how
        torch multiplies float32 (a captured kernel goes on as it was).
        """
        if self._has_failed or not all(_is_capturable(given) for given in inputs):
            return function(*inputs)
        cudnn = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
        products = torch.backends.cuda.matmul.fp32_precision, cudnn
        key = (key, products, tuple((given.shape, given.dtype, given.device) for given in inputs))
        if key not in self._recordings:
            if key not in self._warm:
                self._warm.add(key)
                return _warm_up(function, inputs)
            try:
                self._keep(key, _record(function, inputs))
            except RuntimeError as error:
                self._has_failed = True
                # Ending a capture in which something was raised raises again, and says nothing of it.
                first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
                reason = str(first).strip().split("\n")[0]
                warnings.warn(
                    f"A chain could not be captured into a CUDA graph and runs eagerly: {reason}", stacklevel=2
                )
                return function(*inputs)
        return self._recordings[key](inputs)

    def _keep(self, key: Hashable, recording: Recording) -> None:
        """Keep it in place of the oldest one where there are too many."""
        if len(self._recordings) == MOST_GRAPHS:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording


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
def _record(function: Function, inputs: Sequence[Tensor]) -> Recording:
    """Capture `function` on copies of `inputs`, with a memory pool of its own. Raises RuntimeError."""
    device = inputs[0].device
    # The present stream, because torch.cuda.graph stays on its own where ending a capture raises.
    with torch.cuda.stream(torch.cuda.current_stream(device)):
        kept, graph = tuple(given.detach().clone() for given in inputs), torch.cuda.CUDAGraph()
        # thread_local: threads of data loaders and of NCCL may do meanwhile what a capture must not.
        with torch.cuda.graph(graph, stream=_side_stream(device), capture_error_mode="thread_local"):
            outputs = function(*kept)
    return Recording(kept, outputs, graph.replay)
