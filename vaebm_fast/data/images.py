"""Decodes image files to uint8 arrays; resizes and crops arrays.

All format conversions are defined here. Files are decoded to RGB, from which one-channel images are computed.
  alpha, transparent palettes and key colours: composited on black;
  EXIF and TIFF orientation: applied;
  16 bits per sample: the high byte, v = floor(v16 / 256), which inverts 8-bit values scaled by 257;
  CMYK: R = (255 - C)(255 - K) / 255, G and B likewise; embedded colour profiles are ignored;
  palette, 1-bit and grey: converted to RGB;
  RGB to one channel: (299 R + 587 G + 114 B) / 1000, ITU-R BT.601 luma;
  animations and multi-page files: the first frame or page.
Memory: files of more than MAX_FILE_BYTES and images of more than MAX_PIXELS are refused before they are read. Decoding
takes up to 24 bytes per pixel: 4.3 GB for the largest image. Of images above LARGE_PIXELS one at a time is decoded and
resized, whatever the number of threads; others take up to 0.4 GB in each thread. `containers` finds files; `sources`
makes images of one shape.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from vaebm_fast.config import Transform
from vaebm_fast.runtime.errors import UserError

Pixels: TypeAlias = npt.NDArray[np.uint8]
Record: TypeAlias = bytes | Pixels  # an encoded image file, or uint8 [H, W, C], C 1 or 3

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_FILE_BYTES = 1 << 30
MAX_PIXELS = 2 * cast(int, Image.MAX_IMAGE_PIXELS)  # 179 million, where Pillow refuses
LARGE_PIXELS = 1 << 24
CELEBA_SIZE, CELEBA_BOX = (178, 218), (15, 40, 163, 188)  # width, height; left, top, right, bottom

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_large = threading.Lock()


class UnfitImageError(UserError):
    """An image is sound, but the transform is of other images."""


class UnreadableImageError(UserError):
    """An image cannot be read; `image` is its name in the source, `fault` the message without its advice.

    is_damaged: whether its bytes were read and are no image, not withheld by the system (a missing file or disk).
    """

    def __init__(self, where: str | Path, error: Exception, image: str) -> None:
        self.why = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        self.image, self.fault = image, f"{where} cannot be read as an image ({self.why.rstrip('.')})."
        self.is_damaged = not (isinstance(error, OSError) and error.errno is not None)
        super().__init__(f"{self.fault} Replace it or remove it.")


@contextlib.contextmanager
def decoding(record: Record, channels: int) -> Iterator[Pixels]:
    """Yield uint8 [H, W, channels] of an encoded file, upright, or of stored pixels; channels is 1 or 3.

    While a large image is held inside, no other is decoded. Raises an exception of any type, with the reason as its
    message, if the file is empty, truncated, damaged, not an image, larger than the limits above, or has samples
    without a defined range (32-bit integers, floats).
    """
    if isinstance(record, np.ndarray):
        yield with_channels(record, channels)
        return
    if not record:
        raise UserError("it is empty")
    try:
        image = Image.open(io.BytesIO(record), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"it is no {', '.join(FORMATS)} file, or its header is damaged") from error
    with image, _in_turn_if_large(image.size):
        image.load()
        rgb = _to_rgb(_upright(image))
        yield as_array(rgb if channels == 3 else rgb.convert("L"))


def decode(record: Record, channels: int) -> Pixels:
    """The pixels that `decoding` yields."""
    with decoding(record, channels) as pixels:
        return pixels


@contextlib.contextmanager
def _in_turn_if_large(size: tuple[int, int]) -> Iterator[None]:
    """Hold the lock of large images while one of this size is decoded."""
    with _large if size[0] * size[1] > LARGE_PIXELS else contextlib.nullcontext():
        yield


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """uint8 [..., H, W, C] with 1 or 3 channels as [..., H, W, channels]: grey repeated, or RGB to luma."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    luma = pixels @ np.array((19595, 38470, 7471), np.uint32)  # Pillow's RGB to L, in 1/65536
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


def transformed(pixels: Pixels, transform: Transform, size: int) -> Pixels:
    """uint8 [H, W, C] as `transform` says, with its shorter side `size`.

    square: resized by the short side with the antialiased triangle filter, to be cropped to a square;
    celeba: CelebA's aligned 178x218 images cropped to their box, columns 15 to 162 and rows 40 to 187, then as square,
    which square images are as well (they are taken as cropped already);
    pad: zeros on all sides, not resized. stacked_mnist makes images of several, in `sources`.
    Raises UnfitImageError for an image that the transform does not fit.
    """
    height, width = pixels.shape[:2]
    if transform == "pad":
        border, odd = divmod(size - height, 2)
        if height != width or border < 0 or odd:
            raise UnfitImageError(
                f"it is {width}x{height}, which equal padding on all sides cannot extend to {size}x{size}"
            )
        return np.pad(pixels, ((border, border), (border, border), (0, 0)))
    top, left, kept_height, kept_width = box_of(transform, height, width)
    return resize_short_side(pixels[top : top + kept_height, left : left + kept_width], size)


def box_of(transform: Transform, height: int, width: int) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the part of an image that `transform` keeps before it is resized.

    Raises UnfitImageError for an image that the transform does not fit.
    """
    if transform != "celeba" or width == height:
        return 0, 0, height, width
    if (width, height) != CELEBA_SIZE:
        raise UnfitImageError(f"it is {width}x{height}, not 178x218 as CelebA's aligned images are, nor square")
    left, top, right, bottom = CELEBA_BOX
    return top, left, bottom - top, right - left


def check_transform(transform: str) -> None:
    """Raise UserError if there is no such transform."""
    if transform not in get_args(Transform):
        raise UserError(f"transform is {transform!r}; it must be one of {', '.join(get_args(Transform))}.")


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
    """Resize uint8 [H, W, C] with the antialiased triangle filter so that the shorter side is `size`.

    Raises UserError if the result would have more than MAX_PIXELS.
    """
    height, width = pixels.shape[:2]
    if min(height, width) == size:
        return pixels
    new_height, new_width = resized_sides(height, width, size)
    if new_height * new_width > MAX_PIXELS:
        raise UserError(f"it is {width}x{height}, which resized to {new_width}x{new_height} is too large")
    squeezed = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
    return as_array(Image.fromarray(squeezed).resize((new_width, new_height), Image.Resampling.BILINEAR))


def crop_square(pixels: Pixels, size: int, vertical: float = 0.5, horizontal: float = 0.5) -> Pixels:
    """A view [size, size, C] of uint8 [H, W, C] with top = floor(vertical (H - size + 1)), left likewise.

    `vertical` and `horizontal` are in [0, 1): uniform values make every window equally likely, 1/2 is the centre.
    """
    top = int(vertical * (pixels.shape[0] - size + 1))
    left = int(horizontal * (pixels.shape[1] - size + 1))
    return pixels[top : top + size, left : left + size]


def mirrored(images: Pixels) -> Pixels:
    """uint8 [n, H, W, C], left and right exchanged; a copy."""
    n, height, width, channels = images.shape
    pixels = np.ascontiguousarray(images).view(f"V{channels}").reshape(n, height, width)  # half the time of bytes
    return np.ascontiguousarray(pixels[:, :, ::-1]).view(np.uint8).reshape(images.shape)


def as_array(image: Image.Image) -> Pixels:
    """An RGB or L image as uint8 [H, W, C], C 3 or 1."""
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def resized_sides(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) when the shorter side is resized to `size`: side * size / shorter side, halves rounded up."""
    short = min(height, width)
    return (2 * height * size + short) // (2 * short), (2 * width * size + short) // (2 * short)


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
