"""Argument checks that the public ops share: tensors that fit each other, and a backend that takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vaebm_fast.ops._backend import Backend, choose, require_dtype


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless x is floating point [N, C, H, W]."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"{name} must be floating point [N, C, H, W]; it is {x.dtype} {list(x.shape)}.")


def check_tensor(name: str, x: Tensor, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError unless x has this shape, device and dtype."""
    if list(x.shape) != list(shape):
        raise ValueError(f"{name} must be {list(shape)}; it is {list(x.shape)}.")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}; move it to {device}, where the others are.")
    if x.dtype != dtype:
        raise ValueError(f"{name} is {x.dtype}; convert it to {dtype}, as the others are.")


def check_energy_terms(op: str, y: Tensor, skip: Tensor | None, shift: Tensor | None) -> None:
    """Raise ValueError unless y [N, C, H, W], skip (same shape) and shift [C] fit each other and shift is frozen."""
    check_image("y", y)
    if skip is not None:
        check_tensor("skip", skip, y.shape, y.device, y.dtype)
    if shift is not None:
        check_tensor("shift", shift, (y.shape[1],), y.device, y.dtype)
        refuse_weight_gradients(op, shift)


def choose_for(op: str, backend: Backend, *tensors: Tensor | None) -> str:
    """`choose` for the device of the tensors and the dtype of the first.

    Raises ValueError if that backend does not take their dtypes.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    chosen = choose(op, given[0].device, backend, given[0].dtype)
    for tensor in given:
        require_dtype(op, chosen, tensor.dtype)
    return chosen


def refuse_weight_gradients(op: str, *weights: Tensor) -> None:
    """Raise ValueError if a frozen weight requires a gradient."""
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        raise ValueError(f"{op} has no gradient for its weights; detach them.")
