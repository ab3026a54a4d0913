"""gather_images: one launch gathers, crops and mirrors a batch of images, along the bytes of their rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BYTES = 16, 256  # of a program's tile, at most; not timed


@triton.jit
def _within(value, last):
    """The value, or the end of 0..last that is next to it."""
    return tl.minimum(tl.maximum(value, 0), last)


@triton.jit(do_not_specialize=["M", "H", "W"])
def gather_kernel(
    images, index, flip, top, left, out, M, H, W,
    SIZE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS rows of one image of `out` by BYTES bytes of each.

    Grid: one-dimensional, all tiles of the first image, then those of the next. Adjacent threads own adjacent bytes of
    a row, so they read adjacent bytes of the source; those of a mirrored row descend by pixel. Where in the source's
    row a byte comes from is computed once for all rows of the tile.
    """
    per_row: tl.constexpr = (SIZE * C + BYTES - 1) // BYTES
    tiles: tl.constexpr = (SIZE + ROWS - 1) // ROWS * per_row
    n, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    y = tile // per_row * ROWS + tl.arange(0, ROWS)
    byte = tile % per_row * BYTES + tl.arange(0, BYTES)
    pixel = byte // C
    mirrored = (SIZE - 1 - pixel) * C + byte - pixel * C
    column = tl.where(tl.load(flip + n) != 0, mirrored, byte)
    image = _within(tl.load(index + n), M - 1)
    first = image * H + _within(tl.load(top + n), H - SIZE)  # row of `images`
    source = ((first + y) * W + _within(tl.load(left + n), W - SIZE)) * C
    inside = (y < SIZE)[:, None] & (byte < SIZE * C)[None, :]
    value = tl.load(images + source[:, None] + column[None, :], mask=inside)
    target = ((n * SIZE + y) * (SIZE * C))[:, None] + byte[None, :]
    if SIZE * C % 4 == 0:  # four bytes a thread: sixteen, best for the store alone, would spread the loads of a warp
        target = tl.max_contiguous(tl.multiple_of(target, (1, 4)), (1, 4))
    tl.store(out + target, value, mask=inside)


def gather_images(images: Tensor, index: Tensor, flip: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """The batch of `vaebm_fast.ops.gather_images.gather_images`; values out of range are clamped."""
    (N,), (M, H, W, C) = index.shape, images.shape
    out = torch.empty((N, size, size, C), dtype=torch.uint8, device=images.device)
    if N > 0:
        rows, bytes_ = (min(most, triton.next_power_of_2(number)) for most, number in ((ROWS, size), (BYTES, size * C)))
        grid = (N * triton.cdiv(size, rows) * triton.cdiv(size * C, bytes_),)
        gather_kernel[grid](
            images, index.contiguous(), flip.contiguous(), top.contiguous(), left.contiguous(), out, M, H, W,
            SIZE=size, C=C, ROWS=rows, BYTES=bytes_, num_warps=4,
        )  # fmt: skip
    return out
