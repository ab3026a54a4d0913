"""gather_images in Triton's interpreter, between bands; `test_triton.py` runs this file.

There the tests of the op run too, on backend "triton"; here is what they do not show.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.test_gather_images import by_hand, everywhere, outside
from tests.triton_kernels.interpreted_triton import OPS, banded_empty, bands
from vaebm_fast.triton_kernels import gather_images as kernels

__all__ = ["bands"]  # a fixture that surrounds every test


def banded(x: Tensor) -> Tensor:
    return banded_empty(x.shape, dtype=x.dtype).copy_(x)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("tile", [(16, 256), (4, 32)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 7, 6), (3, 23, 19, 17)], ids=str)
def test_nothing_is_written_beside_the_batch(
    shape: tuple[int, int, int, int], tile: tuple[int, int], C: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several ragged tiles of rows and of bytes."""
    monkeypatch.setattr(kernels, "ROWS", tile[0])
    monkeypatch.setattr(kernels, "BYTES", tile[1])
    M, H, W, size = shape
    images = torch.randint(256, (M, H, W, C), dtype=torch.uint8)
    given = [each.flip(0) for each in everywhere(*shape)]  # behind the last crop is no band, which could be copied
    assert torch.equal(OPS.gather_images(banded(images), *map(banded, given), size), by_hand(images, *given, size))


def test_nothing_is_read_beside_the_images_at_values_out_of_range() -> None:
    images, given, clamped = outside()
    assert torch.equal(OPS.gather_images(banded(images), *map(banded, given), 5), by_hand(images, *clamped, 5))


def test_op_passes_opcheck(bands: pytest.MonkeyPatch) -> None:
    bands.undo()  # fake tensors are made by the real torch.empty
    images = torch.randint(256, (3, 7, 9, 3), dtype=torch.uint8)
    given: tuple[Any, ...] = everywhere(3, 7, 9, 5)
    torch.library.opcheck(OPS.gather_images.default, (images, *given, 5))
