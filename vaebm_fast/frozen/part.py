"""A part of a frozen network: folded weights that stay at one place in memory, and the live tensors behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vaebm_fast.runtime.errors import NonFiniteError

Weights = TypeVar("Weights", bound=tuple[Any, ...])
Slot = tuple[nn.Module, str, str]  # a module, its table of tensors, and a key there: replaced tensors are seen too


class StaleWeightsError(RuntimeError):
    """The live weights are not those that were folded."""


def slots(module: nn.Module) -> list[Slot]:
    """Where every real-valued parameter and buffer of `module` and its submodules is kept, empty slots included."""
    return [
        (part, table, key)
        for part in module.modules()
        for table in ("_parameters", "_buffers")
        for key, tensor in vars(part)[table].items()
        if tensor is None or tensor.is_floating_point()
    ]


def tensors_of(weights: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors of a nested named tuple, in order; None is passed over."""
    for entry in weights:
        if isinstance(entry, Tensor):
            yield entry
        elif entry is not None:
            yield from tensors_of(entry)


def _map(function: Callable[[Tensor], Tensor], entry: Any) -> Any:
    """A nested named tuple with `function` of every tensor."""
    if entry is None or isinstance(entry, Tensor):
        return None if entry is None else function(entry)
    return getattr(entry, "_make", tuple)(_map(function, inner) for inner in entry)


class Part(Generic[Weights]):
    """Folded weights; a subclass computes with them in `__call__`.

    fold: gives the weights, a (nested) named tuple of tensors, from the live modules in their own precision. watched:
    the live tensors that it reads.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, name: str, watched: list[Slot], dtype: torch.dtype, fold: Callable[[], Weights]) -> None:
        self.name = name
        self._watched, self._fold = watched, fold
        self.weights: Weights = _map(lambda tensor: _own_copy(tensor, dtype), fold())
        self._folded = self._live()

    def _live(self) -> list[tuple[Tensor | None, int, int]]:
        """Every live tensor with its address and version counter, which in-place edits raise.

        Holds the tensors themselves, so that no replacement gets a freed one's address.
        """
        live = [vars(module)[table].get(key) for module, table, key in self._watched]
        return [(None, 0, 0) if tensor is None else (tensor, tensor.data_ptr(), tensor._version) for tensor in live]

    @property
    def is_stale(self) -> bool:
        """Whether a live tensor was edited or replaced since it was folded."""
        return [mark for _, *mark in self._live()] != [mark for _, *mark in self._folded]

    @property
    def has_other_tensors(self) -> bool:
        """Whether a live tensor has gone or come."""
        return [tensor is None for tensor, *_ in self._live()] != [tensor is None for tensor, *_ in self._folded]

    @torch.inference_mode(False)
    @torch.no_grad()
    def refold(self) -> None:
        """Fold anew into the same memory."""
        for kept, fresh in zip(tensors_of(self.weights), tensors_of(self._fold()), strict=True):
            if fresh.device != kept.device:
                raise ValueError(
                    f"{self.name} is on {fresh.device} but was frozen on {kept.device}; freeze the model again."
                )
            kept.copy_(fresh)
        self.follow()

    @torch.inference_mode(False)
    @torch.no_grad()
    def adopt(self, other: Part[Weights]) -> None:
        """Take the weights of a part of the same form into the same memory, and the modules behind it."""
        for kept, fresh in zip(tensors_of(self.weights), tensors_of(other.weights), strict=True):
            kept.copy_(fresh)
        self._watched, self._fold, self._folded = other._watched, other._fold, other._folded

    def follow(self) -> None:
        """Count the live tensors, as they are now, as those that were folded."""
        self._folded = self._live()

    def forget(self) -> None:
        """Count as stale until the next `refold`."""
        self._folded = []


def _own_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in `dtype`; kernels and feature maps in NHWC order."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.detach().to(dtype, copy=True).contiguous(memory_format=layout)


def require_finite(parts: list[Part[Any]]) -> None:
    """Raise NonFiniteError naming the parts whose weights are not finite; one wait for the device in all.

    Weights on the meta device have no values and pass: such a pair is made to be counted (`evaluation.cost`).
    """
    parts = [part for part in parts if not any(tensor.is_meta for tensor in tensors_of(part.weights))]
    if not parts:
        return
    sums = [torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors_of(part.weights)]) for part in parts]
    finite = torch.stack([torch.isfinite(values).all() for values in sums]).tolist()
    broken = [part for part, fine in zip(parts, finite, strict=True) if not fine]
    for part in broken:
        part.forget()
    if broken:
        names = ", ".join(part.name for part in broken)
        raise NonFiniteError(f"The weights of {names} are not finite once folded; load or roll back to finite weights.")
