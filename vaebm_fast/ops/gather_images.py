"""One training batch of a data set that lives on the device: gather, crop and mirror images in one launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vaebm_fast import reference
from vaebm_fast.ops import _register
from vaebm_fast.ops._backend import Backend, choose
from vaebm_fast.ops._checks import check_tensor


def gather_images(
    images: Tensor, index: Tensor, flip: Tensor, top: Tensor, left: Tensor, *, size: int, backend: Backend = "auto"
) -> Tensor:
    """out[n, y, x, c] = images[index[n], top[n] + y, left[n] + (size - 1 - x if flip[n] else x), c].

    images: uint8 [M, H, W, C], C = 1 or 3, contiguous, of any number of bytes. index: int64 [n], within 0..M-1, any of
    them repeatedly. flip: bool [n]. top, left: int64 [n], within 0..H-size and 0..W-size. size: 1..min(H, W).
    Result: uint8 [n, size, size, C], contiguous.
    A value out of range is an error on a CPU. On a GPU, where no host may wait for it, it is clamped to its range, so
    that nothing outside of `images` is read; so it is by Triton's interpreter.
    A CUDA graph may capture it: no host sync, and everything that changes between batches is in tensors.
    Moves 2 bytes per element of the result, read once and written once.
    Not differentiable. Raises ValueError for invalid arguments, RuntimeError for a missing backend.
    """
    _check(images, index, flip, top, left, size)
    chosen = choose("gather_images", images.device, backend, torch.uint8)
    if chosen == "reference":
        if images.device.type == "cpu":
            M, H, W, _ = images.shape
            for name, values, last in (("index", index, M - 1), ("top", top, H - size), ("left", left, W - size)):
                _check_within(name, values, last)
        return reference.gather_images(images, index, flip, top, left, size=size)
    batch: Tensor = _register.ops_of(chosen).gather_images(images, index, flip, top, left, size)
    return batch


def _check(images: Tensor, index: Tensor, flip: Tensor, top: Tensor, left: Tensor, size: int) -> None:
    if images.dim() != 4 or images.dtype != torch.uint8 or images.shape[3] not in (1, 3) or not images.is_contiguous():
        raise ValueError(
            f"images must be uint8 [M, H, W, C], C = 1 or 3, and contiguous; it is {images.dtype} "
            f"{list(images.shape)} with strides {list(images.stride())}."
        )
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [n]; it is {index.dtype} {list(index.shape)}.")
    for name, values, dtype in (("flip", flip, torch.bool), ("top", top, torch.int64), ("left", left, torch.int64)):
        if values.dtype != dtype or values.shape != index.shape:
            raise ValueError(
                f"{name} must be {str(dtype).removeprefix('torch.')} {list(index.shape)}, as many as index has; it is "
                f"{values.dtype} {list(values.shape)}."
            )
    for name, values in (("index", index), ("flip", flip), ("top", top), ("left", left)):
        check_tensor(name, values, index.shape, images.device, values.dtype)
    M, H, W, _ = images.shape
    if not 1 <= size <= min(H, W):
        raise ValueError(f"size is {size}; it must be within 1..{min(H, W)} for images {list(images.shape)}.")
    if M == 0 and len(index) > 0:
        raise ValueError("images is empty, so there is none to gather.")


def _check_within(name: str, values: Tensor, last: int) -> None:
    """Raise ValueError for the first value that is not within 0..last."""
    outside = torch.nonzero((values < 0) | (values > last))
    if len(outside) > 0:
        n = int(outside[0])
        raise ValueError(f"{name}[{n}] is {int(values[n])}; it must be within 0..{last}.")


def _fake(images: Tensor, index: Tensor, *others: Any) -> Tensor:
    *_, size = others
    return images.new_empty((index.shape[0], size, size, images.shape[3]))


_register.define(
    "gather_images(Tensor images, Tensor index, Tensor flip, Tensor top, Tensor left, int size) -> Tensor", _fake
)
