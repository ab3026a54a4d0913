"""Conversion of uint8 images to network inputs in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from vaebm_fast.data.images import Pixels
from vaebm_fast.runtime.errors import UserError


def to_input(images: Tensor, bits: int, device: torch.device | str) -> Tensor:
    """uint8 [n, H, W, C] -> `quantise(images / 255, bits)`, float32 [n, C, H, W], channels_last, on `device`.

    The bytes are copied first, asynchronously if pinned; all arithmetic runs on the device. Bits are dropped from the
    integers, and the divisor is a tensor: PyTorch's CUDA kernel multiplies by the reciprocal of a Python number, which
    rounds differently and would let a floor of products fall one level short. Raises UserError unless bits is 1 to 8.
    """
    _require_bits(bits)
    levels = images.to(device, non_blocking=True).permute(0, 3, 1, 2) >> (8 - bits)
    # A tensor filled on the device: copying one would make the host wait.
    return levels.to(torch.float32).div_(torch.full((), 2.0**bits - 1, dtype=torch.float32, device=device))


def to_tensor(images: Pixels) -> Tensor:
    """uint8 [n, H, W, C] -> float32 [n, C, H, W], contiguous: images / 255."""
    channels_first = torch.from_numpy(images).permute(0, 3, 1, 2)
    return channels_first.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def quantise(x: Tensor, bits: int) -> Tensor:
    """floor(255 x / 2^(8 - b)) / (2^b - 1): the top b bits of each pixel, rescaled to [0, 1].

    x is float32 in [0, 1], of any shape; 8 bits return x unchanged. Raises UserError unless bits is 1 to 8.
    """
    _require_bits(bits)
    return x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)


def _require_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UserError(f"bits is {bits}; it must be 1 to 8.")
