"""Writes images as PNG files, without rescaling grey levels."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vaebm_fast.runtime.files import replacing

SHEET_WIDTH, SHEET_SIDE, SHEET_GAP = 1200, 96, 8  # pixels of a contact sheet: its width, an image, between images


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


def save_contact_sheet(
    images: npt.NDArray[np.uint8], captions: Sequence[str], lines: Sequence[str], path: Path
) -> None:
    """Write uint8 [N, H, W, C] as one PNG: lines of text, then the images in rows, each with its caption below.

    Small images are enlarged by an integer factor to about SHEET_SIDE pixels.
    """
    zoom = max(1, SHEET_SIDE // images.shape[1])
    side = images.shape[1] * zoom
    columns = max(1, min(len(images), SHEET_WIDTH // (side + SHEET_GAP)))
    width = max(SHEET_WIDTH // 2, columns * (side + SHEET_GAP) + SHEET_GAP)
    font, small = ImageFont.load_default(14), ImageFont.load_default(11)
    text = [part for line in lines for part in textwrap.wrap(line, width // 8) or [""]]
    top, row_height = 20 * len(text) + 2 * SHEET_GAP, side + 16 + SHEET_GAP
    sheet = Image.new("RGB", (width, top + row_height * math.ceil(len(images) / columns)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(text):
        draw.text((SHEET_GAP, SHEET_GAP + 20 * number), line, "black", font)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, upper = SHEET_GAP + index % columns * (side + SHEET_GAP), top + index // columns * row_height
        picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
        sheet.paste(picture.resize((side, side), Image.Resampling.NEAREST), (left, upper))
        draw.text((left, upper + side + 2), caption[: side // 6], "black", small)
    with replacing(path) as temporary:
        sheet.save(temporary, "PNG")
