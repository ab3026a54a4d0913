"""Writes images as PNG files, without rescaling grey levels."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from vaebm_fast.runtime.files import replacing


def tile(images: Tensor, columns: int, *, pad: int = 1) -> Tensor:
    """uint8 [N, H, W, C] tiled row by row on a white sheet with `columns` columns; returns uint8 [h, w, C]."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    sheet = torch.full((rows * (height + pad) + pad, columns * (width + pad) + pad, channels), 255, dtype=torch.uint8)
    for index, image in enumerate(images):
        top = pad + index // columns * (height + pad)
        left = pad + index % columns * (width + pad)
        sheet[top : top + height, left : left + width] = image
    return sheet


def save_grid(images: Tensor, path: Path, *, columns: int | None = None, zoom: int | None = None) -> None:
    """Write uint8 [N, H, W, C] as one PNG grid; small images are enlarged by an integer factor (`zoom`)."""
    sheet = tile(images, columns or math.ceil(math.sqrt(len(images))))
    array = (sheet[:, :, 0] if sheet.shape[2] == 1 else sheet).numpy()
    picture = Image.fromarray(array)
    factor = zoom or max(1, 256 // (images.shape[1] * 4))
    path.parent.mkdir(parents=True, exist_ok=True)
    magnified = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        magnified.save(temporary, "PNG")
