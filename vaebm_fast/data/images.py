"""Decodes an image file to a uint8 array; resizes and crops arrays.

All format conversions are defined here. Files are decoded to RGB, from which one-channel images are computed.
  alpha, transparent palettes and key colours: composited on black;
  EXIF and TIFF orientation: applied;
  16 bits per sample: the high byte, v = floor(v16 / 256), which inverts 8-bit values scaled by 257;
  CMYK: R = (255 - C)(255 - K) / 255, G and B likewise; embedded colour profiles are ignored;
  palette, 1-bit and grey: converted to RGB;
  RGB to one channel: (299 R + 587 G + 114 B) / 1000, ITU-R BT.601 luma;
  animations and multi-page files: the first frame or page.
`folder` lists files; `loader` makes batches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from vaebm_fast.runtime.errors import UserError

Pixels = npt.NDArray[np.uint8]

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")


class UnreadableImageError(UserError):
    """An image file cannot be read; `image` is its name in the source, `fault` the message without its advice.

    is_damaged: whether its bytes were read and are no image, not withheld by the system (a missing file or disk).
    """

    def __init__(self, path: Path, error: Exception, image: str) -> None:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        self.image, self.fault = image, f"{path} cannot be read as an image ({why})."
        self.is_damaged = not (isinstance(error, OSError) and error.errno is not None)
        super().__init__(f"{self.fault} Replace it or remove it.")


def read_image(path: Path, channels: int, name: str | None = None) -> Pixels:
    """Decode a file to uint8 [H, W, channels], upright; channels is 1 or 3. name: in its source; default: the path.

    Raises UnreadableImageError if the file is missing, empty, truncated, damaged, not an image, or has samples without
    a defined range (32-bit integers, floats).
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            rgb = _to_rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise OSError, SyntaxError, struct.error, ...
        raise UnreadableImageError(path, error, str(path) if name is None else name) from error
    return as_array(rgb if channels == 3 else rgb.convert("L"))


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says; other metadata, which may be odd, is neither read nor rewritten.

    An orientation that cannot be read counts as none. TIFF files are upright already: Pillow turns them on loading.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # damaged metadata raises as many kinds of errors as damaged images
        return image
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def resize_short_side(pixels: Pixels, size: int) -> Pixels:
    """Resize uint8 [H, W, C] with the antialiased triangle filter so that the shorter side is `size`."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short == size:
        return pixels
    new_size = (_scaled(width, size, short), _scaled(height, size, short))
    squeezed = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return as_array(Image.fromarray(squeezed).resize(new_size, Image.Resampling.BILINEAR))


def crop_square(pixels: Pixels, size: int, vertical: float = 0.5, horizontal: float = 0.5) -> Pixels:
    """A view [size, size, C] of uint8 [H, W, C] with top = floor(vertical (H - size + 1)), left likewise.

    `vertical` and `horizontal` are in [0, 1): uniform values make every window equally likely, 1/2 is the centre.
    """
    top = int(vertical * (pixels.shape[0] - size + 1))
    left = int(horizontal * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def as_array(image: Image.Image) -> Pixels:
    """An RGB or L image as uint8 [H, W, C], C 3 or 1."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _scaled(side: int, size: int, short: int) -> int:
    return (2 * side * size + short) // (2 * short)  # round-half-up of side * size / short, in integers


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise UserError("its samples have 32 bits, so their range is unknown; save it with 8 or 16 bits")
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
        high[samples == key] = 0  # the key colour is transparent, hence black
    return Image.fromarray(high)
