"""One image file to one uint8 array, and the one way images are resized and cropped.

What every format becomes is decided here alone. RGB is the inner form, and a single channel is made from it.
  alpha, transparent palettes and key colours: composited on black;
  EXIF and TIFF orientation: applied;
  16 bits per sample: the high byte, as in v = floor(v16 / 256), which undoes 8-bit values widened by 257;
  CMYK: R = (255 - C)(255 - K) / 255 and alike, without a colour profile; embedded profiles are not applied;
  palette, 1-bit and grey: their RGB equivalents;
  RGB to one channel: (299 R + 587 G + 114 B) / 1000, ITU-R BT.601 luma;
  animations and multi-page files: the first picture.
Which files there are, and how arrays become batches, is left to `folder` and `loader`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from vaebm_fast.runtime.errors import UserError

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


def read_image(path: Path, channels: int) -> Pixels:
    """The picture in a file as uint8 [H, W, channels], channels 1 or 3, upright.

    Raises ValueError, naming the file, where it is empty, truncated, damaged, not an image, or of a sample type
    without a defined range (32-bit integers, floats).
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            rgb = _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged bytes decoders raise OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path} cannot be read as an image ({error}). Replace it or take it away.") from error
    return as_array(rgb if channels == 3 else rgb.convert("L"))


def resize_short_side(pixels: Pixels, size: int) -> Pixels:
    """uint8 [H, W, C] scaled by the antialiased triangle filter so that the shorter side is `size`."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels
    new_size = (_scaled(width, size, short), _scaled(height, size, short))
    squeezed = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return as_array(Image.fromarray(squeezed).resize(new_size, Image.Resampling.BILINEAR))


def crop_square(pixels: Pixels, size: int, vertical: float = 0.5, horizontal: float = 0.5) -> Pixels:
    """A [size, size, C] window of uint8 [H, W, C], top = floor(vertical (H - size + 1)), left likewise; a view.

    Places are in [0, 1): uniform ones make every window equally likely, 1/2 is the centre.
    """
    top = int(vertical * (pixels.shape[0] - size + 1))
    left = int(horizontal * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def as_array(image: Image.Image) -> Pixels:
    """An RGB or L image as uint8 [H, W, C], C 3 or 1."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _scaled(side: int, size: int, short: int) -> int:
    return (2 * side * size + short) // (2 * short)  # side * size / short, halves up, in integers


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UserError("its samples are 32 bits wide, so their range is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return _high_byte(image).convert("RGB")
    if image.has_transparency_data:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    samples = np.asarray(image)
    high = (samples >> 8).astype(np.uint8)
    key = image.info.get("transparency")
    if key is not None:
        high[samples == key] = 0  # the key colour is transparent, and what is transparent shows black
    return Image.fromarray(high)
